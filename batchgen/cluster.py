"""Where workers run. One worker runs in this process; more are refused by `spec` until the Ray executor is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from batchgen.generate import Engine
    from batchgen.record import Shard
    from batchgen.render import Renderer
    from batchgen.worker import Tally, Task


def run(
    task: Task,
    shards: Iterable[Shard],
    engine: Engine,
    renderer: Renderer,
    *,
    draining: Callable[[], bool],
    watch: Callable[[Tally], None],
) -> Tally:
    """Generate and commit `shards`; raises what `worker.Worker.run` raises. Closes the engine."""
    try:
        return Worker(task, engine, renderer).run(shards, draining=draining, watch=watch)
    finally:
        engine.close()
