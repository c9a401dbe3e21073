"""Equal prompts over a whole input: which rows ask what an earlier row asks, found before a run, told to its workers.

Each file's rows are hashed once, 16 bytes each, and kept in the output folder, so that a new file costs only itself.
Equal is what would be generated from the same messages under the same sampling, character for character; a row that is
an error by itself neither repeats nor is repeated.

Files count in the order in which they were first seen: one that comes later and sorts before cannot make a finished
row a repetition. A row that stands in the output as a repetition stays one. Where what it repeats went away without an
answer, it is nobody's first, so that another row is, and if there is none the run is refused.

Nearly equal (`near`, 128 bytes each) is what shares a band of its MinHash signature (rensa's, of groups of 5 characters
of what is said to the target, in lower case; locality-sensitive hashing, Leskovec et al., Mining of Massive Datasets,
3.4): with 16 bands of 8 values, of two texts that have a share s of their groups in common, with a chance of
1 - (1 - s^8)^16: 0.95 at 0.8, 0.06 at 0.5. System messages must be equal.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from batchgen import read, screen
from batchgen.errors import CorruptOutputError, OutputConflictError, SpecError
from batchgen.record import DUPLICATE, NEAR_DUPLICATE, Shard, Verdict
from batchgen.store import STATE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    import polars as pl

    from batchgen.columns import Columns
    from batchgen.plan import File
    from batchgen.record import Row, Sampling
    from batchgen.store import Store

Kind: TypeAlias = Literal["exact", "near"]


class Done(NamedTuple):
    """Rows of a file, from `start` up to `stop`, that stand in the output, in `part`."""

    start: int
    stop: int
    part: str


def ranges(parts: Iterable[tuple[Shard, str]]) -> dict[str, list[Done]]:
    """What stands in the output of each file, in order, from shards and the URLs of their parts."""
    found: dict[str, list[Done]] = {}
    for shard, part in sorted(parts, key=lambda pair: pair[0].start):
        found.setdefault(shard.file, []).append(Done(shard.start, shard.stop, part))
    return found


log = logging.getLogger("batchgen.dedupe")

# How many hashes are kept of a row, of how many times 8 bytes: rows that share one are repetitions.
_KEPT = {"exact": (1, 2), "near": (16, 1)}
_BAND_VALUES, _GROUP = 8, 5
# Rows that are compared at once; about 100 bytes each while they are.
_ROWS_AT_ONCE = 2**23
_ROWS_PER_LOOK = 4096
# Their ids are in memory together; an id that comes back later makes a row no error here.
_ROWS_READ_AT_ONCE = 2**20


def mark(
    source: Store,
    sink: Store,
    output: str,
    files: Sequence[File],
    columns: Columns,
    sampling: Sampling,
    kind: Kind,
    *,
    done: Mapping[str, Sequence[Done]] | None = None,
    elsewhere: Callable[[], Iterable[tuple[str, str, int, int]]] = list,
    only_lost: bool = False,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Find all repetitions in `files` and note them where `Noted` looks; how many there are.

    `done` are the `ranges` of each file that stand in the output; `elsewhere` gives those of other files: URL, version,
    first row and last + 1. `only_lost` asks no more than whether a row that stands repeats one that went away without
    an answer. `check` is called every few thousand rows, to raise what should end it; files that were hashed stay so.

    Raises:
        InputError: a file is not there, changed since it was planned, or is damaged.
        CorruptOutputError: what was kept of a file is not of its rows.
        OutputConflictError: rows stand in the output as repetitions of rows that went away without an answer.
        SpecError: near repetitions are wanted and rensa is not installed.
    """
    keys = [_key(file.url, file.version, columns, sampling, kind) for file in files]
    order = _order(sink, output, keys)
    kept = {url.rpartition("/")[2] for url in sink.find(_url(output, ""))}
    for file, key in zip(files, keys, strict=True):
        if f"{key}.hashes" not in kept:
            sink.put(_url(output, f"{key}.hashes"), _hashes(source, file, columns, sampling, kind, check))
    ranked = sorted(zip(keys, files, strict=True), key=lambda pair: order[pair[0]])
    done, old = done or {}, {key for key in keys if f"{key}.repetitions" in kept}
    stands = _standing(sink, output, ranked, old, done, elsewhere)
    if only_lost and not stands["lost"].any():
        return 0
    num_found = 0
    for key, found in _repeated(sink, output, ranked, kind, stands, done, check).items():
        sink.put(_url(output, f"{key}.repetitions"), _encode(found))
        num_found += found.num_rows
    return num_found


