"""Screening alone: an input's rows that a submit would generate, as Parquet with all their columns.

Each shard of the input becomes one file, stored by one conditional write, so that the same command resumes and does
what is new. What decides is what decides in a job: the same reader, screen, search for duplicates and renderer.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from batchgen import dedupe, job, read
from batchgen.errors import DrainedError, OutputConflictError
from batchgen.record import Message
from batchgen.store import STATE_FOLDER, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from batchgen.columns import Columns
    from batchgen.job import Job
    from batchgen.record import Row, Shard
    from batchgen.spec import Spec
    from batchgen.store import Store

_FACTS = b"batchgen.screened"


@dataclasses.dataclass(slots=True)
class Cleaned:
    """What is in `folder`: `kept` of `rows`; `refused` counts the others by reason, `redacted` what was masked."""

    folder: str
    rows: int = 0
    kept: int = 0
    files: int = 0
    refused: dict[str, int] = dataclasses.field(default_factory=dict)
    redacted: dict[str, int] = dataclasses.field(default_factory=dict)


def run(spec: Spec, to: str, *, draining: Callable[[], bool] = lambda: False) -> Cleaned:
    """Write the rows of the input that a submit would generate to the folder `to`; counts are of all that stands there.

    Raises:
        DrainedError: `draining` became true; files that are written stay.
        OutputConflictError: the folder holds rows that were screened otherwise, or of an input that has changed.
    """
    found = job.prepare(spec, weights=False)
    sink, folder = connect(to, spec.output.storage_options), to.rstrip("/")

    def check() -> None:
        if draining():
            raise DrainedError(f"drained: what is screened stands in {folder}; the same command goes on")

    done = _done(sink, folder, found)
    kind = spec.screen.dedupe
    if kind != "off" and len(done) < len(found.plan.shards):
        stands = ((s, f"{folder}/{s.part_name}") for s in found.plan.shards if s.part_name in done)
        dedupe.mark(
            found.source,
            sink,
            folder,
            found.plan.files,
            found.columns,
            found.sampling,
            kind,
            done=dedupe.ranges(stands),
            check=check,
        )
    cleaned = Cleaned(to)
    rows, whole = read.Reader(found.source), read.Reader(found.source)
    noted = None if kind == "off" else dedupe.Noted(sink, folder, found.columns, found.sampling, kind)

    def screened(shard: Shard) -> dict[str, Any]:
        judged: Iterable[Row] = rows.rows(shard, found.columns, found.sampling)
        judged = judged if noted is None else noted.judged(judged, shard)
        return _screened(found, sink, folder, shard, judged, whole)

    for shard in found.plan.shards:
        check()
        facts = done.get(shard.part_name) or screened(shard)
        cleaned.files += 1
        cleaned.rows += shard.num_rows
        cleaned.kept += facts["kept"]
        for counts, more in ((cleaned.refused, facts["refused"]), (cleaned.redacted, facts["redacted"])):
            counts |= {kind: counts.get(kind, 0) + count for kind, count in more.items()}
    return cleaned


def _done(sink: Store, folder: str, found: Job) -> dict[str, dict[str, Any]]:
    """What stands in the folder, by file name."""
    done = {}
    ours = {shard.part_name for shard in found.plan.shards}
    for url in sink.find(folder):
        name = url.removeprefix(f"{sink.spelled(folder)}/")
        if name.startswith(f"{STATE_FOLDER}/"):
            continue
        if name not in ours:
            raise OutputConflictError(
                f"{url}: not of this input as it is now, screened by this job file; choose an empty folder"
            )
        with sink.open(url) as file:
            done[name] = json.loads(pq.read_metadata(file).metadata[_FACTS])
    return done


def _screened(
    found: Job, sink: Store, folder: str, shard: Shard, rows: Iterable[Row], whole: read.Reader
) -> dict[str, Any]:
    """Store the shard's `rows` that pass."""
    screen = found.kit.screen.fresh()  # its own, for its counts
    said: dict[int, list[Message]] = {}

    def noted() -> Iterator[Row]:
        for row in screen.rows(rows):
            # The renderer adds what the template would.
            said[row.index] = [*(row.messages or ()), *(Message(role="user", content=text) for text in row.ahead)]
            yield row

    refused: collections.Counter[str] = collections.Counter()
    for row in found.kit.renderer.rows(noted()):
        if row.verdict is not None:
            refused[f"{row.verdict.status}: {row.verdict.error_type}"] += 1
            del said[row.index]
    table = whole.table(shard).take(pa.array([index - shard.start for index in said], pa.int64()))
    # Of turns, answers are left out of what was screened, so that they cannot stay where personal data is not wanted.
    if screen.redacted or (found.columns.turns is not None and found.spec.screen.pii != "off"):
        table = _told(table, list(said.values()), found.columns)
    facts = {"kept": len(said), "refused": refused, "redacted": screen.redacted}
    sink_bytes = io.BytesIO()
    noted_facts = {**(table.schema.metadata or {}), _FACTS: json.dumps(facts).encode()}
    pq.write_table(table.replace_schema_metadata(noted_facts), sink_bytes, compression="zstd")
    url = f"{folder}/{shard.part_name}"
    if not sink.create(url, sink_bytes.getvalue()):
        raise OutputConflictError(f"{url}: was written by another command meanwhile; run this one again")
    return facts


def _told(table: pa.Table, conversations: Sequence[Sequence[Message]], columns: Columns) -> pa.Table:
    """The table with these conversations in place of its own; of turns, without the answers that were left out."""
    if columns.messages is not None:
        return _with_lists(table, columns.messages, conversations)
    if columns.turns is not None:
        type_ = table.schema.field(columns.turns).type
        chats = types.is_nested(type_) and types.is_struct(type_.value_type)
        texts = [[one["content"] for one in told if one["role"] == "user"] for told in conversations]
        # As JSON text a list of texts and one of messages are both read.
        kept = any(one["role"] == "system" for told in conversations for one in told) and columns.system is None
        # A system message stands in its own column, where there is one.
        apart = columns.system is not None
        spoken = [[one for one in told if not (apart and one["role"] == "system")] for told in conversations]
        table = _with_lists(table, columns.turns, spoken if chats or kept else texts)
    for name, role in ((columns.system, "system"), (columns.prompt, "user")):
        if name is not None:
            at = table.schema.get_field_index(name)
            contents = [next((m["content"] for m in one if m["role"] == role), None) for one in conversations]
            table = table.set_column(at, table.schema.field(at), pa.array(contents, table.schema.field(at).type))
    return table


def _with_lists(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    """The table with these lists in a column, or their JSON where it holds text."""
    at = table.schema.get_field_index(name)
    field = table.schema.field(at)
    if not types.is_nested(field.type):
        values = [json.dumps(value, ensure_ascii=False) for value in values]
    return table.set_column(at, field, pa.array(values, field.type))
