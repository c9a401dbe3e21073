"""What is finished of an unfinished shard, so that a dead worker costs seconds of work and never a row.

Each attempt at a shard begins with a create-only *claim*, numbered upwards, that lists the segments it accepts: those
of the claim before it that are visible now, and those that claim had accepted. Finished rows then follow as create-only
*segments*. A worker that was thought dead and wakes up may go on writing segments, but no claim lists them, so its rows
count for nothing and no row counts twice. There is no lock, no shared disk and no database: listing, create-only writes
and reading are enough (tried with kill -9 and SIGSTOP on GCS, S3 and disk). A worker that helps with a shard (`join`)
writes segments under its owner's claim, so what it finished counts whichever of the two dies.

Segments are Parquet with page checksums, but not named so: `**/*.parquet` over an output folder must not find them.
Names hold the claim's nonce, because the number alone comes back when a shard's journal was removed and begun anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.claim import NAME, Claim, alone, latest
from batchgen.errors import CorruptOutputError, OutputConflictError, StoreError
from batchgen.record import DUPLICATE, NEAR_DUPLICATE
from batchgen.store import STATE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping

    from batchgen.record import Piece, Shard
    from batchgen.store import Entry, Store

# In the name of a segment that the claim's owner wrote; a helper's has one more.
_OWN_DASHES = 3
_FOOTER_BYTES = 32 * 1024


class Journal:
    """One attempt at one shard; made by `claim`, used by one thread.

    `done` holds the (row_id, sample) of every row that is present: accepted, written or still buffered. `deaths` counts
    the attempts before this one, in a row, that died before the same rows were finished. `suspect` is the row that was
    alone with its worker at the last of them, `condemned` one that was at the last three.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        claim: Claim,
        schema: pa.Schema,
        accepted: Mapping[str, pa.Table],
        *,
        helper: str = "",
        max_rows: int,
        max_seconds: float,
    ) -> None:
        self.done: set[tuple[str, int]] = {key for table in accepted.values() for key in _keys(table)}
        self.condemned = claim.alone if claim.guilty and claim.alone not in self.done else None
        self.suspect = None if claim.guilty else claim.alone
        self.deaths = 0 if claim.guilty else claim.deaths
        self._store, self._folder, self._claim, self._schema = store, folder, claim, schema
        self._max_rows, self._max_s = max_rows, max_seconds
        self._segments = claim.segments + helper
        self._tables = dict(accepted)
        self._rows: list[dict[str, Any]] = []
        self._oldest = self._write_s = 0.0
        self._num_segments = self._num_notes = 0

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
        began = time.monotonic()
        for pause_s in _pauses():
            if time.monotonic() - began > store.budget_s:
                raise StoreError(f"{folder}: claims that exist are not listed, for {store.budget_s:.0f} s by now")
            time.sleep(pause_s)
            files = _by_name(store.find(folder))
            try:
                before = latest(store, files)
                claim = Claim.after(before, files, shard, alone(store, before, files))
            except FileNotFoundError:
                continue  # removed since it was listed
            if not store.create(f"{folder}/{claim.name}", claim.to_json(worker, epoch)):
                continue  # another worker took the number; its claim is the one to follow now
            try:
                accepted = _load(store, folder, claim.accepted, files, schema)
            except FileNotFoundError as error:
                if before and not _exists(store, f"{folder}/{before.name}"):
                    # The shard was committed and its journal removed, claims first, while we looked at it.
                    store.delete([f"{folder}/{claim.name}"])
                    continue
                remedy = f"remove {folder} to generate its rows again"
                raise CorruptOutputError(f"{error.filename}: this journal segment is missing; {remedy}") from error
            accepted |= {"": again[1]} if again else {}
            return cls(store, folder, claim, schema, accepted, max_rows=max_rows, max_seconds=max_seconds)
        raise AssertionError("the pauses have no end")

    @classmethod
    def join(
        cls,
        store: Store,
        output_url: str,
        piece: Piece,
        schema: pa.Schema,
        *,
        max_rows: int = 64,
        max_seconds: float = 20.0,
    ) -> Journal | None:
        """Help with a shard under its owner's claim, from what is finished now; None if that claim is over.

        Raises:
            CorruptOutputError, OutputConflictError: as `claim`.
        """
        folder = _folder(output_url, piece.shard.key)
        files = _by_name(store.find(folder))
        try:
            found = latest(store, files)
            if found is None or found.segments != piece.claim:
                return None
            now = dataclasses.replace(found, deaths=0, alone=None)
            accepted = _load(store, folder, Claim.after(found, files).accepted, files, schema)
        except FileNotFoundError:
            return None
        return cls(
            store,
            folder,
            now,
            schema,
            accepted,
            helper=_helper(piece),
            max_rows=max_rows,
            max_seconds=max_seconds,
        )

    @property
    def claim_name(self) -> str:
        """What `join` needs to write under this claim."""
        return self._claim.segments

    def merge(self, piece: Piece) -> None:
        """Take in what the helper with `piece` wrote, for the last time: later rows of it count for nothing here.

        Raises:
            CorruptOutputError, OutputConflictError: as `claim`.
        """
        files, mine = _by_name(self._store.find(self._folder)), self._segments + _helper(piece)
        # What a listing does not show yet is asked for by name: nobody else would do these rows.
        with contextlib.suppress(FileNotFoundError):
            for number in itertools.count():
                name = f"{mine}{number:06d}.rows"
                if name not in files:
                    files[name] = self._store.info(f"{self._folder}/{name}")
        new = tuple(sorted(name for name in files if name.startswith(mine)))
        self._tables |= _load(self._store, self._folder, new, files, self._schema, self.done, repetitions=True)
        self.done.update(key for name in new for key in _keys(self._tables[name]))

    def trying(self, key: tuple[str, int]) -> None:
        """Note that this row is alone with the worker from now on; durable on return."""
        self._note(f"trying-{self._num_notes:06d}", json.dumps(key))
        self._num_notes += 1

    def passed(self) -> None:
        """Note that the rows are finished that an attempt before may have died of."""
        self._note("passed")

    def end(self) -> None:
        """Note that this attempt ended of itself, having flushed, and not by the death of its worker."""
        self._note("end")

    def _note(self, what: str, text: str = "") -> None:
        self._store.create(f"{self._folder}/{self._claim.notes}{what}", f"{text}\n".encode())

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
        # What is being written is not safe yet: a store that takes its time is asked sooner.
        waited = now_monotonic - self._oldest >= self._max_s - min(self._write_s, self._max_s / 2)
        return bool(self._rows) and (waited or len(self._rows) >= self._max_rows)

    def flush(self) -> None:
        """Write what is buffered as one segment; durable on return.

        Raises:
            StoreError: storage kept failing, or somebody else writes under this very claim; begin a new claim.
        """
        if not self._rows:
            return
        began = time.monotonic()
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        name = f"{self._segments}{self._num_segments:06d}.rows"
        if not self._store.create(f"{self._folder}/{name}", _encode(table)):
            raise StoreError(f"{self._folder}/{name}: exists with other content; two journals write under one claim")
        self._tables[name] = table
        self._num_segments += 1
        self._rows = []
        self._write_s = max(time.monotonic() - began, 0.8 * self._write_s)

    def table(self) -> pa.Table:
        """Every row that is accepted, written or buffered, each key once, in no particular order."""
        buffered = pa.Table.from_pylist(self._rows, schema=self._schema)
        return pa.concat_tables([*self._tables.values(), buffered])

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
            accepted = Claim.after(latest(store, files), files).accepted
        except FileNotFoundError:  # committed and removed just now
            del rows[key]
            continue
        segments += [(key, files[name]) for name in accepted if name in files]
    try:
        tails = store.tails([entry for _, entry in segments], _FOOTER_BYTES)
    except FileNotFoundError:  # the same, of one at least
        return pending(store, output_url)
    for (key, entry), tail in zip(segments, tails, strict=True):
        rows[key] += _num_rows(store, entry, tail)
    return rows