class Noted:
    """What `mark` noted for a run, of one file after another: that of a large one is read once for all its shards."""

    def __init__(self, sink: Store, output: str, columns: Columns, sampling: Sampling, kind: Kind) -> None:
        self._sink, self._output, self._kind = sink, output, kind
        self._columns, self._sampling = columns, sampling
        self._table: tuple[str, pa.Table] | None = None

    def judged(self, rows: Iterable[Row], shard: Shard) -> Iterator[Row]:
        """The same rows of `shard`, with a verdict for each that repeats an earlier one and has none.

        Raises:
            CorruptOutputError: `mark` noted nothing of the shard's file.
        """
        error_type, asks = (DUPLICATE, "asks") if self._kind == "exact" else (NEAR_DUPLICATE, "asks nearly")
        found = self.repetitions(shard)
        for row in rows:
            if row.verdict is None and row.index in found:
                row.verdict = Verdict("skipped", error_type, f"{asks} what {found[row.index]} asks")
            yield row

    def repetitions(self, shard: Shard) -> dict[int, str]:
        """The shard's rows that repeat an earlier one, by index, each with where that is; raises as `judged`."""
        key = _key(shard.file, shard.version, self._columns, self._sampling, self._kind)
        if self._table is None or self._table[0] != key:
            self._table = key, _noted(self._sink, self._output, key)
        table = self._table[1]
        index = table["index"].to_numpy()
        low, high = index.searchsorted([shard.start, shard.stop])
        rows = table.slice(low, high - low)
        firsts = zip(rows["row"].to_pylist(), rows["file"].to_pylist(), strict=True)
        return {i: f"row {row} of {file}" for i, (row, file) in zip(rows["index"].to_pylist(), firsts, strict=True)}


def _noted(sink: Store, output: str, key: str) -> pa.Table:
    url = _url(output, f"{key}.repetitions")
    try:
        return pa.ipc.open_file(io.BytesIO(sink.read(url))).read_all()
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        raise CorruptOutputError(f"{url}: {error}; submit again") from error


def _url(output: str, name: str) -> str:
    return f"{output.rstrip('/')}/{STATE_FOLDER}/dedupe/{name}".rstrip("/")


def _key(file: str, version: str, columns: Columns, sampling: Sampling, kind: Kind) -> str:
    """Names what is kept of one version of a file, read by these columns; a row may leave its sampling to the job."""
    names = (columns.messages, columns.prompt, columns.turns, columns.system, columns.id)
    method = kind if kind == "exact" else f"near {_rensa().RMinHash.ALGORITHM_VERSION}"
    which = (method, names, sorted(columns.sampling.items()), dataclasses.astuple(sampling))
    return hashlib.sha256(json.dumps((file, version, which)).encode()).hexdigest()[:16]


def _order(sink: Store, output: str, keys: Sequence[str]) -> dict[str, int]:
    """The place of each key among all that were ever seen; new ones come last."""
    url = _url(output, "order.json")
    try:
        old: bytes | None = sink.read(url)
    except FileNotFoundError:
        old = None
    known: list[str] = json.loads(old) if old else []
    new = [key for key in dict.fromkeys(keys) if key not in set(known)]
    if new:
        data = json.dumps(known + new, indent=0).encode()
        if not (sink.create(url, data) if old is None else sink.swap(url, old, data)):
            raise CorruptOutputError(f"{url}: was changed by another run; submit again")
    return {key: i for i, key in enumerate(known + new)}


