"""What is finished of an unfinished shard, so that a dead worker costs seconds of work and never a row.

Each attempt at a shard begins with a create-only *claim*, numbered upwards, that lists the segments it accepts: those
of the claim before it that are visible now, and those that claim had accepted. Finished rows then follow as create-only
*segments*. A worker that was thought dead and wakes up may go on writing segments, but no claim lists them, so its rows
count for nothing and no row counts twice. There is no lock, no shared disk and no database: listing, create-only writes
and reading are enough (tried with kill -9 and SIGSTOP on GCS, S3 and disk).

Segments are Parquet with page checksums, but not named so: `**/*.parquet` over an output folder must not find them.
Names hold the claim's nonce, because the number alone comes back when a shard's journal was removed and begun anew.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import CorruptOutputError, OutputConflictError, StoreError
from batchgen.store import STATE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.record import Shard
    from batchgen.store import Entry, Store

_CLAIM = re.compile(r"claim-(\d+)\.json")
_FOOTER_BYTES = 32 * 1024


class Journal:
    """One attempt at one shard; made by `claim`, used by one thread.

    `done` holds the (row_id, sample) of every row that is present: accepted, written or still buffered.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        claim: _Claim,
        schema: pa.Schema,
        accepted: list[pa.Table],
        *,
        max_rows: int,
        max_seconds: float,
    ) -> None:
        self.done: set[tuple[str, int]] = {key for table in accepted for key in _keys(table)}
        self._store, self._folder, self._claim, self._schema = store, folder, claim, schema
        self._max_rows, self._max_s = max_rows, max_seconds
        self._tables = accepted
        self._rows: list[dict[str, Any]] = []
        self._oldest = 0.0
        self._num_segments = 0

    @classmethod
    def claim(
        cls,
        store: Store,
        output_url: str,
        shard: Shard,
        schema: pa.Schema,
        *,
        worker: str,
        epoch: int = 0,
        again: tuple[str, pa.Table] | None = None,
        max_rows: int = 64,
        max_seconds: float = 20.0,
    ) -> Journal:
        """Begin an attempt at `shard` with the rows that earlier attempts journalled.

        Whether the shard's part exists already is for the caller to ask first. `epoch` is that of the lease.
        When a part is to be replaced, `again` are its commit and the rows of it that stay.

        Raises:
            CorruptOutputError: a claim or an accepted segment is missing or does not read back as written.
            OutputConflictError: an accepted segment has other columns than `schema`.
        """
        folder = _folder(output_url, f"{shard.key}-{again[0]}" if again else shard.key)
        while True:
            files = _by_name(store.find(folder))
            try:
                before = _latest(store, files)
            except FileNotFoundError:
                continue  # removed since it was listed
            claim = _Claim.after(before, files, shard)
            if not store.create(f"{folder}/{claim.name}", claim.to_json(worker, epoch)):
                continue  # another worker took the number; its claim is the one to follow now
            try:
                accepted = _load(store, folder, claim.accepted, files, schema)
            except FileNotFoundError as error:
                if before and before.name not in _by_name(store.find(folder)):
                    # The shard was committed and its journal removed, claims first, while we looked at it.
                    store.delete([f"{folder}/{claim.name}"])
                    continue
                remedy = f"remove {folder} to generate its rows again"
                raise CorruptOutputError(f"{error.filename}: this journal segment is missing; {remedy}") from error
            accepted += [again[1]] if again else []
            return cls(store, folder, claim, schema, accepted, max_rows=max_rows, max_seconds=max_seconds)

    def add(self, row: dict[str, Any]) -> None:
        """Buffer one output row, keys as in the schema; it is safe only after the next `flush`."""
        key = (row["row_id"], row["sample"])
        assert key not in self.done, f"row {key} is in the journal already"
        self.done.add(key)
        if not self._rows:
            self._oldest = time.monotonic()
        self._rows.append(row)

    def due(self, now_monotonic: float) -> bool:
        """Whether `flush` should be called: enough rows wait, or one has waited long enough."""
        waited = now_monotonic - self._oldest >= self._max_s
        return bool(self._rows) and (waited or len(self._rows) >= self._max_rows)

    def flush(self) -> None:
        """Write what is buffered as one segment; durable on return.

        Raises:
            StoreError: storage kept failing, or somebody else writes under this very claim; begin a new claim.
        """
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        url = f"{self._folder}/{self._claim.segments}{self._num_segments:06d}.rows"
        if not self._store.create(url, _encode(table)):
            raise StoreError(f"{url}: exists with other content; two journals write under one claim")
        self._tables.append(table)
        self._num_segments += 1
        self._rows = []

    def table(self) -> pa.Table:
        """Every row that is accepted, written or buffered, each key once, in no particular order."""
        buffered = pa.Table.from_pylist(self._rows, schema=self._schema)
        return pa.concat_tables([*self._tables, buffered])

    def remove(self) -> None:
        """Remove the shard's whole journal; only for a shard whose part exists."""
        remove(self._store, self._folder)


