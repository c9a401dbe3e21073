"""How far a job is, from files alone: parts that stand, rows journalled in shards that do not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from batchgen import journal, write

if TYPE_CHECKING:
    from batchgen.plan import Plan
    from batchgen.store import Store


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """Shards and output rows (input rows x samples) done, journalled and in all."""

    shards: int
    shards_done: int
    rows: int
    rows_done: int
    rows_journalled: int


def status(store: Store, output: str, plan: Plan, samples: int) -> Status:
    """One listing of the output folder, and one of its journal."""
    found = write.parts(store, output)
    done = [shard for shard in plan.shards if shard.key in found]
    open_rows = {shard.key: shard.num_rows * samples for shard in plan.shards if shard.key not in found}
    journalled = journal.pending(store, output)
    return Status(
        shards=len(plan.shards),
        shards_done=len(done),
        rows=plan.num_rows * samples,
        rows_done=sum(shard.num_rows for shard in done) * samples,
        # Rows that are judged anew by each run are in there more than once.
        rows_journalled=sum(min(rows, open_rows[key]) for key, rows in journalled.items() if key in open_rows),
    )