def _hashes(
    source: Store, file: File, columns: Columns, sampling: Sampling, kind: Kind, check: Callable[[], None]
) -> bytes:
    """What is kept of a file: its rows' first hashes, then their second ones, ...; zeros for what is not compared."""
    bands, words = _KEPT[kind]
    hashes = np.zeros((bands, file.num_rows, words), "<u8")
    of = _exact if kind == "exact" else _near()
    # Kept columns can be large, and say nothing about what is asked.
    bare, reader = dataclasses.replace(columns, keep=()), read.Reader(source)
    for start in range(0, file.num_rows, _ROWS_READ_AT_ONCE):
        shard = Shard(0, file.url, file.version, start, min(start + _ROWS_READ_AT_ONCE, file.num_rows), "")
        for row in screen.judged(reader.rows(shard, bare, sampling)):
            if row.index % _ROWS_PER_LOOK == 0:
                check()
            if row.verdict is None:
                hashes[:, row.index] = of(row)
    log.info("looked for duplicates in %s: %d rows", file.url, file.num_rows)
    return hashes.tobytes()


def _exact(row: Row) -> np.ndarray:
    text = json.dumps([_asked(row), dataclasses.astuple(row.sampling)])
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")[None]


def _near() -> Callable[[Row], np.ndarray]:
    bands, _ = _KEPT["near"]
    make = _rensa().RMinHash

    def hashes(row: Row) -> np.ndarray:
        asked = _asked(row)
        text = " ".join(" ".join(content for role, content in asked if role != "system").lower().split())
        signature = make(num_perm=bands * _BAND_VALUES, seed=1)
        signature.update([text[at : at + _GROUP] for at in range(max(1, len(text) - _GROUP + 1))])
        # Under another system message or temperature the same question gets another answer.
        rest = [content for role, content in asked if role == "system"], dataclasses.astuple(row.sampling)
        salt = hashlib.blake2b(json.dumps(rest).encode(), digest_size=16).digest()
        values = np.array(signature.digest(), "<u8").reshape(bands, _BAND_VALUES)
        digests = b"".join(hashlib.blake2b(band.tobytes(), digest_size=8, salt=salt).digest() for band in values)
        return np.frombuffer(digests, "<u8")[:, None]

    return hashes


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise SpecError("screen.dedupe: near needs rensa: pip install 'batchgen[near]'") from error
    return rensa


def _asked(row: Row) -> list[tuple[str, str]]:
    assert row.messages is not None, "a row without messages was given a verdict by read"
    return [*((message["role"], message["content"]) for message in row.messages), *(("user", it) for it in row.ahead)]


def _standing(
    sink: Store,
    output: str,
    ranked: Sequence[tuple[str, File]],
    noted: AbstractSet[str],
    done: Mapping[str, Sequence[Done]],
    elsewhere: Callable[[], Iterable[tuple[str, str, int, int]]],
) -> pl.DataFrame:
    """Rows that stand in the output as repetitions: `at`, counted over all files, of which row, and if that is `lost`.

    Those are all repetitions that were `noted` before their part was made: what is noted of them stays.
    """
    import polars as pl

    facts = {"at": pl.Int64, "file": pl.String, "row": pl.UInt32, "version": pl.String}
    found, start = [pl.DataFrame(schema=facts)], 0
    for key, file in ranked:
        if key in noted and file.url in done:
            rows = pl.DataFrame(_noted(sink, output, key))
            if "version" not in rows.columns:  # as batchgen noted it once
                rows = rows.with_columns(version=pl.lit(None, pl.String))
            starts, stops = (np.array([each[i] for each in done[file.url]]) for i in range(2))
            index = rows["index"].to_numpy()
            place = np.searchsorted(starts, index, side="right") - 1
            stands = (place >= 0) & (index < stops[place])
            found.append(
                rows.filter(stands).select((pl.col("index") + start).cast(pl.Int64).alias("at"), *[*facts][1:])
            )
        start += file.num_rows
    every = pl.concat(found)
    versions = {file.url: file.version for _, file in ranked}

    answered = functools.cache(lambda: list(elsewhere()))

    def lost(file: str, version: str | None) -> pl.Expr:
        if file in versions:
            # Of another version there is no part: such parts are refused.
            return pl.lit(version not in (None, versions[file]))
        there = [(start, stop) for name, of, start, stop in answered() if name == file and version in (None, of)]
        return ~pl.any_horizontal(pl.lit(False), *(pl.col("row").is_between(*each, "left") for each in there))

    groups = every.partition_by("file", "version", as_dict=True).items() if len(every) else ()
    judged = [rows.with_columns(lost=lost(*which)) for which, rows in groups]
    return pl.concat([every.head(0).with_columns(lost=pl.lit(False)), *judged]).sort("at")


