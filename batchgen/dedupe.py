"""Equal prompts over a whole input: which rows ask what an earlier row asks, found before a run, told to its workers.

Each file's rows are hashed once, 16 bytes each, and kept in the output folder, so that a new file costs only itself.
Files count in the order in which they were first seen: one that comes later and sorts before cannot make a finished
row a repetition. Equal is what would be generated from the same messages under the same sampling, character for
character; a row that is an error by itself neither repeats nor is repeated.

Nearly equal (`near`, 128 bytes each) is what shares a band of its MinHash signature (rensa's, of groups of 5 characters
of what is said to the target, in lower case; locality-sensitive hashing, Leskovec et al., Mining of Massive Datasets,
3.4): with 16 bands of 8 values, of two texts that have a share s of their groups in common, with a chance of
1 - (1 - s^8)^16: 0.95 at 0.8, 0.06 at 0.5. System messages must be equal.
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
    method = kind if kind == "exact" else f"near {_rensa().RMinHash.ALGORITHM_VERSION}"
    which = (method, names, sorted(columns.sampling.items()))
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
    for row in screen.judged(read.Reader(source).rows(shard, bare, sampling)):
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


def _repeated(
    sink: Store, output: str, ranked: Sequence[tuple[str, File]], kind: Kind, check: Callable[[], None]
) -> dict[str, pa.Table]:
    """For each key the rows that repeat an earlier one: `index`, and that one's `file` and `row`."""
    import polars as pl

    starts = np.cumsum([0, *(file.num_rows for _, file in ranked)])
    again, first = _greedy(*_alike(sink, output, ranked, kind, starts, check))
    rank = np.searchsorted(starts, first, side="right") - 1
    names = pl.Series("file", [file.url for _, file in ranked], pl.String)
    tables = {}
    for (key, _), low, high in zip(ranked, starts[:-1], starts[1:], strict=True):
        at = slice(*np.searchsorted(again, [low, high]))
        facts = {"index": (again[at] - low).astype(np.uint32), "file": names.gather(rank[at])}
        tables[key] = pl.DataFrame(facts | {"row": (first[at] - starts[rank[at]]).astype(np.uint32)}).to_arrow()
    return tables


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


def _greedy(at: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that share a group with an earlier one that stays, and that one; `at` is in order.

    So a row that is left out leaves nobody else out: likeness does not pass along.
    """
    stays = np.full(1 + int(group.max(initial=0)), -1, np.int64)
    again, first = [], []
    edges = np.flatnonzero(np.diff(at.astype(np.int64), prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges):
        mine = group[begin:end]
        known = stays[mine]
        if (known >= 0).any():
            again.append(int(at[begin]))
            first.append(int(known[known >= 0].min()))
        else:
            stays[mine] = at[begin]
    return np.array(again, np.int64), np.array(first, np.int64)


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
