"""What a job produced, read back from its parts: counts, acceptance, and whether every input row stands there once.

Reads files, never counters: a run that lost its counters to a crash reports the same as one that did not.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen import write
from batchgen.errors import StoreError
from batchgen.store import STATE_FOLDER
from batchgen.tally import Rates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import polars as pl

    from batchgen.plan import Plan
    from batchgen.store import Entry, Store

log = logging.getLogger("batchgen.report")

SUMMARY = f"{STATE_FOLDER}/summary.json"
# Parquet, but not named so: `**/*.parquet` over an output folder must not find it.
RECONCILED = f"{STATE_FOLDER}/reconciled"
_KEY = ["row_id", "sample"]
_SUMS = [
    "prompt_tokens",
    "completion_tokens",
    "target_steps",
    "draft_steps",
    "draft_tokens",
    "accepted_tokens",
    "lookup_tokens",
    "accepted_lookup_tokens",
]
# Of rows that are conversations.
_LEAF = "answers.list.element.start"
_DEPTHS = ["drafted_per_depth", "accepted_per_depth"]
_COLUMNS = [*_KEY, "status", "error_type", *_SUMS, *_DEPTHS]
# Of each part that was read once, in `RECONCILED`; "hashes" are those of its keys.
_FACTS = {"ok", "error", "skipped", "answers", *_SUMS, "reasons", *_DEPTHS, "hashes"}
# 8 bytes each; where there are more, parts are read again.
_KEPT_ROWS = 2**24
_DIGEST_BYTES = 32
_PROBE = b"batchgen.probe"
_READERS = 16


@dataclasses.dataclass(slots=True)
class Summary(Rates):
    """Totals over a job's parts. `problems` says what does not reconcile, one line each; empty means all is there."""

    expected_rows: int
    ok: int = 0
    error: int = 0
    skipped: int = 0
    parts: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    target_steps: int = 0
    draft_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    lookup_tokens: int = 0
    accepted_lookup_tokens: int = 0
    drafted_per_depth: list[int] = dataclasses.field(default_factory=list)
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
    """Read the parts of `plan` and reconcile: input rows x samples == ok + error + skipped, each key once.

    What was found in a part is kept in the output folder, so that the same part is not read again the next night.

    Raises:
        StoreError: the storage kept failing; a damaged part is a problem of the summary instead.
    """
    found = write.entries(store, output)
    for shard in plan.shards:
        # A listing may lag behind what was written a moment ago.
        if shard.key not in found and (entry := write.standing(store, output, shard)):
            found[shard.key] = entry
    summary = Summary(expected_rows=plan.num_rows * samples)
    missing = [shard for shard in plan.shards if shard.key not in found]
    if missing:
        names = ", ".join(shard.part_name for shard in missing[:3])
        summary.problems.append(f"{len(missing)} of {len(plan.shards)} parts are missing: {names}")
    entries = {shard.key: found[shard.key] for shard in plan.shards if shard.key in found}
    stored = {key: facts for key, facts in _known(store, output).items() if key in found}
    stored = {key: facts for key, facts in stored.items() if facts["version"] == found[key].version}
    known = {key: facts for key, facts in stored.items() if key in entries}
    unread = [key for key in entries if key not in known]

    looked = _look(store, {key: entries[key] for key in unread})
    known |= {key: facts for key, facts in looked.items() if isinstance(facts, dict)}
    for shard in plan.shards:
        why = looked.get(shard.key)
        if isinstance(why, str):
            url = entries[shard.key].url
            summary.problems.append(f"{url}: does not read back ({why}); remove it and submit again")
        elif shard.key in known:
            _add(summary, known[shard.key])
            num_rows, expected = len(known[shard.key]["hashes"]), shard.num_rows * samples
            if num_rows != expected:
                summary.problems.append(f"{entries[shard.key].url}: {num_rows} rows, expected {expected}")
    num_doubled, examples = _doubled(store, {entries[key].url: facts["hashes"] for key, facts in known.items()})
    if num_doubled:
        summary.problems.append(
            f"{num_doubled} rows share their id and sample with another ({', '.join(examples)}); "
            f"input.id must be unique over all files"
        )
    if summary.rows != summary.expected_rows and not summary.problems:
        summary.problems.append(f"{summary.rows} rows in the parts, expected {summary.expected_rows}")
    summary.reasons = dict(collections.Counter(summary.reasons).most_common())
    if unread:
        try:
            _keep(store, output, stored | known)
        except StoreError as error:  # it only saves reading
            log.warning("what was reconciled is not kept: %s", error)
    return summary