def _repeated(
    sink: Store,
    output: str,
    ranked: Sequence[tuple[str, File]],
    kind: Kind,
    stands: pl.DataFrame,
    done: Mapping[str, Sequence[Done]],
    check: Callable[[], None],
) -> dict[str, pa.Table]:
    """For each key the rows that repeat an earlier one: `index`, and that one's `file`, `version` and `row`."""
    import polars as pl

    starts = np.cumsum([0, *(file.num_rows for _, file in ranked)])
    before = dict(zip(stands["at"].to_list(), stands["lost"].to_list(), strict=True))
    again, first, unanswered = _greedy(*_alike(sink, output, ranked, kind, starts, check), before)
    if unanswered:
        _refuse(unanswered, ranked, starts, stands, done)
    rank = np.searchsorted(starts, first, side="right") - 1
    # Of what stands and repeats nothing that is here, what was noted stays.
    kept = np.flatnonzero(first < 0)
    old = stands[np.searchsorted(stands["at"].to_numpy(), again[kept])]
    facts = {"at": again, "row": (first - starts[rank]).astype(np.uint32)}
    for name in ("file", "version"):
        names = pl.Series([getattr(file, name.replace("file", "url")) for _, file in ranked], dtype=pl.String)
        facts[name] = names.gather(np.maximum(rank, 0))
    every = pl.DataFrame(facts)
    every = pl.concat([every[np.flatnonzero(first >= 0)], old.select(every.columns)]).sort("at")
    tables = {}
    for (key, _), low, high in zip(ranked, starts[:-1], starts[1:], strict=True):
        mine = every.filter(pl.col("at").is_between(low, high, "left"))
        index = (pl.col("at") - low).cast(pl.UInt32).alias("index")
        tables[key] = mine.select(index, "file", "row", "version").to_arrow()
    return tables


def _refuse(
    unanswered: Sequence[int],
    ranked: Sequence[tuple[str, File]],
    starts: np.ndarray,
    stands: pl.DataFrame,
    done: Mapping[str, Sequence[Done]],
) -> None:
    """Raise what says which parts hold rows that nobody answers."""
    parts: dict[str, None] = {}
    for at in unanswered:
        rank = int(np.searchsorted(starts, at, side="right")) - 1
        index = at - int(starts[rank])
        parts |= {d.part: None for d in done[ranked[rank][1].url] if d.start <= index < d.stop}
    row = stands.row(int(stands["at"].search_sorted(unanswered[0])), named=True)
    raise OutputConflictError(
        f"{len(unanswered):,} rows stand in {', '.join([*parts][:3])} as repetitions of rows that went away without an "
        f"answer, such as row {row['row']} of {row['file']}; remove {'these parts' if len(parts) > 1 else 'this part'} "
        f"({len(parts)}), and they are answered"
    )


