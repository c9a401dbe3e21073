"""What runs inside Ray actors: the desk, and workers with their line to it."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from batchgen import __version__
from batchgen.desk import Desk, Give, Leave, Merge
from batchgen.errors import LeaseLostError, ModelError
from batchgen.worker import Kit, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from batchgen.attempt import Task
    from batchgen.record import Piece, Shard
    from batchgen.spec import Spec
    from batchgen.tally import Tally

TELL_SECONDS = 0.5
# A call to an actor that is not busy takes milliseconds; a minute without an answer means that Ray is gone.
CALL_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """What the desk knows: the last tally and the silence in seconds of each worker, and log lines since last asked."""

    over: bool
    tallies: dict[str, Tally]
    silent_s: dict[str, float]
    lines: list[tuple[str, int, str]]


class DeskActor:
    """The desk, what workers tell beside, and whether they shall drain."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._desk = Desk(shards)
        self._tallies: dict[str, Tally] = {}
        self._told: dict[str, float] = {}
        self._lines: list[tuple[str, int, str]] = []
        self._draining = False

    def join(self, worker: str) -> None:
        """There is a new worker."""
        self._desk.join(worker)
        self._told[worker] = time.monotonic()

    def take(self, worker: str) -> tuple[Shard | Piece | None, bool]:
        """What is next for a worker, and whether all is done."""
        return self._desk.take(worker), self._desk.over

    def tell(
        self,
        worker: str,
        tally: Tally,
        spare: tuple[str, int],
        ended: list[Shard | Piece],
        refused: list[Piece],
        lines: list[tuple[int, str]],
    ) -> tuple[list[Any], bool]:
        """What a worker has done; it gets orders, and whether to drain."""
        for item in ended:
            self._desk.ended(worker, item)
        for piece in refused:
            self._desk.refused(worker, piece)
        orders = self._desk.tell(worker, spare)
        if orders != [Leave()]:
            self._tallies[worker], self._told[worker] = tally, time.monotonic()
        self.say(worker, lines)
        return orders, self._draining

    def say(self, worker: str, lines: list[tuple[int, str]]) -> None:
        """Log lines of a worker."""
        self._lines += [(worker, level, text) for level, text in lines]

    def gave(self, worker: str, piece: Piece | None) -> None:
        """The answer to `desk.Give`."""
        self._desk.gave(worker, piece)

    def lost(self, worker: str) -> None:
        """A worker is no more."""
        self._desk.lost(worker)
        self._told.pop(worker, None)
        if worker in self._tallies:  # what it did counts, how fast it was no more
            self._tallies[worker].running, self._tallies[worker].generating_s = 0, 0.0

    def drain(self) -> None:
        """Tell every worker to drain."""
        self._draining = True

    def look(self) -> Look:
        """How it goes."""
        lines, self._lines = self._lines, []
        now = time.monotonic()
        return Look(self._desk.over, self._tallies, {name: now - at for name, at in self._told.items()}, lines)


class _Lines(logging.Handler):
    """Keeps a worker's log lines until they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append((record.levelno, self.format(record)))


class WorkerActor:
    """One worker's process."""

    def hello(self) -> dict[str, Any]:
        """Where the process is, once there is one."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return {"pid": os.getpid(), "node": node, "host": socket.gethostname(), "version": __version__}

    def work(self, desk: Any, task: Task, spec: Spec, costs: Path) -> Tally:
        """Load the engine and work until all shards are done."""
        lines = _Lines()
        logger = logging.getLogger("batchgen")
        logger.setLevel(logging.INFO)
        logger.addHandler(lines)
        try:
            return self._work(desk, task, spec, costs, lines)
        finally:
            desk.say.remote(task.worker, lines.kept)

    @staticmethod
    def _work(desk: Any, task: Task, spec: Spec, costs: Path, lines: _Lines) -> Tally:
        link, kit = _Link(desk, task.worker, lines), Kit.find(spec)
        for name, found in (("target", kit.target), ("draft", kit.draft)):
            if found is not None and found.identity != task.metadata[f"{name}_identity"]:
                raise ModelError(
                    f"model.{name}: on {socket.gethostname()} it is {found.identity}, where the job was started "
                    f"{task.metadata[f'{name}_identity']}; name a revision, or bring the same files to every node"
                )
        engine = kit.engine(costs)
        try:
            worker = Worker(task, engine, kit.renderer, kit.screen)
            tally = worker.run(link.shards(), draining=link.draining, watch=lambda tally: link.watch(worker))
            link.tell(worker)
            return tally
        finally:
            engine.close()


class _Link:
    """A worker's line to the desk. Telling does not wait for the answer: the engine is not to stand still for it."""

    def __init__(self, desk: Any, name: str, lines: _Lines) -> None:
        import ray

        self._ray, self._desk, self._name, self._lines = ray, desk, name, lines
        self._told = self._asked = -math.inf
        self._answer: Any = None
        self._draining = False

    def shards(self) -> Iterator[Shard | Piece | None]:
        """What the desk hands out, None when it has nothing now."""
        while not self._draining:
            if time.monotonic() - self._asked < TELL_SECONDS:
                yield None
                continue
            item, over = self._ray.get(self._desk.take.remote(self._name), timeout=CALL_SECONDS)
            if over:
                return
            if item is None:
                self._asked = time.monotonic()
            yield item

    def draining(self) -> bool:
        return self._draining

    def watch(self, worker: Worker) -> None:
        """Tell how it goes, and do what the desk answers."""
        # Who has nothing to do waits for what has ended to be known.
        if time.monotonic() - self._told < (TELL_SECONDS if worker.tally.running else 0.1):
            return
        if self._answer is not None:
            ready, _ = self._ray.wait([self._answer], timeout=0)
            if not ready:
                return
            self._obey(worker, *self._ray.get(self._answer))
        self._tell(worker)

    def tell(self, worker: Worker) -> None:
        """Tell for the last time."""
        self._tell(worker)
        self._ray.get(self._answer, timeout=CALL_SECONDS)

    def _tell(self, worker: Worker) -> None:
        ended, worker.ended = worker.ended, []
        refused, worker.refused = worker.refused, []
        lines, self._lines.kept = self._lines.kept, []
        self._answer = self._desk.tell.remote(self._name, worker.tally, worker.spare(), ended, refused, lines)
        self._told = time.monotonic()

    def _obey(self, worker: Worker, orders: list[Any], draining: bool) -> None:
        self._draining = draining
        for order in orders:
            if isinstance(order, Leave):
                raise LeaseLostError(f"worker {self._name}: was given up as dead, and others do its rows")
            if isinstance(order, Give):
                self._ray.get(self._desk.gave.remote(self._name, worker.give(order.key)), timeout=CALL_SECONDS)
            else:
                worker.take_back(order.piece, finished=isinstance(order, Merge))
