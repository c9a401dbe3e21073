"""Equal prompts over a whole input: which rows ask what an earlier row asks, found before a run, told to its workers.

Each file's rows are hashed once, 16 bytes each, and kept in the output folder, so that a new file costs only itself.
Files count in the order in which they were first seen: one that comes later and sorts before cannot make a finished
row a repetition. Equal is what would be generated from the same messages under the same sampling, character for
character; a row that is an error by itself neither repeats nor is repeated.

Nearly equal (`near`) is what shares a band of its MinHash signature (rensa's, of groups of 5 characters in lower case;
locality-sensitive hashing, Leskovec et al., Mining of Massive Datasets, 3.4): with 16 bands of 8 values, of two texts
that have a share s of their groups in common, with a chance of 1 - (1 - s^8)^16: 0.95 at 0.8, 0.06 at 0.5.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from batchgen import read, screen
from batchgen.errors import CorruptOutputError, SpecError
from batchgen.record import Shard, Verdict
from batchgen.store import STATE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import polars as pl

    from batchgen.plan import File
    from batchgen.read import Columns
    from batchgen.record import Row, Sampling
    from batchgen.store import Store

Kind: TypeAlias = Literal["exact", "near"]

log = logging.getLogger("batchgen.dedupe")

# How many hashes are kept of a row, of how many times 8 bytes: rows that share one are repetitions.
_KEPT = {"exact": (1, 2), "near": (16, 1)}
_BAND_VALUES, _GROUP = 8, 5
# Rows that are compared at once; about 100 bytes each while they are.
_ROWS_AT_ONCE = 2**23
_ROWS_PER_LOOK = 4096


def mark(
    source: Store,
    sink: Store,
    output: str,
    files: Sequence[File],
    columns: Columns,
    sampling: Sampling,
    kind: Kind,
    *,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Find all repetitions in `files` and note them where `repetitions` looks; how many there are.

    `check` is called every few thousand rows, to raise what should end it; files that were hashed stay so.

    Raises:
        InputError: a file is not there, changed since it was planned, or is damaged.
        CorruptOutputError: what was kept of a file is not of its rows.
        SpecError: near repetitions are wanted and rensa is not installed.
    """
    keys = [_key(file.url, file.version, columns, kind) for file in files]
    order = _order(sink, output, keys)
    kept = {url.rpartition("/")[2] for url in sink.find(_url(output, ""))}
    for file, key in zip(files, keys, strict=True):
        if f"{key}.hashes" not in kept:
            sink.put(_url(output, f"{key}.hashes"), _hashes(source, file, columns, sampling, kind, check))
    ranked = sorted(zip(keys, files, strict=True), key=lambda pair: order[pair[0]])
    num_found = 0
    for key, found in _repeated(sink, output, ranked, kind, check).items():
        sink.put(_url(output, f"{key}.repetitions"), _encode(found))
        num_found += found.num_rows
    return num_found


def repetitions(sink: Store, output: str, shard: Shard, columns: Columns, kind: Kind) -> dict[int, str]:
    """The shard's rows that repeat an earlier one, by index, each with where that is.

    Raises:
        CorruptOutputError: `mark` noted nothing of the shard's file.
    """
    url = _url(output, f"{_key(shard.file, shard.version, columns, kind)}.repetitions")
    try:
        table = pa.ipc.open_file(io.BytesIO(sink.read(url))).read_all()
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        raise CorruptOutputError(f"{url}: {error}; submit again") from error
    index = table["index"].to_numpy()
    low, high = index.searchsorted([shard.start, shard.stop])
    rows = table.slice(low, high - low)
    firsts = zip(rows["row"].to_pylist(), rows["file"].to_pylist(), strict=True)
    return {i: f"row {row} of {file}" for i, (row, file) in zip(rows["index"].to_pylist(), firsts, strict=True)}


def judged(rows: Iterable[Row], found: Mapping[int, str], kind: Kind) -> Iterator[Row]:
    """The same rows, with a verdict for each that is in `found` and has none."""
    error_type, asks = ("duplicate", "asks") if kind == "exact" else ("near_duplicate", "asks nearly")
    for row in rows:
        if row.verdict is None and row.index in found:
            row.verdict = Verdict("skipped", error_type, f"{asks} what {found[row.index]} asks")
        yield row


def _url(output: str, name: str) -> str:
    return f"{output.rstrip('/')}/{STATE_FOLDER}/dedupe/{name}".rstrip("/")