def pending(store: Store, output_url: str) -> dict[str, int]:
    """Rows that the next claim of each unfinished shard would accept, by shard key."""
    finished = {url.removesuffix(".parquet")[-16:] for url in store.find(output_url, recursive=False)}
    shards: dict[str, dict[str, Entry]] = {}
    for url, entry in store.find(_folder(output_url)).items():
        key, name = url.split("/")[-2:]
        if key[:16] not in finished:
            shards.setdefault(key, {})[name] = entry
    rows = dict.fromkeys(shards, 0)
    segments: list[tuple[str, Entry]] = []
    for key, files in shards.items():
        try:
            accepted = _Claim.after(_latest(store, files), files).accepted
        except FileNotFoundError:  # committed and removed just now
            del rows[key]
            continue
        segments += [(key, files[name]) for name in accepted if name in files]
    tails = store.tails([entry for _, entry in segments], _FOOTER_BYTES)
    for (key, entry), tail in zip(segments, tails, strict=True):
        rows[key] += _num_rows(store, entry, tail)
    return rows


def sweep(store: Store, output_url: str, keys: set[str]) -> None:
    """Remove the journals of the shards `keys`: their parts stand, a run died before it cleared up."""
    for name in {url.split("/")[-2] for url in store.find(_folder(output_url))}:
        if name[:16] in keys:
            remove(store, _folder(output_url, name))


def strays(store: Store, output_url: str, versions: Mapping[str, str], done: set[str]) -> list[str]:
    """The journals, by URL, of the shards `done`, and of those whose file has another version among `versions` now."""
    folders: dict[str, dict[str, Entry]] = {}
    for url, entry in store.find(_folder(output_url)).items():
        folder, _, name = url.rpartition("/")
        folders.setdefault(folder, {})[name] = entry
    found = []
    for folder, files in folders.items():
        claim = _latest(store, files)
        changed = claim is not None and versions.get(claim.file, claim.version) != claim.version
        if changed or folder.rpartition("/")[2] in done:
            found.append(folder)
    return found


def remove(store: Store, folder: str) -> None:
    """Remove a whole journal by its URL."""
    # Claims first: who reads the rest while it goes can tell a removed journal from a damaged one.
    store.delete([url for url in store.find(folder) if _CLAIM.fullmatch(url.rpartition("/")[2])])
    store.remove(folder)