def _alike(
    sink: Store,
    output: str,
    ranked: Sequence[tuple[str, File]],
    kind: Kind,
    starts: np.ndarray,
    check: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that share a hash, counted over all files, and the number of the group that it makes, in the rows' order."""
    import polars as pl

    bands, _ = _KEPT[kind]
    num_rows = int(starts[-1])
    buckets = max(1, math.ceil(num_rows / _ROWS_AT_ONCE))
    num_groups = 0
    found = [pl.DataFrame(schema={"at": pl.UInt64, "group": pl.UInt64})]
    # A request for each file, where all of it can be kept.
    whole = [_kept(sink, output, *one, kind) for one in ranked] if bands * num_rows <= 2 * _ROWS_AT_ONCE else None
    for band in range(bands):
        if whole is not None:
            hashes = [each[band] for each in whole]
        else:
            hashes = [_kept(sink, output, *one, kind, band)[0] for one in ranked]
        for bucket in range(buckets if ranked else 0):
            check()
            frames = [_frame(each, int(start)) for each, start in zip(hashes, starts, strict=False)]
            rows = pl.concat(frames).filter(pl.col("a") % buckets == bucket)
            groups = rows.group_by("a", "b").len().filter(pl.col("len") > 1).with_row_index("group", num_groups)
            num_groups += groups.height
            alike = rows.join(groups, on=["a", "b"], how="inner")
            found.append(alike.select(pl.col("at", "group").cast(pl.UInt64)))
    every = pl.concat(found).sort("at", maintain_order=True)
    return every["at"].to_numpy(), every["group"].to_numpy()


def _greedy(at: np.ndarray, group: np.ndarray, stands: Mapping[int, bool]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Rows that share a group with an earlier one that stays, and that one; `at` is in order.

    So a row that is left out leaves nobody else out: likeness does not pass along. Rows that stand as repetitions are
    left out whatever comes, with -1 where nothing earlier stays; those that are lost let others stay, and the last of
    what is returned are those of them for whom nobody does.
    """
    stays = np.full(1 + int(group.max(initial=0)), -1, np.int64)
    found: dict[int, int] = dict.fromkeys(stands, -1)
    groups: dict[int, np.ndarray] = {}
    edges = np.flatnonzero(np.diff(at.astype(np.int64), prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges):
        row, mine = int(at[begin]), group[begin:end]
        known = stays[mine]
        if (known >= 0).any():
            found[row] = int(known[known >= 0].min())
        elif stands.get(row):
            groups[row] = mine
        else:
            stays[mine] = row
    lost = [row for row, is_lost in stands.items() if is_lost and found[row] < 0]
    unanswered = [row for row in lost if row not in groups or not (stays[groups[row]] >= 0).any()]
    again = np.array(sorted(found), np.int64)
    return again, np.array([found[row] for row in again.tolist()], np.int64), unanswered


def _kept(sink: Store, output: str, key: str, file: File, kind: Kind, band: int | None = None) -> np.ndarray:
    """The hashes of a file's rows [bands, rows, words], or those of one band."""
    url, (bands, words) = _url(output, f"{key}.hashes"), _KEPT[kind]
    size, asked = 8 * words * file.num_rows, bands if band is None else 1
    with sink.open(url) as stream:
        found = stream.seek(0, io.SEEK_END)
        if found != bands * size:
            raise CorruptOutputError(f"{url}: holds {found} bytes, not {bands * size}; remove it and submit again")
        stream.seek((band or 0) * size)
        data = stream.read(asked * size)
    return np.frombuffer(data, "<u8").reshape(asked, file.num_rows, words)


def _frame(hashes: np.ndarray, start: int) -> pl.DataFrame:
    """The compared rows of one file, counted from `start` on."""
    import polars as pl

    frame = pl.DataFrame({"a": hashes[:, 0], "b": hashes[:, -1]}).with_row_index("at", start)
    return frame.filter((pl.col("a") != 0) | (pl.col("b") != 0))


def _encode(table: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue()
