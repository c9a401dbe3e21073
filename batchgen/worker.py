"""A row's whole way on one engine: read, screen, render, generate, record, journal, and at last the part.

Each step is a generator over the one before, and nothing else touches a row. The engine is kept full across shard
borders: the next shard's rows enter while the last rows of this one still run, so that the batch drains only at the
very end. A shard is committed once all its rows are recorded; until then they stand in its journal.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from batchgen import lease, read, record, screen, write
from batchgen.errors import AcceptanceError, DrainedError, LeaseLostError, OutputConflictError, StoreError
from batchgen.journal import Journal
from batchgen.record import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import pyarrow as pa

    from batchgen.generate import Engine
    from batchgen.read import Columns
    from batchgen.record import Completion, Row, Sampling, Shard
    from batchgen.render import Renderer
    from batchgen.store import Store
    from batchgen.write import Part

log = logging.getLogger("batchgen.worker")

# Rows that need no engine may come by the million: journals, commits and a wish to drain are seen to this often.
LOOK_SECONDS = 1.0
# Drafted tokens after which the acceptance rate is believed: its standard error is then below 0.012.
WARM_UP_DRAFTS = 2000


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What a worker needs to know of the job, beside its shards and its engine.

    `epoch` is the lease's; `again` has the parts, by their shards' keys, whose failed rows are to be done again.
    """

    source: Store
    sink: Store
    output: str
    schema: pa.Schema
    columns: Columns
    sampling: Sampling
    journal_rows: int
    journal_seconds: float
    metadata: Mapping[str, str]
    epoch: int
    again: Mapping[str, str] = dataclasses.field(default_factory=dict)
    worker: str = "0"
    min_acceptance: float | None = None
    below_min: str = "warn"


