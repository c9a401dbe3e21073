"""One attempt at one shard, or at a piece of another worker's: its journal, what is begun, given away and recorded.

`Task` is what every worker knows of the job. The worker (`worker`) moves rows; here is what it keeps of each shard that
is open, from the claim to the part.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen import dedupe, lease, read, write
from batchgen.errors import OutputConflictError
from batchgen.journal import Journal
from batchgen.record import Piece

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchgen.columns import Columns
    from batchgen.record import Row, Sampling, Shard
    from batchgen.store import Store
    from batchgen.write import Part

log = logging.getLogger("batchgen.attempt")

# From so many deaths on every finished row is journalled at once.
WATCHED_FROM = 2
LEAST_SUSPECTS = 8
# Rows of a piece, in batches of the engine.
PIECE_BATCHES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What a worker needs to know of the job, beside its shards and its engine.

    `epoch` is the lease's; `again` has the parts, by their shards' keys, whose failed rows are to be done again;
    `dedupe` is what `dedupe.mark` has noted of rows that repeat others.
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
    dedupe: dedupe.Kind | None = None


class Source:
    """The rows of one shard after another, with verdicts for those that repeat others."""

    def __init__(self, task: Task) -> None:
        self._task, self._reader = task, read.Reader(task.source)
        self._noted = None
        if task.dedupe is not None:
            self._noted = dedupe.Noted(task.sink, task.output, task.columns, task.sampling, task.dedupe)

    def rows(self, shard: Shard) -> Iterator[Row]:
        """The rows of `shard`; raises as `read.Reader.rows` and `dedupe.Noted.judged`."""
        rows = self._reader.rows(shard, self._task.columns, self._task.sampling)
        return rows if self._noted is None else self._noted.judged(rows, shard)


class Attempt:
    """A shard whose rows are under way, from its claim on; or a `piece` of one.

    `standing` rows are those that stay of the part that this one is to replace. While it is `suspicious`, because the
    rows that may have killed a worker are not finished, no more than `at_once` rows may run.
    """

    def __init__(
        self,
        task: Task,
        shard: Shard,
        journal: Journal,
        capacity: int,
        source: Source,
        *,
        piece: Piece | None = None,
    ) -> None:
        self.shard, self.journal, self.piece = shard, journal, piece
        self.standing = 0
        # 64, 64, 16, 4, 1: being killed once says little of a row.
        self.at_once = _at_once(capacity, journal.deaths)
        # What was running at the last death, or finished and not journalled: where all are watched, hardly more rows.
        # Some more make it unlikely that kills from outside hit one row again and again.
        before = _at_once(capacity, journal.deaths - 1)
        watched = journal.deaths > WATCHED_FROM
        self._unseen = (
            (max(2 * before, LEAST_SUSPECTS) if watched else capacity + task.journal_rows) if journal.deaths else 0
        )
        self._suspects: set[tuple[str, int]] = set()
        self.suspicious = journal.deaths > 0
        self.returned: list[Piece] = []
        self.running = 0
        self._task, self._capacity, self._source = task, capacity, source
        # Rows before the cursor are begun, those from the limit on belong to helpers.
        self._cursor, self._limit = (shard.start, shard.stop) if piece is None else (0, 0)
        self._given = 0
        self._part: Part | None = None
        self._attempts: dict[tuple[str, int], int] = {}
        self._order: list[str] = []
        self._read = False

    @classmethod
    def claim(cls, task: Task, shard: Shard, capacity: int, source: Source) -> Attempt | None:
        """Begin, with the rows that earlier attempts journalled; None if there is nothing to do.

        `capacity` is the engine's. A worker may have died between committing the shard and telling so.

        Raises:
            LeaseLostError: another run took the output over.
            CorruptOutputError, OutputConflictError: as `journal.Journal.claim`.
        """
        lease.verify(task.sink, task.output, task.epoch)
        part, again, attempts = None, None, {}
        if shard.key in task.again:
            part = write.load(task.sink, task.again[shard.key], task.schema)
            failed = pc.equal(part.table["status"], "error")
            again = part.commit, part.table.filter(pc.invert(failed))
            rows = part.table.select(["row_id", "sample", "attempts"]).filter(failed).to_pylist()
            attempts = {(row["row_id"], row["sample"]): row["attempts"] for row in rows}
        elif write.standing(task.sink, task.output, shard):
            return None
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
        made = cls(task, shard, journal, capacity, source)
        made._part, made._attempts = part, attempts
        made.standing = again[1].num_rows if again else 0
        if journal.deaths > 1:
            where = f"rows {shard.start} to {shard.stop} of {shard.file}"
            log.warning("%s: workers died %d times there; %d at once now", where, journal.deaths, made.at_once)
        return made

    @classmethod
    def join(cls, task: Task, piece: Piece, capacity: int, source: Source) -> Attempt | None:
        """Help with a shard of another worker; None if that worker's attempt is over."""
        journal = Journal.join(
            task.sink,
            task.output,
            piece,
            task.schema,
            max_rows=task.journal_rows,
            max_seconds=task.journal_seconds,
        )
        return None if journal is None else cls(task, piece.shard, journal, capacity, source, piece=piece)

    @property
    def complete(self) -> bool:
        """Whether every row is recorded."""
        if self.piece is not None:
            return self._read and not self.running
        samples = len(self._order) * self._task.sampling.n
        return self._read and not self._given and len(self.journal.done) == samples

    @property
    def due(self) -> bool:
        """Whether what is recorded should be journalled now."""
        # Of a worker that may die any moment, every finished row counts.
        return self.journal.due(time.monotonic()) or (self.suspicious and self.journal.deaths >= WATCHED_FROM)

    @property
    def spare(self) -> int:
        """Rows that a helper could have."""
        # Of a shard that may hold a row which kills workers, each row runs where it is watched.
        return 0 if self.piece or self._part or self.suspicious else self._limit - self._cursor

    @property
    def others_begun(self) -> bool:
        """Whether all rows run or are done that may have killed a worker, but for one."""
        return self._unseen <= 1

    def rows(self) -> Iterator[Row]:
        """The rows to generate, in input order, without those that are given away meanwhile.

        Raises:
            OutputConflictError: the journal holds a row that the input has not.
        """
        task = self._task
        if self.piece is not None:
            yield from self.again(self.piece)
        else:
            for row in self._source.rows(self.shard):
                self._order.append(row.row_id)
                if row.index < self._limit:
                    self._cursor = row.index + 1
                    yield row
            unknown = {row_id for row_id, _ in self.journal.done}.difference(self._order)
            if unknown:
                raise OutputConflictError(
                    f"{task.output}: the journal of {self.shard.part_name} holds row {min(unknown)!r}, "
                    f"{self.shard.file} has no such row; without input.id rows are named by their place below "
                    f"input.path: put that back"
                )

    def all_begun(self) -> None:
        """Everything that `rows` gave has been submitted or recorded."""
        self._read = True

    def again(self, piece: Piece) -> Iterator[Row]:
        """The rows of a piece; all before them are read, because ids are made unique in their order."""
        upto = dataclasses.replace(self.shard, stop=piece.stop)
        for row in self._source.rows(upto):
            if row.index >= piece.start:
                yield row

    def give(self) -> Piece | None:
        """Give up the end of what is not begun, at most half; None when that is nothing."""
        # A helper cannot give in turn: many small pieces let many help.
        num = min(self.spare // 2, PIECE_BATCHES * self._capacity)
        if num == 0:
            return None
        self._limit, stop = self._limit - num, self._limit
        self._given += 1
        return Piece(self.shard, self._limit, stop, self.journal.claim_name, uuid.uuid4().hex[:12])

    def take_back(self, piece: Piece, *, finished: bool) -> None:
        """Take in what the helper of `piece` journalled; what it did not finish comes back as `returned`."""
        self.journal.merge(piece)
        if finished:
            self._given -= 1
        else:
            self.returned.append(piece)

    def done_again(self) -> None:
        """A returned piece has been submitted."""
        self._given -= 1

    def begin(self, key: tuple[str, int]) -> None:
        """The sample of this row is about to run."""
        if self._unseen:
            self._unseen -= 1
            self._suspects.add(key)
        if self.suspicious and self.at_once == 1:
            self.journal.trying(key)

    def record(self, row: dict[str, Any]) -> None:
        """Keep one finished output row."""
        key = row["row_id"], row["sample"]
        row["attempts"] += self._attempts.get(key, 0)
        self.journal.add(row)
        self._suspects.discard(key)
        if self.suspicious and not self._unseen and not self._suspects:
            self.suspicious = False
            self.journal.flush()
            self.journal.passed()

    def commit(self) -> None:
        """Write the part in input order; that PUT is the commit, after which the journal is of no use.

        Raises:
            LeaseLostError: another run took the output over.
            CorruptOutputError: as `write.commit`.
        """
        task, shard = self._task, self.shard
        place = {row_id: i for i, row_id in enumerate(self._order)}
        table = self.journal.table()
        keys = list(zip(table["row_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
        order = sorted(range(len(keys)), key=lambda i: (place[keys[i][0]], keys[i][1]))
        metadata = {
            **task.metadata,
            "file": shard.file,
            "file_version": shard.version,
            "rows": f"{shard.start}-{shard.stop}",
            "lease_epoch": str(task.epoch),
        }
        lease.verify(task.sink, task.output, task.epoch)
        rows = _in_order(table, order)
        if self._part is None:
            mine = write.commit(task.sink, task.output, shard, rows, metadata=metadata)
        else:
            mine = write.replace(task.sink, self._part, shard, rows, metadata=metadata)
        self.journal.remove()
        what = "committed" if mine else "already committed by another run; this one's rows are dropped:"
        log.info("part %s %s", what, shard.part_name)


def _in_order(table: pa.Table, order: list[int]) -> pa.Table:
    # `take` joins the pieces of each column first, and strings beyond 2 GiB fit into no one piece.
    if table.nbytes < 1 << 30:
        return table.take(order)
    return pa.concat_tables([table.slice(i, 1) for i in order])


def _at_once(capacity: int, deaths: int) -> int:
    """How many rows run after so many deaths."""
    return max(1, capacity >> 2 * max(0, deaths - 1))
