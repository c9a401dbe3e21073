"""Where workers run: one in this process, more as Ray actors (`actors`), here or on a cluster.

Ray starts processes, places them on GPUs, carries calls and says who died; hand-out is `desk`'s, and that no row is
lost or doubled is the journals' and parts' alone. Actors are never restarted by Ray: a dead one's shards go back to the
desk, and a new actor takes its place. A hang Ray does not see: a worker that makes no step for
`workers.silent_seconds` is killed. Nothing is killed before it answered once, which would leak its place (ray issue
17369). A local Ray listens on loopback only and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen import __version__, engines
from batchgen.actors import CALL_SECONDS, DeskActor, Look, WorkerActor
from batchgen.errors import (
    BatchgenError,
    ClusterError,
    ClusterLostError,
    DrainedError,
    EngineError,
    LeaseLostError,
    ModelError,
    SpecError,
)
from batchgen.tally import Tally, together
from batchgen.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchgen.attempt import Task
    from batchgen.record import Shard
    from batchgen.spec import Spec
    from batchgen.worker import Kit

log = logging.getLogger("batchgen.cluster")

# A preempted machine has 30 s, of which the end of workers and of Ray takes some.
DRAIN_SECONDS = 18.0
# Deaths in a row, for each of up to four workers, without one finished row in between: it is not the rows, then.
DEATHS_IN_A_ROW = 12
# Workers that died on one node before they had an engine: it is the node, then, and others take its place.
FALLEN_ON_A_NODE = 3


def run(
    task: Task,
    shards: Sequence[Shard],
    kit: Kit,
    costs: Path,
    *,
    draining: Callable[[], bool],
    watch: Callable[[Tally], None],
) -> Tally:
    """Generate and commit `shards`.

    Raises:
        ClusterError: Ray does not start, or no worker can be; finished rows are journalled.
        ClusterLostError: Ray is gone; finished rows are journalled.
        BatchgenError: what `worker.Worker.run` and `engines.build` raise.
    """
    if kit.spec.on_ray:
        return _Crew(task, shards, kit.spec, costs).run(draining, watch)
    engine = kit.engine(costs)
    try:
        return Worker(task, engine, kit.renderer, kit.screen).run(shards, draining=draining, watch=watch)
    finally:
        engine.close()


@dataclasses.dataclass(slots=True)
class _Hand:
    """A worker as the driver sees it: `waiting` for its first answer, then at work."""

    name: str
    actor: Any
    waiting: Any
    since: float
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class _Crew:
    """The driver's side: hires workers, watches them, replaces the dead."""

    def __init__(self, task: Task, shards: Sequence[Shard], spec: Spec, costs: Path) -> None:
        self._task, self._shards, self._costs = task, shards, costs
        self._spec, device = _pinned(spec)
        gpus = spec.workers.gpus
        self._gpus = gpus if gpus is not None else float(device == "cuda")
        rows = sum(shard.num_rows for shard in shards) * spec.sampling.n
        self._count = min(spec.workers.count, max(1, math.ceil(rows / spec.batch_size)))
        # A cluster's nodes may have other cores than this one.
        share = 1 if self._gpus or spec.workers.address else max(1, len(os.sched_getaffinity(0)) // self._count)
        self._cpus = spec.workers.cpus or share
        self._hands: dict[Any, _Hand] = {}
        self._num_hired = self._deaths = self._finished = 0
        self._finals: dict[str, Tally] = {}
        self._fallen: Counter[str] = Counter()  # by node
        self._ray: Any = None
        self._desk: Any = None

    def run(self, draining: Callable[[], bool], watch: Callable[[Tally], None]) -> Tally:
        """See `cluster.run`."""
        with _started(self._spec.workers.address, self._cpus * self._count) as self._ray:
            from ray.exceptions import GetTimeoutError, RayError

            try:
                node = self._ray.get_runtime_context().get_node_id()
                on = self._on(node)
                self._desk = self._ray.remote(num_cpus=0, scheduling_strategy=on)(DeskActor).remote(self._shards)
                try:
                    return self._run(draining, watch)
                except LeaseLostError:
                    raise
                except BatchgenError:
                    self._drain()
                    raise
            except (RayError, GetTimeoutError) as error:
                raise ClusterLostError(
                    f"Ray: {_first_line(error)}; finished rows are journalled, run the same command again"
                ) from error
            finally:
                self._end(*self._hands.values())

    def _run(self, draining: Callable[[], bool], watch: Callable[[Tally], None]) -> Tally:
        while True:
            while len(self._hands) < self._count:
                self._hire()
            self._listen(1.0)
            look = self._look()
            total = together((look.tallies | self._finals).values())
            watch(total)
            if look.over:
                return self._finish()
            if draining():
                output = self._task.output
                raise DrainedError(f"drained: what is finished is journalled in {output}; the same command goes on")
            self._replace_silent(look)

    def _finish(self) -> Tally:
        """Hear the last word of who has worked; who has not is not waited for."""
        until = time.monotonic() + CALL_SECONDS
        told = self._look().tallies
        left = {ref: hand for ref, hand in self._hands.items() if hand.name in told}
        while left and time.monotonic() < until:
            for ref in self._ready(list(left), 1.0):
                hand = left.pop(ref)
                try:
                    self._finals[hand.name] = self._ray.get(ref)
                except self._ray.exceptions.RayError as error:
                    log.warning("worker %s, when all was done: %s", hand.name, _first_line(error))
        return together((self._look().tallies | self._finals).values())

    def _hire(self) -> None:
        name = str(self._num_hired)
        self._num_hired += 1
        shunned = self._shunned()
        where = {"label_selector": {"ray.io/node-id": f"!in({','.join(shunned)})"}} if shunned else {}
        remote = self._ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, max_task_retries=0, **where)
        actor = remote(WorkerActor).remote()
        hand = _Hand(name, actor, actor.hello.remote(), time.monotonic())
        self._hands[hand.waiting] = hand

    def _ready(self, refs: list[Any], timeout_s: float) -> list[Any]:
        """Those that have an answer, once one has."""
        self._ray.wait(refs, num_returns=1, timeout=timeout_s)
        ready: list[Any] = self._ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        return ready

    def _listen(self, timeout_s: float) -> None:
        """Hear who has answered or died."""
        errors = self._ray.exceptions
        for ref in self._ready(list(self._hands), timeout_s):
            hand = self._hands.pop(ref)
            try:
                answer = self._ray.get(ref)
            except errors.RayTaskError as error:  # before RayError, as which it may come, too
                cause = error.cause
                if isinstance(cause, BatchgenError) and not self._only_there(hand, cause):
                    self._ray.get(self._desk.lost.remote(hand.name), timeout=CALL_SECONDS)
                    raise cause from None
                if not isinstance(cause, BatchgenError):
                    log.warning("worker %s: %s", hand.name, error)  # with its traceback
                self._end(hand)
                self._died(hand, f"{type(cause).__name__}: {cause}")
            except errors.RayError as error:
                if not isinstance(error, errors.ActorDiedError):
                    self._end(hand)  # it may live, and be out of reach only
                self._died(hand, _first_line(error))
            else:
                self._answered(hand, answer)

    def _only_there(self, hand: _Hand, error: BatchgenError) -> bool:
        """Whether it is a matter of one worker's machine, because others have got on."""
        return isinstance(error, ModelError | EngineError) and bool(self._look().tallies.keys() - {hand.name})

    def _answered(self, hand: _Hand, answer: Any) -> None:
        if isinstance(answer, Tally):
            self._finals[hand.name] = answer
            self._ray.kill(hand.actor)
            return
        if answer["version"] != __version__:
            raise ClusterError(
                f"{answer['host']} has batchgen {answer['version']}, this machine {__version__}; install the same"
            )
        hand.facts, hand.since = answer, time.monotonic()
        self._ray.get(self._desk.join.remote(hand.name), timeout=CALL_SECONDS)
        task = dataclasses.replace(self._task, worker=hand.name)
        hand.waiting = hand.actor.work.remote(self._desk, task, self._spec, self._costs)
        self._hands[hand.waiting] = hand

    def _died(self, hand: _Hand, why: str) -> None:
        self._ray.get(self._desk.lost.remote(hand.name), timeout=CALL_SECONDS)
        where = f" on {hand.facts['host']}" if hand.facts else ""
        log.warning("worker %s%s died: %s; its unfinished rows go to others", hand.name, where, why)
        look = self._look()
        if hand.facts and hand.name not in look.tallies:
            self._fallen[hand.facts["node"]] += 1
            if self._fallen[hand.facts["node"]] == FALLEN_ON_A_NODE:
                log.warning("%d workers died%s before they had an engine; others go elsewhere", FALLEN_ON_A_NODE, where)
        finished = sum(tally.ok for tally in look.tallies.values())
        self._deaths = 1 if finished > self._finished else self._deaths + 1
        self._finished = finished
        if self._deaths >= DEATHS_IN_A_ROW * min(self._count, 4):
            raise EngineError(
                f"workers died {self._deaths} times and finished no row in between, the last one of: {why}; finished "
                f"rows are journalled"
            )

    def _shunned(self) -> list[str]:
        """Nodes where workers die before they work, if there are others."""
        fallen = {node for node, deaths in self._fallen.items() if deaths >= FALLEN_ON_A_NODE}
        return sorted(fallen) if {node["NodeID"] for node in self._ray.nodes() if node["Alive"]} - fallen else []

    def _replace_silent(self, look: Look) -> None:
        limits = self._spec.workers
        for ref, hand in list(self._hands.items()):
            waited = time.monotonic() - hand.since
            if not hand.facts:
                if waited > limits.start_seconds and not any(other.facts for other in self._hands.values()):
                    asked = f"{self._gpus:g} GPUs" if self._gpus else "cores"
                    raise ClusterError(
                        f"no worker found a place within {waited:.0f} s: each asks for {asked}, and Ray has "
                        f"{self._ray.cluster_resources()}; see workers.gpus and workers.cpus"
                    )
            elif hand.name in look.tallies:
                if look.silent_s.get(hand.name, 0.0) > limits.silent_seconds:
                    self._give_up(ref, f"made no step for {limits.silent_seconds:.0f} s (workers.silent_seconds)")
            elif waited > limits.start_seconds:
                self._give_up(ref, f"loaded no engine within {limits.start_seconds:.0f} s (workers.start_seconds)")

    def _give_up(self, ref: Any, why: str) -> None:
        hand = self._hands.pop(ref)
        self._end(hand)
        self._died(hand, why)

    def _end(self, *hands: _Hand) -> None:
        """Kill workers' processes; Ray would leave one that is stopped, and its memory of the GPU."""
        kills = []
        for hand in hands:
            if hand.facts:  # the others end with Ray, or when the driver does
                with contextlib.suppress(Exception):
                    self._ray.kill(hand.actor)
                    on = self._on(hand.facts["node"])
                    kill = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on)(_kill)
                    kills.append(kill.remote(hand.facts["pid"]))
        if kills:
            with contextlib.suppress(Exception):
                self._ray.wait(kills, num_returns=len(kills), timeout=5)

    def _drain(self) -> None:
        """Let workers journal what is finished."""
        self._ray.get(self._desk.drain.remote(), timeout=CALL_SECONDS)
        until = time.monotonic() + DRAIN_SECONDS
        # Who has no engine yet has nothing to journal.
        told = self._look().tallies
        left = [ref for ref, hand in self._hands.items() if hand.name in told]
        while left and time.monotonic() < until:
            _, left = self._ray.wait(left, num_returns=len(left), timeout=1.0)
        self._look()
        if left:
            log.warning("%d workers did not drain within %.0f s", len(left), DRAIN_SECONDS)

    def _look(self) -> Look:
        look: Look = self._ray.get(self._desk.look.remote(), timeout=CALL_SECONDS)
        for name, level, text in look.lines:
            log.log(level, "worker %s: %s", name, text)
        return look

    @staticmethod
    def _on(node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node, soft=False)