@dataclasses.dataclass(frozen=True, slots=True)
class _Claim:
    """The claim with one number, and the segments that it takes over."""

    number: int
    nonce: str
    accepted: tuple[str, ...]
    file: str
    version: str

    @property
    def name(self) -> str:
        return f"claim-{self.number:04d}.json"

    @property
    def segments(self) -> str:
        """How the names of the segments that this claim writes begin."""
        return f"seg-{self.number:04d}-{self.nonce}-"

    @staticmethod
    def after(before: _Claim | None, files: Mapping[str, Entry], shard: Shard | None = None) -> _Claim:
        """The next claim, with everything that `before` accepted and wrote."""
        written = sorted(name for name in files if before and name.startswith(before.segments))
        accepted = (*before.accepted, *written) if before else ()
        origin = (shard.file, shard.version) if shard else ("", "")
        return _Claim(before.number + 1 if before else 1, uuid.uuid4().hex[:12], accepted, *origin)

    def to_json(self, worker: str, epoch: int) -> bytes:
        facts = {"n": self.number, "worker": worker, "epoch": epoch, "nonce": self.nonce}
        facts |= {"file": self.file, "version": self.version}
        return json.dumps(facts | {"accepted": self.accepted}, indent=1).encode()


def _folder(output_url: str, *key: str) -> str:
    return "/".join((output_url.rstrip("/"), STATE_FOLDER, "journal", *key))


def _by_name(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {url.rsplit("/", 1)[-1]: entry for url, entry in entries.items()}


def _latest(store: Store, files: Mapping[str, Entry]) -> _Claim | None:
    """The claim with the highest number."""
    numbers = {int(found[1]): name for name in files if (found := _CLAIM.fullmatch(name))}
    if not numbers:
        return None
    url = files[numbers[max(numbers)]].url
    try:
        claim = json.loads(store.read(url))
        return _Claim(claim["n"], claim["nonce"], tuple(claim["accepted"]), claim["file"], claim["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptOutputError(f"{url}: not a claim as batchgen writes it ({error}); remove its folder") from error


def _load(
    store: Store, folder: str, names: tuple[str, ...], files: Mapping[str, Entry], schema: pa.Schema
) -> list[pa.Table]:
    """The segments' rows, verified."""
    for name in names:
        if name not in files:
            raise FileNotFoundError(errno.ENOENT, "no such segment", f"{folder}/{name}")
    entries = [files[name] for name in names]
    whole = store.tails(entries, max((entry.size_bytes for entry in entries), default=0))
    # Parquet does not keep every Arrow type (seconds become milliseconds): ask it what it makes of ours.
    stored = _decode(_encode(schema.empty_table())).schema
    again = f"remove {folder} to generate its rows again"
    tables, seen = [], set[tuple[str, int]]()
    for entry, data in zip(entries, whole, strict=True):
        try:
            table = _decode(data)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptOutputError(f"{entry.url}: {_damage(error)}; {again}") from error
        if not table.schema.equals(stored):
            differ = ", ".join(sorted({str(field) for field in {*table.schema} ^ {*stored}})) or "their order"
            raise OutputConflictError(f"{entry.url}: journalled with other columns ({differ}); {again}")
        keys = set(_keys(table))
        if len(keys) < table.num_rows or not keys.isdisjoint(seen):
            raise CorruptOutputError(f"{entry.url}: holds a row that stands elsewhere already; {again}")
        seen |= keys
        tables.append(table.cast(schema))
    return tables


def _encode(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _decode(data: bytes) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()


def _keys(table: pa.Table) -> zip[tuple[str, int]]:
    return zip(table["row_id"].to_pylist(), table["sample"].to_pylist(), strict=True)


def _num_rows(store: Store, entry: Entry, tail: bytes) -> int:
    """Rows of a segment, from its last bytes where they hold the whole footer."""
    footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    try:
        data = tail if footer_bytes <= len(tail) else store.read(entry.url)
        missing = entry.size_bytes - len(data)
        return int(pq.read_metadata(pa.BufferReader(b"PAR1".ljust(missing, b"\0")[:missing] + data)).num_rows)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptOutputError(f"{entry.url}: {_damage(error)}") from error


def _damage(error: Exception) -> str:
    return f"does not read back as written ({' '.join(str(error).split())})"
