"""What there is to do: input files to shards, from Parquet footers alone.

A shard is `(file, file version, row range, generation fingerprint)`; whether it is done is decided by whether its part
exists (`write.parts`), never by counting rows or by position. The fingerprint holds what changes a row's tokens and
nothing else, so that head, tree, batch size and workers may change between two submits of one job.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.record import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pyarrow as pa

    from batchgen.spec import Spec
    from batchgen.store import Entry, Store

# Most footers fit; one that does not is read again in full.
TAIL_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """One input file as its footer describes it; `prompt_bytes` is the uncompressed size of all its columns."""

    url: str
    version: str
    num_rows: int
    size_bytes: int
    schema: pa.Schema


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """All shards of a job in input order, done or not."""

    files: list[File]
    shards: list[Shard]
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Input rows of the job."""
        return sum(file.num_rows for file in self.files)


def make(store: Store, spec: Spec, fingerprint: str) -> Plan:
    """List the input and cut it into shards of `checkpoint.rows_per_part` rows.

    Raises:
        InputError: nothing matches the path, or a file is not Parquet.
    """
    entries = _entries(store, spec.input.path)
    files = [_file(store, entry, tail) for entry, tail in zip(entries, store.tails(entries, TAIL_BYTES), strict=True)]
    shards: list[Shard] = []
    step = spec.checkpoint.rows_per_part
    for file in files:
        for start in range(0, file.num_rows, step):
            stop = min(start + step, file.num_rows)
            shards.append(Shard(len(shards), file.url, file.version, start, stop, fingerprint))
    return Plan(files, shards, fingerprint)


def fingerprint(spec: Spec, *, target: str, template: str, dtype: str) -> str:
    """16 hex digits over everything that changes a row's tokens.

    `target` is the model's identity, `template` the hash of chat template and tokenizer, `dtype` the resolved one.
    """
    columns = spec.input.model_dump(mode="json", include={"messages", "prompt", "system", "id", "sampling"})
    facts: Mapping[str, object] = {
        "target": target,
        "template": template,
        "dtype": dtype,
        "engine": spec.engine.kind,
        "columns": columns,
        "screen": spec.screen.model_dump(mode="json"),
        "sampling": spec.sampling.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def kept_fields(plan: Plan, check: Callable[[pa.Schema, str], list[pa.Field]]) -> list[pa.Field]:
    """The kept columns, which every file must have alike; `check` is `read.check_columns` bound to the job's columns.

    Raises:
        InputError: a file lacks a column or has it with another type than the first file.
    """
    first: list[pa.Field] | None = None
    seen: list[pa.Schema] = []
    for file in plan.files:
        if file.schema in seen:
            continue
        seen.append(file.schema)
        fields = check(file.schema, file.url)
        if first is None:
            first = fields
        for field, expected in zip(fields, first, strict=True):
            if field.type != expected.type:
                raise InputError(
                    f"{file.url}: column {field.name} is {field.type}, in {plan.files[0].url} it is {expected.type}; "
                    f"kept columns must have one type in all files"
                )
    return first or []


def _entries(store: Store, path: str) -> list[Entry]:
    if any(sign in path for sign in "*?["):
        found = list(store.glob(path).values())
    elif path.endswith(".parquet"):
        try:
            found = [store.info(path)]
        except FileNotFoundError:
            found = []
    else:
        # As Parquet readers do: what begins with _ or . is not data.
        everything = store.find(path)
        found = [e for url, e in everything.items() if url.endswith(".parquet") and not _hidden(url, path)]
    if not found:
        raise InputError(f"input.path: no Parquet file at {path}")
    return sorted(found, key=lambda entry: entry.url)


def _hidden(url: str, folder: str) -> bool:
    below = url.split(folder.rstrip("/") + "/", 1)[-1]
    return any(name.startswith(("_", ".")) for name in below.split("/"))


def _file(store: Store, entry: Entry, tail: bytes) -> File:
    try:
        metadata = _footer(store, entry, tail)
        schema = metadata.schema.to_arrow_schema()
    except (ValueError, OSError) as e:
        raise InputError(f"{entry.url}: not a readable Parquet file ({e})") from e
    return File(entry.url, entry.version, metadata.num_rows, entry.size_bytes, schema.remove_metadata())


def _footer(store: Store, entry: Entry, tail: bytes) -> pq.FileMetaData:
    if tail[-4:] != b"PAR1":
        raise ValueError(f"it ends in {tail[-4:]!r}, not in PAR1")
    if int.from_bytes(tail[-8:-4], "little") + 8 <= len(tail):
        # A footer is read from the end: any file with the same tail has the same footer.
        return pq.read_metadata(io.BytesIO(b"PAR1" + tail))
    with store.open(entry.url) as f:
        return pq.read_metadata(f)