def _pinned(spec: Spec) -> tuple[Spec, str]:
    """The spec with what a node could decide otherwise decided here, and the device."""
    if spec.engine.kind == "rehearsal":
        return spec, "cpu"
    device, dtype = engines.device(spec), engines.dtype(spec)
    local = {
        name: str(Path(path).absolute())
        for name, path in (("target", spec.model.target), ("draft", spec.model.draft))
        if path and Path(path).exists()
    }
    model = spec.model.model_copy(update=local | {"dtype": dtype})
    return spec.model_copy(update={"model": model, "engine": spec.engine.model_copy(update={"device": device})}), device


@contextlib.contextmanager
def _started(address: str | None, num_cpus: int) -> Iterator[Any]:
    """Ray, a cluster's or a local one of at least so many logical cores; gone when left."""
    folder = None
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if address is None:
        # By this odd name Ray listens on loopback only.
        quiet |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise SpecError(
            "workers: more than one, or those of a cluster, need Ray: pip install 'batchgen[ray]'"
        ) from error
    settings: dict[str, Any] = {"address": address or "local"}
    # Ray takes the handlers of signals for its own.
    ours = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in ours}
    try:
        if address is None:
            # Its sockets' paths are short enough only right below /tmp.
            folder = tempfile.mkdtemp(prefix=f"batchgen-{os.getpid()}-", dir="/tmp")
            _tidy(Path(folder))
            settings |= {
                "num_cpus": max(len(os.sched_getaffinity(0)), num_cpus),
                "include_dashboard": False,
                "object_store_memory": 80 * 2**20,
                "_temp_dir": folder,
            }
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
        except BatchgenError:  # a drain, out of the handler of a signal
            raise
        except SystemExit as error:
            raise DrainedError("drained while Ray was starting; nothing was begun") from error
        except Exception as error:
            raise ClusterError(f"workers: Ray does not start: {_first_line(error)}") from error
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield ray
    finally:
        ray.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _tidy(mine: Path) -> None:
    """Remove the folders of drivers that were killed; Ray's last process of one lives on for a minute."""
    for folder in mine.parent.glob("batchgen-*-*"):
        with contextlib.suppress(OSError, ValueError):
            facts = folder.lstat()
            dead = not Path(f"/proc/{int(folder.name.split('-')[1])}").exists()
            if dead and facts.st_uid == os.getuid() and time.time() - facts.st_mtime > 120:
                shutil.rmtree(folder, ignore_errors=True)


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        # By now the number may be another's.
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
