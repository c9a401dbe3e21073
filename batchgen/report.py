"""What a job produced, read back from its parts: counts, acceptance, and whether every input row stands there once.

Reads files, never counters: a run that lost its counters to a crash reports the same as one that did not.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen import write
from batchgen.store import STATE_FOLDER
from batchgen.tally import Rates

if TYPE_CHECKING:
    import polars as pl

    from batchgen.plan import Plan
    from batchgen.store import Store

SUMMARY = f"{STATE_FOLDER}/summary.json"
_KEY = ["row_id", "sample"]
_SUMS = [
    "prompt_tokens",
    "completion_tokens",
    "target_steps",
    "draft_steps",
    "draft_tokens",
    "accepted_tokens",
]
_COLUMNS = [*_KEY, "status", "error_type", *_SUMS, "accepted_per_depth"]


@dataclasses.dataclass(slots=True)
class Summary(Rates):
    """Totals over a job's parts. `problems` says what does not reconcile, one line each; empty means all is there."""

    expected_rows: int
    ok: int = 0
    error: int = 0
    skipped: int = 0
    parts: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    target_steps: int = 0
    draft_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_depth: list[int] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> int:
        """Output rows found."""
        return self.ok + self.error + self.skipped

    @property
    def error_rate(self) -> float:
        """Share of output rows that are errors, 0 without rows."""
        return self.error / self.rows if self.rows else 0.0

    def as_json(self) -> dict[str, Any]:
        """All fields and rates, for summary.json and `--log json`."""
        rates = ("rows", "error_rate", "acceptance_rate", "acceptance_length")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in rates}


def summarise(store: Store, output: str, plan: Plan, samples: int) -> Summary:
    """Read every part of `plan` and reconcile: input rows x samples == ok + error + skipped, each key once.

    Raises:
        StoreError: the storage kept failing; a damaged part is a problem of the summary instead.
    """
    found = write.parts(store, output)
    summary = Summary(expected_rows=plan.num_rows * samples)
    missing = [shard for shard in plan.shards if shard.key not in found]
    if missing:
        names = ", ".join(shard.part_name for shard in missing[:3])
        summary.problems.append(f"{len(missing)} of {len(plan.shards)} parts are missing: {names}")
    reasons: collections.Counter[str] = collections.Counter()
    hashes: dict[str, pl.Series] = {}
    for shard in plan.shards:
        if shard.key not in found:
            continue
        url = found[shard.key]
        try:
            table = _read(store, url, _COLUMNS)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            cause = str(error).partition("\n")[0][:200]
            summary.problems.append(f"{url}: does not read back ({cause}); remove it and submit again")
            continue
        summary.parts += 1
        if table.num_rows != shard.num_rows * samples:
            expected = shard.num_rows * samples
            summary.problems.append(f"{url}: {table.num_rows} rows, expected {expected}")
        hashes[url] = _hashes(table)
        _add(summary, reasons, table)
    num_doubled, examples = _doubled(store, hashes)
    if num_doubled:
        summary.problems.append(
            f"{num_doubled} rows share their id and sample with another ({', '.join(examples)}); "
            f"input.id must be unique over all files"
        )
    if summary.rows != summary.expected_rows and not summary.problems:
        summary.problems.append(f"{summary.rows} rows in the parts, expected {summary.expected_rows}")
    summary.reasons = dict(reasons.most_common())
    return summary


def _read(store: Store, url: str, columns: list[str]) -> pa.Table:
    with store.open(url) as stream:
        table = pq.ParquetFile(stream, page_checksum_verification=True).read(columns=columns)
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise pa.ArrowInvalid(f"it has no column {missing[0]}")
    return table


def _hashes(table: pa.Table) -> pl.Series:
    """8 bytes for each (row_id, sample): what a job of a hundred million rows can keep in memory."""
    import polars as pl  # not needed to start the command line

    frame = pl.from_arrow(table.select(_KEY))
    assert isinstance(frame, pl.DataFrame)
    return frame.hash_rows()


def _doubled(store: Store, hashes: dict[str, pl.Series]) -> tuple[int, list[str]]:
    """How many rows have the key of an earlier one, and up to three of their ids; `hashes` by part."""
    import polars as pl

    every = pl.concat(list(hashes.values())) if hashes else pl.Series([], dtype=pl.UInt64)
    suspects = every.filter(every.is_duplicated()).unique()
    if suspects.is_empty():
        return 0, []
    # Different keys may share a hash, so the keys themselves have the last word.
    frames = []
    for url, part in hashes.items():
        suspect = part.is_in(suspects.implode())
        if suspect.any():
            frame = pl.from_arrow(_read(store, url, _KEY))
            assert isinstance(frame, pl.DataFrame)
            frames.append(frame.filter(suspect))
    counts = pl.concat(frames).group_by(_KEY).len().filter(pl.col("len") > 1)
    return int((counts["len"] - 1).sum()), sorted(set(counts["row_id"]))[:3]


def _add(summary: Summary, reasons: collections.Counter[str], table: pa.Table) -> None:
    is_ok = pc.fill_null(pc.equal(table["status"], "ok"), fill_value=False)
    ok, rest = table.filter(is_ok), table.filter(pc.invert(is_ok))
    for row in rest.group_by(["status", "error_type"]).aggregate([([], "count_all")]).to_pylist():
        reasons[f"{row['status']}: {row['error_type']}"] += row["count_all"]
        if row["status"] == "error":
            summary.error += row["count_all"]
        else:
            summary.skipped += row["count_all"]
    summary.ok += ok.num_rows
    for name in _SUMS:
        setattr(summary, name, getattr(summary, name) + (pc.sum(ok[name]).as_py() or 0))
    depths = ok["accepted_per_depth"]
    deepest = pc.max(pc.list_value_length(depths)).as_py() or 0
    summary.accepted_per_depth += [0] * (deepest - len(summary.accepted_per_depth))
    for depth in range(deepest):
        summary.accepted_per_depth[depth] += pc.sum(pc.list_flatten(pc.list_slice(depths, depth, depth + 1))).as_py()


def save(store: Store, output: str, summary: Summary, facts: dict[str, Any]) -> None:
    """Write summary.json, replacing the last run's."""
    text = json.dumps(summary.as_json() | facts, indent=2)
    store.put(f"{output.rstrip('/')}/{SUMMARY}", text.encode())


def load(store: Store, output: str) -> dict[str, Any] | None:
    """The last run's summary.json, None when there is none."""
    try:
        summary: dict[str, Any] = json.loads(store.read(f"{output.rstrip('/')}/{SUMMARY}"))
    except FileNotFoundError:
        return None
    return summary