def sweep(store: Store, output_url: str, keys: set[str]) -> None:
    """Remove the journals of the shards `keys`: their parts stand, a run died before it cleared up."""
    # One that does failed rows of the part again has another name; it is used when they are done again.
    for name in {url.split("/")[-2] for url in store.find(_folder(output_url))}:
        if name in keys:
            remove(store, _folder(output_url, name))


def strays(
    store: Store,
    output_url: str,
    fingerprint: str,
    versions: Mapping[str, str],
    done: Container[str],
    commit: Callable[[str], str | None],
) -> list[str]:
    """The journals, by URL, that no submit of the job `fingerprint` will use.

    Those of the shards `done`, by key, but for one that does failed rows again of the part that stands (`commit` says
    which one does); and those of files that have another version than in `versions`, or are not in there.
    """
    folders: dict[str, dict[str, Entry]] = {}
    for url, entry in store.find(_folder(output_url)).items():
        folder, _, name = url.rpartition("/")
        folders.setdefault(folder, {})[name] = entry
    found = []
    for folder, files in folders.items():
        claim = latest(store, files)
        key, _, again = folder.rpartition("/")[2].partition("-")
        # Without a claim it was being removed when its run was killed.
        own = claim is None or claim.fingerprint in {fingerprint, ""}
        gone = own and (claim is None or versions.get(claim.file) != claim.version)
        if gone or (key in done and not (again and commit(key) == again)):
            found.append(folder)
    return found