def _look(store: Store, entries: Mapping[str, Entry]) -> dict[str, dict[str, Any] | str]:
    """What is in each part, or why it cannot be read."""

    def look(key: str) -> dict[str, Any] | str:
        try:
            return {"key": key, "version": entries[key].version} | _facts(
                _read(store, entries[key].url, _COLUMNS, [_LEAF])
            )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            return str(error).partition("\n")[0][:200]

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(entries, pool.map(look, entries), strict=True))


def _known(store: Store, output: str) -> dict[str, dict[str, Any]]:
    """What was found in parts before, by their shards' keys; nothing where that cannot be told."""
    import polars as pl

    try:
        data = store.read(f"{output.rstrip('/')}/{RECONCILED}")
    except FileNotFoundError:
        return {}
    digest, rest = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(rest).digest() != digest or pq.read_metadata(io.BytesIO(rest)).metadata[_PROBE] != _probe():
        return {}
    frame = pl.read_parquet(rest)
    hashes = dict(zip(frame["key"], frame["hashes"], strict=True))
    return {row["key"]: row | {"hashes": hashes[row["key"]]} for row in frame.drop("hashes").iter_rows(named=True)}


def _keep(store: Store, output: str, known: dict[str, dict[str, Any]]) -> None:
    """Note what was found in parts, for `_known`, behind a digest of it."""
    import polars as pl

    if sum(len(facts["hashes"]) for facts in known.values()) > _KEPT_ROWS:
        return
    lists = {"hashes": pl.List(pl.UInt64)} | dict.fromkeys(_DEPTHS, pl.List(pl.Int64))
    frame = pl.DataFrame(list(known.values()), schema_overrides=lists, infer_schema_length=None)
    sink = io.BytesIO()
    frame.write_parquet(sink, compression="uncompressed", metadata={_PROBE.decode(): _probe().decode()})
    data = sink.getvalue()
    store.put(f"{output.rstrip('/')}/{RECONCILED}", hashlib.sha256(data).digest() + data)


def _probe() -> bytes:
    """Differs where the hashes that were kept would not be made again, or other facts stand with them."""
    import polars as pl

    frame = pl.DataFrame({"row_id": ["a", "ä", ""], "sample": [0, 1, 2]}, schema_overrides={"sample": pl.Int32})
    return f"{sorted(_FACTS)} {frame.hash_rows().to_list()}".encode()


def _read(store: Store, url: str, columns: list[str], if_there: Sequence[str] = ()) -> pa.Table:
    with store.open(url) as stream:
        # Column chunks that lie side by side in one request.
        file = pq.ParquetFile(stream, pre_buffer=True, page_checksum_verification=True)
        table = file.read(columns=[*columns, *if_there])
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


def _facts(table: pa.Table) -> dict[str, Any]:
    """What a part adds to a summary, as in `_FACTS`."""
    is_ok = pc.fill_null(pc.equal(table["status"], "ok"), fill_value=False)
    ok, rest = table.filter(is_ok), table.filter(pc.invert(is_ok))
    facts: dict[str, Any] = {"ok": ok.num_rows, "error": 0, "skipped": 0, "hashes": _hashes(table)}
    reasons: collections.Counter[str] = collections.Counter()
    for row in rest.group_by(["status", "error_type"]).aggregate([([], "count_all")]).to_pylist():
        reasons[f"{row['status']}: {row['error_type']}"] += row["count_all"]
        facts["error" if row["status"] == "error" else "skipped"] += row["count_all"]
    facts["reasons"] = json.dumps(reasons)
    facts |= {name: pc.sum(ok[name]).as_py() or 0 for name in _SUMS}
    facts["answers"] = ok.num_rows
    if "answers" in ok.column_names:
        facts["answers"] = pc.sum(pc.list_value_length(ok["answers"])).as_py() or 0
    return facts | {name: _by_depth(ok[name]) for name in _DEPTHS}


def _by_depth(counts: pa.ChunkedArray) -> list[int]:
    deepest = pc.max(pc.list_value_length(counts)).as_py() or 0
    each = (pc.list_flatten(pc.list_slice(counts, depth, depth + 1)) for depth in range(deepest))
    return [pc.sum(of_depth).as_py() for of_depth in each]


def _add(summary: Summary, facts: dict[str, Any]) -> None:
    summary.parts += 1
    for name in ("ok", "error", "skipped", "answers", *_SUMS):
        setattr(summary, name, getattr(summary, name) + facts[name])
    for reason, count in json.loads(facts["reasons"]).items():
        summary.reasons[reason] = summary.reasons.get(reason, 0) + count
    for name in _DEPTHS:
        pairs = itertools.zip_longest(getattr(summary, name), facts[name], fillvalue=0)
        setattr(summary, name, [a + b for a, b in pairs])


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