@dataclasses.dataclass(slots=True)
class Tally:
    """What this run did, for people who watch; the truth is in the files (`report`).

    `resumed` counts the output rows that it found in journals, `standing` those that stay of parts that it replaces.
    """

    ok: int = 0
    error: int = 0
    skipped: int = 0
    resumed: int = 0
    standing: int = 0
    parts: int = 0
    completion_tokens: int = 0
    target_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    running: int = 0
    generated_tokens: int = 0
    generating_s: float = 0.0
    speculation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Output rows that this run recorded or found."""
        return self.ok + self.error + self.skipped + self.resumed + self.standing

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of generation, those of unfinished rows included; None before the first."""
        return self.generated_tokens / self.generating_s if self.generating_s else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens, None when nothing was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per target pass, None before the first pass."""
        return (self.completion_tokens - self.ok) / self.target_steps if self.target_steps else None

    def count(self, completion: Completion) -> None:
        """Add one finished sample."""
        if completion.finish_reason == "error":
            self.error += 1
            return
        self.ok += 1
        self.completion_tokens += len(completion.token_ids)
        self.target_steps += completion.acceptance.target_steps
        self.draft_tokens += completion.acceptance.draft_tokens
        self.accepted_tokens += completion.acceptance.accepted_tokens


@dataclasses.dataclass(slots=True)
class _OpenShard:
    """A shard whose rows are under way; `order` has its row ids in input order, all of them once `read` is set.

    `part` is what the rows will replace, `attempts` how often its failed rows were tried before.
    """

    shard: Shard
    journal: Journal
    part: Part | None
    attempts: dict[tuple[str, int], int]
    order: list[str] = dataclasses.field(default_factory=list)
    read: bool = False

    def complete(self, samples: int) -> bool:
        return self.read and len(self.journal.done) == len(self.order) * samples


class Worker:
    """One engine at work on a stream of shards; `run` it once."""

    def __init__(self, task: Task, engine: Engine, renderer: Renderer) -> None:
        self._task, self._engine, self._renderer = task, engine, renderer
        self._open: list[_OpenShard] = []
        self._rows: dict[tuple[str, int, int], tuple[_OpenShard, Row]] = {}
        self._warned = False
        self.tally = Tally()

    def run(
        self,
        shards: Iterable[Shard],
        *,
        draining: Callable[[], bool] = lambda: False,
        watch: Callable[[Tally], None] = lambda tally: None,
    ) -> Tally:
        """Generate and commit `shards`; `watch` is called after every step.

        Raises:
            DrainedError: `draining` became true; everything finished is in the journals.
            AcceptanceError: acceptance stayed below `min_acceptance` and the job says to fail.
            LeaseLostError: another run took the output over.
        """
        try:
            self._run(self._requests(shards), draining, watch)
        except (StoreError, LeaseLostError):
            raise  # storage has failed for minutes, asking it for more would only take more; or it is not ours to write
        except BaseException:
            # Whatever else ends the run early, what is finished need not be done again.
            for opened in self._open:
                opened.journal.flush()
            raise
        return self.tally

    def _run(
        self, requests: Iterator[Request | None], draining: Callable[[], bool], watch: Callable[[Tally], None]
    ) -> None:
        exhausted = False
        while not exhausted or self._engine.unfinished:
            if draining() and self._open:
                self._drain()
            looked = time.monotonic()
            while self._engine.unfinished < self._engine.capacity:
                try:
                    request = next(requests)
                except StopIteration:
                    exhausted = True
                    break
                if request is not None:
                    self._engine.submit(request)
                elif time.monotonic() - looked > LOOK_SECONDS:
                    break
            self._journal()
            if self._engine.unfinished:
                self._step()
                self._journal()
            watch(self.tally)
        self.tally.speculation = self._engine.report()
        assert not self._open, "every shard is committed when nothing is left to generate"

    def _requests(self, shards: Iterable[Shard]) -> Iterator[Request | None]:
        """Every sample that is still to be generated; None where a row or the end of a shard needs no engine."""
        samples = self._task.sampling.n
        for shard in shards:
            opened = self._claim(shard)
            for row in self._renderer.rows(screen.rows(self._read(opened))):
                for sample in range(samples):
                    if (row.row_id, sample) in opened.journal.done:
                        yield None
                        continue
                    if row.verdict is not None:
                        self._refuse(opened, row, sample)
                        yield None
                        continue
                    assert row.prompt_token_ids is not None
                    key = (shard.key, row.index, sample)
                    self._rows[key] = (opened, row)
                    yield Request(key, row.row_id, sample, row.prompt_token_ids, row.sampling)
            unknown = {row_id for row_id, _ in opened.journal.done}.difference(opened.order)
            if unknown:
                raise OutputConflictError(
                    f"{self._task.output}: the journal of {shard.part_name} holds row {min(unknown)!r}, {shard.file} "
                    f"has no such row; without input.id rows are named by their place below input.path: put that back"
                )
            opened.read = True
            yield None

    def _claim(self, shard: Shard) -> _OpenShard:
        task = self._task
        lease.verify(task.sink, task.output, task.epoch)
        part, again, attempts = None, None, {}
        if shard.key in task.again:
            part = write.load(task.sink, task.again[shard.key], task.schema)
            failed = pc.equal(part.table["status"], "error")
            again = part.commit, part.table.filter(pc.invert(failed))
            rows = part.table.select(["row_id", "sample", "attempts"]).filter(failed).to_pylist()
            attempts = {(row["row_id"], row["sample"]): row["attempts"] for row in rows}
        journal = Journal.claim(
            task.sink,
            task.output,
            shard,
            task.schema,
            worker=task.worker,
            epoch=task.epoch,
            again=again,
            max_rows=task.journal_rows,
            max_seconds=task.journal_seconds,
        )
        opened = _OpenShard(shard, journal, part, attempts)
        self._open.append(opened)
        standing = again[1].num_rows if again else 0
        self.tally.standing += standing
        self.tally.resumed += len(journal.done) - standing
        return opened

    def _read(self, opened: _OpenShard) -> Iterator[Row]:
        for row in read.rows(self._task.source, opened.shard, self._task.columns, self._task.sampling):
            opened.order.append(row.row_id)
            yield row

    def _refuse(self, opened: _OpenShard, row: Row, sample: int) -> None:
        assert row.verdict is not None
        if row.verdict.status == "error":
            self.tally.error += 1
        else:
            self.tally.skipped += 1
        names = {"engine": self._engine.name, "worker": self._task.worker, "shard": opened.shard.key}
        self._add(opened, record.refused(row, row.verdict, sample, **names))

    def _step(self) -> None:
        began = time.perf_counter()
        completions = self._engine.step()
        self.tally.generating_s += time.perf_counter() - began
        self.tally.running = self._engine.running
        self.tally.generated_tokens = self._engine.num_tokens
        for completion in completions:
            opened, row = self._rows.pop(completion.key)  # type: ignore[call-overload]
            self.tally.count(completion)
            names = {"engine": self._engine.name, "worker": self._task.worker, "shard": opened.shard.key}
            self._add(opened, record.finished(row, completion, **names))
        if completions:
            self._gate()

    @staticmethod
    def _add(opened: _OpenShard, row: dict[str, Any]) -> None:
        row["attempts"] += opened.attempts.get((row["row_id"], row["sample"]), 0)
        opened.journal.add(row)

    def _journal(self) -> None:
        """Commit complete shards and journal what has waited long enough."""
        for opened in list(self._open):
            if opened.complete(self._task.sampling.n):
                self._commit(opened)
                self._open.remove(opened)
            elif opened.journal.due(time.monotonic()):
                opened.journal.flush()

    def _commit(self, opened: _OpenShard) -> None:
        """Write the part in input order; that PUT is the commit, after which the journal is of no use."""
        place = {row_id: i for i, row_id in enumerate(opened.order)}
        table = opened.journal.table()
        keys = list(zip(table["row_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
        order = sorted(range(len(keys)), key=lambda i: (place[keys[i][0]], keys[i][1]))
        metadata = {
            **self._task.metadata,
            "file": opened.shard.file,
            "file_version": opened.shard.version,
            "rows": f"{opened.shard.start}-{opened.shard.stop}",
            "lease_epoch": str(self._task.epoch),
        }
        lease.verify(self._task.sink, self._task.output, self._task.epoch)
        rows, sink = table.take(order), self._task.sink
        if opened.part is None:
            mine = write.commit(sink, self._task.output, opened.shard, rows, metadata=metadata)
        else:
            mine = write.replace(sink, opened.part, opened.shard, rows, metadata=metadata)
        opened.journal.remove()
        self.tally.parts += 1
        what = "committed" if mine else "already committed by another run; this one's rows are dropped:"
        log.info("part %s %s", what, opened.shard.part_name)

    def _drain(self) -> None:
        kept = sum(len(opened.journal.done) for opened in self._open)
        raise DrainedError(
            f"drained: {kept} rows of {len(self._open)} unfinished shards are journalled in {self._task.output}; "
            f"the same command goes on from there"
        )

    def _gate(self) -> None:
        rate, floor = self.tally.acceptance_rate, self._task.min_acceptance
        if floor is None or rate is None or self._warned or self.tally.draft_tokens < WARM_UP_DRAFTS or rate >= floor:
            return
        self._warned = True
        found = f"acceptance rate {rate:.3f} after {self.tally.draft_tokens} drafted tokens"
        rule = f"speculation.min_acceptance {floor}"
        if self._task.below_min == "fail":
            raise AcceptanceError(f"{found} is below {rule}; finished rows are journalled")
        if self._task.below_min == "disable":
            self._engine.stop_speculating()
            log.warning("%s is below %s: decoding plainly from here on", found, rule)
        else:
            log.warning("%s is below %s", found, rule)
