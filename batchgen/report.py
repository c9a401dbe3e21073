"""What a job produced, read back from its parts: counts, acceptance, and whether every input row stands there once.

Reads files, never counters: a run that lost its counters to a crash reports the same as one that did not.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from batchgen import write
from batchgen.store import STATE_FOLDER

if TYPE_CHECKING:
    from batchgen.plan import Plan
    from batchgen.store import Store

SUMMARY = f"{STATE_FOLDER}/summary.json"
_COLUMNS = [
    "row_id",
    "sample",
    "status",
    "error_type",
    "prompt_tokens",
    "completion_tokens",
    "target_steps",
    "draft_steps",
    "draft_tokens",
    "accepted_tokens",
    "accepted_per_depth",
]


@dataclasses.dataclass(slots=True)
class Summary:
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

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens (alpha), None when nothing was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per target pass after prefill, the bonus token included; None without passes."""
        return (self.completion_tokens - self.ok) / self.target_steps if self.target_steps else None

    def as_json(self) -> dict[str, Any]:
        """All fields and rates, for summary.json and `--log json`."""
        rates = ("rows", "error_rate", "acceptance_rate", "acceptance_length")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in rates}


def summarise(store: Store, output: str, plan: Plan, samples: int) -> Summary:
    """Read every part of `plan` and reconcile: input rows x samples == ok + error + skipped, each key once."""
    found = write.parts(store, output)
    summary = Summary(expected_rows=plan.num_rows * samples)
    missing = [shard for shard in plan.shards if shard.key not in found]
    if missing:
        names = ", ".join(shard.part_name for shard in missing[:3])
        summary.problems.append(f"{len(missing)} of {len(plan.shards)} parts are missing: {names}")
    reasons: collections.Counter[str] = collections.Counter()
    keys: set[tuple[str, int]] = set()
    doubled: list[str] = []
    for shard in plan.shards:
        if shard.key not in found:
            continue
        with store.open(found[shard.key]) as f:
            rows = pq.ParquetFile(f, page_checksum_verification=True).read(columns=_COLUMNS).to_pylist()
        summary.parts += 1
        if len(rows) != shard.num_rows * samples:
            expected = shard.num_rows * samples
            summary.problems.append(f"{found[shard.key]}: {len(rows)} rows, expected {expected}")
        for row in rows:
            key = (row["row_id"], row["sample"])
            if key in keys:
                doubled.append(row["row_id"])
            keys.add(key)
            _add(summary, reasons, row)
    if doubled:
        summary.problems.append(
            f"{len(doubled)} rows share their id and sample with another ({', '.join(sorted(set(doubled))[:3])}); "
            f"input.id must be unique over all files"
        )
    if summary.rows != summary.expected_rows and not summary.problems:
        summary.problems.append(f"{summary.rows} rows in the parts, expected {summary.expected_rows}")
    summary.reasons = dict(reasons.most_common())
    return summary


def _add(summary: Summary, reasons: collections.Counter[str], row: dict[str, Any]) -> None:
    if row["status"] != "ok":
        reasons[f"{row['status']}: {row['error_type']}"] += 1
        if row["status"] == "error":
            summary.error += 1
        else:
            summary.skipped += 1
        return
    summary.ok += 1
    for name in (
        "prompt_tokens",
        "completion_tokens",
        "target_steps",
        "draft_steps",
        "draft_tokens",
        "accepted_tokens",
    ):
        setattr(summary, name, getattr(summary, name) + (row[name] or 0))
    depths = row["accepted_per_depth"] or []
    summary.accepted_per_depth += [0] * (len(depths) - len(summary.accepted_per_depth))
    for depth, accepted in enumerate(depths):
        summary.accepted_per_depth[depth] += accepted


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