def remove(store: Store, folder: str) -> None:
    """Remove a whole journal by its URL."""
    # Claims first: who reads the rest while it goes can tell a removed journal from a damaged one.
    store.delete([url for url in store.find(folder) if NAME.fullmatch(url.rpartition("/")[2])])
    store.remove(folder)


def _exists(store: Store, url: str) -> bool:
    try:
        store.info(url)
    except FileNotFoundError:
        return False
    return True


def _pauses() -> Iterator[float]:
    """Seconds to wait before each look at a listing that may lag behind."""
    yield 0.0
    for exponent in itertools.count():
        yield min(0.05 * 2**exponent, 5.0)


def _folder(output_url: str, *key: str) -> str:
    return "/".join((output_url.rstrip("/"), STATE_FOLDER, "journal", *key))


def _helper(piece: Piece) -> str:
    """What stands in the names of segments between the claim and the number where a helper wrote them."""
    return f"h{piece.nonce}-"


def _by_name(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {url.rsplit("/", 1)[-1]: entry for url, entry in entries.items()}


def _load(
    store: Store,
    folder: str,
    names: tuple[str, ...],
    files: Mapping[str, Entry],
    schema: pa.Schema,
    done: Iterable[tuple[str, int]] = (),
    *,
    repetitions: bool = False,
) -> dict[str, pa.Table]:
    """The segments' rows by their names, verified; without rows of helpers that are `done` or stand in another.

    Rows that another run skipped as `repetitions` are left out unless they are asked for: the row that they repeat may
    have gone since, and to judge them again costs nothing.
    """
    # One that a claim has taken over is there, whether this listing shows it or not.
    files = {name: files[name] if name in files else store.info(f"{folder}/{name}") for name in names}
    # Who was thought dead may have written rows that others did again; what its owner wrote stands.
    names = tuple(sorted(names, key=lambda name: (name.count("-") > _OWN_DASHES, name)))
    entries = [files[name] for name in names]
    whole = store.tails(entries, max((entry.size_bytes for entry in entries), default=0))
    # Parquet does not keep every Arrow type (seconds become milliseconds): ask it what it makes of ours.
    stored = _decode(_encode(schema.empty_table())).schema
    again = f"remove {folder} to generate its rows again"
    tables, seen = dict[str, pa.Table](), set(done)
    for name, entry, data in zip(names, entries, whole, strict=True):
        try:
            table = _decode(data)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptOutputError(f"{entry.url}: {_damage(error)}; {again}") from error
        if not table.schema.equals(stored):
            differ = ", ".join(sorted({str(field) for field in {*table.schema} ^ {*stored}})) or "their order"
            raise OutputConflictError(f"{entry.url}: journalled with other columns ({differ}); {again}")
        if not repetitions:
            skipped = pc.is_in(table["error_type"], pa.array([DUPLICATE, NEAR_DUPLICATE]))
            table = table.filter(pc.invert(skipped))
        if name.count("-") > _OWN_DASHES:
            table = table.filter(pa.array([key not in seen for key in _keys(table)], pa.bool_()))
        keys = set(_keys(table))
        if len(keys) < table.num_rows or not keys.isdisjoint(seen):
            raise CorruptOutputError(f"{entry.url}: holds a row that stands elsewhere already; {again}")
        seen |= keys
        tables[name] = table.cast(schema)
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