def _key(file: str, version: str, columns: Columns, kind: Kind) -> str:
    """Names what is kept of one version of a file, read by these columns."""
    names = (columns.messages, columns.prompt, columns.turns, columns.system, columns.id)
    which = (kind, names, sorted(columns.sampling.items()))
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
    shard = Shard(0, file.url, file.version, 0, file.num_rows, "")
    # Kept columns can be large, and say nothing about what is asked.
    bare = dataclasses.replace(columns, keep=())
    for row in screen.judged(read.rows(source, shard, bare, sampling)):
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
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise SpecError("screen.dedupe: near needs rensa: pip install 'batchgen[near]'") from error
    bands, _ = _KEPT["near"]

    def hashes(row: Row) -> np.ndarray:
        text = " ".join("\n".join(f"{role} {content}" for role, content in _asked(row)).lower().split())
        signature = RMinHash(num_perm=bands * _BAND_VALUES, seed=1)
        signature.update([text[at : at + _GROUP] for at in range(max(1, len(text) - _GROUP + 1))])
        # Of the same question under another temperature both answers are wanted.
        salt = hashlib.blake2b(json.dumps(dataclasses.astuple(row.sampling)).encode(), digest_size=16).digest()
        values = np.array(signature.digest(), "<u8").reshape(bands, _BAND_VALUES)
        digests = b"".join(hashlib.blake2b(band.tobytes(), digest_size=8, salt=salt).digest() for band in values)
        return np.frombuffer(digests, "<u8")[:, None]

    return hashes


def _asked(row: Row) -> list[tuple[str, str]]:
    assert row.messages is not None, "a row without messages was given a verdict by read"
    return [*((message["role"], message["content"]) for message in row.messages), *(("user", it) for it in row.ahead)]


def _repeated(
    sink: Store, output: str, ranked: Sequence[tuple[str, File]], kind: Kind, check: Callable[[], None]
) -> dict[str, pa.Table]:
    """For each key the rows that repeat an earlier one: `index`, and the first one's `file` and `row`."""
    import polars as pl

    num_rows = sum(file.num_rows for _, file in ranked)
    buckets = max(1, math.ceil(num_rows / _ROWS_AT_ONCE))
    empty = pl.DataFrame(schema={"rank": pl.UInt32, "index": pl.UInt32, "first": pl.UInt32, "row": pl.UInt32})
    found = [empty]
    for band, bucket in itertools.product(range(_KEPT[kind][0]), range(buckets)):
        check()
        frames = [
            _frame(_band(sink, output, *one, kind, band), rank).filter(pl.col("a") % buckets == bucket)
            for rank, one in enumerate(ranked)
        ]
        # Frames come in the files' order, so the first of equal rows is the one to keep.
        rows = pl.concat(frames) if frames else pl.DataFrame()
        firsts = rows.group_by("a", "b").agg(pl.len(), pl.col("rank").first(), pl.col("index").first())
        firsts = firsts.filter(pl.col("len") > 1).rename({"rank": "first", "index": "row"}).drop("len")
        again = rows.join(firsts, on=["a", "b"], how="inner")
        other = (pl.col("rank") != pl.col("first")) | (pl.col("index") != pl.col("row"))
        found.append(again.filter(other).select(empty.columns))
    every = pl.concat(found).sort("first", "row").unique(["rank", "index"], keep="first")
    names = pl.Series("file", [file.url for _, file in ranked], pl.String)
    tables = {}
    for rank, (key, _) in enumerate(ranked):
        mine = every.filter(pl.col("rank") == rank).sort("index")
        tables[key] = mine.select("index", names.gather(mine["first"]).alias("file"), "row").to_arrow()
    return tables


def _band(sink: Store, output: str, key: str, file: File, kind: Kind, band: int) -> np.ndarray:
    """One hash of each row of a file."""
    url, (bands, words) = _url(output, f"{key}.hashes"), _KEPT[kind]
    size = 8 * words * file.num_rows
    with sink.open(url) as stream:
        found = stream.seek(0, io.SEEK_END)
        if found != bands * size:
            raise CorruptOutputError(f"{url}: holds {found} bytes, not {bands * size}; remove it and submit again")
        stream.seek(band * size)
        return np.frombuffer(stream.read(size), "<u8").reshape(file.num_rows, words)


def _frame(hashes: np.ndarray, rank: int) -> pl.DataFrame:
    """The compared rows of one file, in their order."""
    import polars as pl

    frame = pl.DataFrame({"a": hashes[:, 0], "b": hashes[:, -1]}).with_row_index("index")
    frame = frame.filter((pl.col("a") != 0) | (pl.col("b") != 0))
    return frame.with_columns(pl.lit(rank, pl.UInt32).alias("rank"))


def _encode(table: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue()
