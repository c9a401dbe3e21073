"""One shard's part: the create-only PUT that makes its rows final.

The whole Parquet file is built in memory, with page checksums, and checked before it is stored by one request; who
meets a part of the same shard there discards his own. A shard's part has one name for ever, agreed on by a create-only
note in the state folder: two submits may count the same shard differently, and a late worker of the first must not put
its rows beside those of the second. What was stored is read back; a part that is not what was sent is taken away again.
A part is replaced only to do its failed rows again, by compare-and-swap, so that at no moment a row stands twice.
"""

from __future__ import annotations

import dataclasses
import io
import re
import uuid
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import CorruptOutputError
from batchgen.store import STATE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.record import Shard
    from batchgen.store import Entry, Store

_PART = re.compile(r"part-\d{5,}-([0-9a-f]{16})\.parquet")
# A reader of some rows fetches at least one group: 2 to 4 MB of completions.
_GROUP_ROWS = 1024


def entries(store: Store, output_url: str) -> dict[str, Entry]:
    """Every part in the output folder by its shard's key.

    Raises:
        CorruptOutputError: two parts hold one shard.
    """
    found: dict[str, Entry] = {}
    for url, entry in store.find(output_url, recursive=False).items():
        name = _PART.fullmatch(url.rsplit("/", 1)[-1])
        if name and name[1] in found:
            raise CorruptOutputError(f"{url}: holds the same rows as {found[name[1]].url}; remove one of them")
        if name:
            found[name[1]] = entry
    return found


def parts(store: Store, output_url: str) -> dict[str, str]:
    """The URL of every part in the output folder by its shard's key.

    Raises:
        CorruptOutputError: two parts hold one shard.
    """
    return {key: entry.url for key, entry in entries(store, output_url).items()}


def standing(store: Store, output_url: str, shard: Shard) -> Entry | None:
    """The shard's part, asked for by name, without a listing."""
    folder = output_url.rstrip("/")
    try:
        url = f"{folder}/{STATE_FOLDER}/names/{shard.key}"
        return store.info(f"{folder}/{_named(url, store.read(url), shard)}")
    except FileNotFoundError:
        return None


def commit(store: Store, output_url: str, shard: Shard, table: pa.Table, *, metadata: Mapping[str, str]) -> bool:
    """Make `table`, rows in the order given, the shard's part; False when the shard has one already.

    `metadata` goes into the file's key-value metadata, each key after "batchgen.".

    Raises:
        CorruptOutputError: the part does not read back as sent; it is removed, and the journal stays.
    """
    data = _encode(table, {**metadata, "shard": shard.key, "commit": uuid.uuid4().hex})
    url = f"{output_url.rstrip('/')}/{_agreed_name(store, output_url, shard)}"
    if not store.create(url, data):
        return False
    if _damaged(store, url, data) is not None:
        store.delete([url])
        raise CorruptOutputError(f"{url}: does not read back as written, and was removed; submit again")
    return True


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part as it stands: its bytes, rows and the nonce of the commit that wrote it."""

    url: str
    data: bytes
    table: pa.Table
    commit: str


def load(store: Store, url: str, schema: pa.Schema) -> Part:
    """The part at `url`, its rows as in `schema`.

    Raises:
        CorruptOutputError: it does not read back as written, or is gone.
    """
    try:
        data = store.read(url)
        table = _decode(data)
        commit = table.schema.metadata[b"batchgen.commit"].decode()
        return Part(url, data, table.cast(schema), commit)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        cause = " ".join(str(error).split())
        raise CorruptOutputError(f"{url}: does not read back ({cause}); remove it and submit again") from error


def target_of(schema: pa.Schema) -> str:
    """The identity of the target whose rows stand in a part of this schema."""
    identity: bytes = (schema.metadata or {}).get(b"batchgen.target_identity", b"")
    return identity.decode()


def commit_of(store: Store, url: str) -> str | None:
    """The nonce of the commit that wrote the part at `url`, None where there is none."""
    try:
        found = _commit(store.read(url))
    except FileNotFoundError:
        return None
    return found.decode() if found else None


def replace(store: Store, part: Part, shard: Shard, table: pa.Table, *, metadata: Mapping[str, str]) -> bool:
    """Make `table` the shard's part in place of `part`; False when another run replaced or removed that meanwhile.

    Raises:
        CorruptOutputError: the new part does not read back as sent; the old one stands again where that is certain.
    """
    data = _encode(table, {**metadata, "shard": shard.key, "commit": uuid.uuid4().hex})
    if not store.swap(part.url, part.data, data):
        return False
    damaged = _damaged(store, part.url, data)
    if damaged is not None:
        back = store.swap(part.url, damaged, part.data)  # not where only the way back is broken
        what = "the part before stands again" if back else "what stands there is not known"
        raise CorruptOutputError(f"{part.url}: does not read back as written; {what}; submit again")
    return True


def _encode(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """The part's bytes, proven to decode to the same rows."""
    assert len(set(_keys(table))) == table.num_rows, f"shard {metadata['shard']}: a row stands twice in its part"
    tagged = {f"batchgen.{key}": value for key, value in metadata.items()}
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({**(table.schema.metadata or {}), **tagged}),
        sink,
        compression="zstd",
        row_group_size=_GROUP_ROWS,
        write_page_checksum=True,
    )
    data = sink.getvalue()
    back = _decode(data)
    # Not `back.equals(table)`: a NaN in a kept column equals nothing.
    assert _keys(back) == _keys(table), "Parquet does not hold the rows that were put in"
    return data


def _decode(data: bytes) -> pa.Table:
    """A part's rows, a group at a time: Arrow reads no column of lists whose strings are beyond 2 GiB in one go."""
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
    return pa.concat_tables([file.schema_arrow.empty_table(), *groups])


def _agreed_name(store: Store, output_url: str, shard: Shard) -> str:
    """The one name of the shard's part, whoever writes it and however he counts."""
    url = f"{output_url.rstrip('/')}/{STATE_FOLDER}/names/{shard.key}"
    if store.create(url, shard.part_name.encode()):
        return shard.part_name
    return _named(url, store.read(url), shard)


def _named(url: str, note: bytes, shard: Shard) -> str:
    name = note.decode(errors="replace")
    found = _PART.fullmatch(name)
    if not found or found[1] != shard.key:
        raise CorruptOutputError(f"{url}: holds {name!r}, not the name of this shard's part; remove it")
    return name


def _keys(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table["row_id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def _damaged(store: Store, url: str, data: bytes) -> bytes | None:
    """What stands where `data` was written, None if that is `data`, or the part of a run that has replaced it since."""
    found = b""
    # Twice, because the way back may be what is broken: GCS' answers carry no checksum that gcsfs looks at.
    for _ in range(2):
        try:
            found = store.read(url)
        except FileNotFoundError:
            found = b""
        if found == data or _commit(found) not in {None, _commit(data)}:
            return None
    return found


def _commit(data: bytes) -> bytes | None:
    """The nonce of the commit that wrote a part, None where these bytes are none."""
    try:
        commit: bytes | None = (pq.read_metadata(pa.BufferReader(data)).metadata or {}).get(b"batchgen.commit")
    except (pa.ArrowException, OSError, ValueError):
        return None
    return commit
