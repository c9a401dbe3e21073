"""Parts: one to a shard whoever commits, whole or absent, and open to every Parquet reader as the folder stands."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from faultproxy import Fault

from batchgen import record, write
from batchgen.errors import CorruptOutputError
from batchgen.journal import Journal
from batchgen.record import Shard
from batchgen.store import STATE_FOLDER, connect

if TYPE_CHECKING:
    from pathlib import Path

    from faultproxy import FaultProxy

Anywhere = tuple[str, dict[str, Any]]

SCHEMA = record.output_schema([pa.field("source", pa.string()), pa.field("weight", pa.float64())])
SHARD = Shard(3, "gs://in/a.parquet", "7", 0, 100, "f" * 16)
UPLOAD, DOWNLOAD = "^POST /upload/", "^GET /download/.*/part-"


def table(num_rows: int = 5, *, start: int = 0, worker: str = "w") -> pa.Table:
    rows = [
        dict.fromkeys(SCHEMA.names)
        | {"row_id": f"r{i}", "sample": 0, "completion": f"{i} " * 50, "weight": float("nan"), "worker": worker}
        for i in range(start, start + num_rows)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_a_part_holds_its_rows_in_order_with_checksums_and_its_origin(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    rows = table(3000).take(random.Random(0).sample(range(3000), 3000))
    assert write.commit(store, folder, SHARD, rows, metadata={"fingerprint": "f" * 16})
    url = f"{folder}/part-00003-{SHARD.key}.parquet"
    assert write.parts(store, folder) == {SHARD.key: url}
    with store.open(url) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        found = parquet.read()
        assert found["row_id"].to_pylist() == rows["row_id"].to_pylist()
        assert found.drop(["weight"]).equals(rows.drop(["weight"]))
        assert found.schema.equals(SCHEMA)
        assert parquet.num_row_groups == 3
        assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
        assert parquet.metadata.metadata[b"batchgen.fingerprint"] == b"f" * 16
        assert parquet.metadata.metadata[b"batchgen.shard"] == SHARD.key.encode()
    data = bytearray(store.read(url))
    data[len(data) // 10] ^= 1
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(pa.BufferReader(bytes(data)), page_checksum_verification=True).read()


def test_a_shard_has_one_part_whatever_its_ordinal(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    assert write.commit(store, folder, SHARD, table(worker="first"), metadata={})
    for index in (3, 4):
        again = dataclasses.replace(SHARD, index=index)
        assert not write.commit(store, folder, again, table(worker="second"), metadata={})
    assert write.commit(store, folder, dataclasses.replace(SHARD, start=100, stop=101), table(1), metadata={})
    assert len(write.parts(store, folder)) == 2
    (url,) = (url for key, url in write.parts(store, folder).items() if key == SHARD.key)
    assert set(pq.read_table(pa.BufferReader(store.read(url)))["worker"].to_pylist()) == {"first"}


class Interrupted:
    """A real store at which something happens once, right before a verb is used on a part."""

    def __init__(self, store: Any, verb: str, then: Any) -> None:
        self._store, self._verb, self._then = store, verb, then

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._store, name)

        def call(url: Any, *args: Any, **kwargs: Any) -> Any:
            if name == self._verb and "/part-" in url and (then := self._then):
                self._then = None
                then(url)
            return real(url, *args, **kwargs)

        return call


def test_a_late_worker_that_counts_otherwise_does_not_double_the_rows(anywhere: Anywhere) -> None:
    """It saw no part, fell asleep before its PUT, and wakes when another submit has committed under another ordinal."""
    store, folder = connect(*anywhere), anywhere[0]
    other = dataclasses.replace(SHARD, index=8)
    late = Interrupted(store, "create", lambda _: write.commit(store, folder, other, table(), metadata={}))
    assert not write.commit(late, folder, SHARD, table(), metadata={})  # type: ignore[arg-type]
    assert len(write.parts(store, folder)) == 1
    assert pl.read_parquet(pa.BufferReader(store.read(*write.parts(store, folder).values()))).height == 5


@pytest.mark.parametrize("indices", [[3] * 8, list(range(8))], ids=["one ordinal", "many ordinals"])
def test_exactly_one_of_many_committers_wins(anywhere: Anywhere, indices: list[int]) -> None:
    folder = anywhere[0]
    with ThreadPoolExecutor(8) as threads:
        shards = [dataclasses.replace(SHARD, index=index) for index in indices]
        won = list(
            threads.map(lambda shard: write.commit(connect(*anywhere), folder, shard, table(), metadata={}), shards)
        )
    assert won.count(True) == 1
    assert list(write.parts(connect(*anywhere), folder)) == [SHARD.key]


def test_a_row_that_stands_twice_is_refused(tmp_path: Path) -> None:
    store = connect(str(tmp_path))
    with pytest.raises(AssertionError, match="a row stands twice"):
        write.commit(store, str(tmp_path), SHARD, pa.concat_tables([table(3), table(1)]), metadata={})
    assert store.find(str(tmp_path)) == {}


def test_parts_are_told_from_everything_else(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    assert write.parts(store, folder) == {}
    key = "0123456789abcdef"
    for name in (
        f"part-00000-{key[:-1]}.parquet",
        f"part-0-{key}.parquet",
        f"part-00000-{key}.parquet.tmp",
        f"x-part-00000-{key}.parquet",
        f"{STATE_FOLDER}/part-00000-{key}.parquet",
        "part-00000-other.parquet",
    ):
        store.put(f"{folder}/{name}", b"")
    assert write.parts(store, folder) == {}
    store.put(f"{folder}/part-100000-{key}.parquet", b"")
    assert write.parts(store, f"{folder}/") == {key: f"{folder}/part-100000-{key}.parquet"}
    store.put(f"{folder}/part-00001-{key}.parquet", b"")
    with pytest.raises(
        CorruptOutputError, match=rf"part-100000-{key}.parquet: holds the same rows as .*part-00001-{key}"
    ):
        write.parts(store, folder)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(UPLOAD, "status", times=2),
        Fault(UPLOAD, "applied", times=1, skip=1),  # the part itself; before it goes the note of its name
        Fault(UPLOAD, "applied", times=2, status=None),
        Fault(DOWNLOAD, "truncate"),
        Fault(DOWNLOAD, "corrupt"),  # one bad answer is not a bad part
    ],
    ids=lambda fault: f"{fault.match.split('/')[1]}-{fault.do}",
)
def test_a_commit_outlives_faults(faults: FaultProxy, gcs_folder: Anywhere, fault: Fault) -> None:
    folder = gcs_folder[0]
    store = connect(folder, {"endpoint_url": faults.url})
    faults.faults = [dataclasses.replace(fault)]
    assert write.commit(store, folder, SHARD, table(), metadata={})
    assert faults.faults[0].times == 0
    (url,) = write.parts(store, folder).values()
    assert pq.read_table(pa.BufferReader(store.read(url))).num_rows == 5


def test_a_part_that_reads_back_otherwise_is_removed_and_named(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    damaged = Interrupted(store, "read", lambda url: store.put(url, store.read(url)[:-1] + b"!"))
    with pytest.raises(CorruptOutputError, match=rf"^{folder}/{SHARD.part_name}: does not read back as written"):
        write.commit(damaged, folder, SHARD, table(), metadata={})  # type: ignore[arg-type]
    assert write.parts(store, folder) == {}
    gone = Interrupted(store, "read", lambda url: store.delete([url]))
    with pytest.raises(CorruptOutputError, match="does not read back as written"):
        write.commit(gone, folder, SHARD, table(), metadata={})  # type: ignore[arg-type]
    assert write.commit(store, folder, SHARD, table(), metadata={})


def test_a_part_that_was_replaced_before_it_was_read_back_is_left_alone(anywhere: Anywhere) -> None:
    """A run that slept between its PUT and reading back wakes when another has done the part's failed rows again."""
    store, folder = connect(*anywhere), anywhere[0]
    write.commit(store, folder, SHARD, table(worker="later"), metadata={})
    [url] = write.parts(store, folder).values()
    later = store.read(url)
    store.delete([url])
    late = Interrupted(store, "read", lambda url: store.put(url, later))
    assert write.commit(late, folder, SHARD, table(), metadata={})  # type: ignore[arg-type]
    assert store.read(url) == later
    part = write.load(store, url, table().schema)
    late = Interrupted(store, "read", lambda url: store.put(url, later))
    assert write.replace(late, part, SHARD, table(), metadata={})  # type: ignore[arg-type]
    assert store.read(url) == later


def test_a_damaged_name_is_named(tmp_path: Path) -> None:
    store, note = connect(str(tmp_path)), f"{tmp_path}/{STATE_FOLDER}/names/{SHARD.key}"
    store.put(note, b"\xffpart-")
    with pytest.raises(CorruptOutputError, match=f"^{note}: holds .* not the name of this shard's part; remove it"):
        write.commit(store, str(tmp_path), SHARD, table(), metadata={})


@pytest.fixture
def left_behind(tmp_path: Path) -> str:
    """An output folder as a killed run leaves it: two parts, another's journal, job files, an unfinished write."""
    store, folder = connect(str(tmp_path / "out")), str(tmp_path / "out")
    for i in range(2):
        shard = dataclasses.replace(SHARD, index=i, start=5 * i, stop=5 * i + 5)
        assert write.commit(store, folder, shard, table(start=5 * i), metadata={})
    journal = Journal.claim(store, folder, dataclasses.replace(SHARD, start=10, stop=15), SCHEMA, worker="w")
    for row in table(3, start=10).to_pylist():
        journal.add(row)
        journal.flush()
    for name in ("job.json", "summary.json", "report.html", "lease.json"):
        store.put(f"{folder}/{STATE_FOLDER}/{name}", b'{"n": 1}')
    (tmp_path / "out" / ".tmp-0123").write_bytes(b"PAR1...")
    return folder


ROWS = [f"r{i}" for i in range(10)]


def test_polars_reads_the_folder_in_input_order(left_behind: str) -> None:
    assert pl.read_parquet(f"{left_behind}/*.parquet")["row_id"].to_list() == ROWS
    assert pl.scan_parquet(f"{left_behind}/**/*.parquet").collect()["row_id"].to_list() == ROWS
    # Polars refuses a bare folder that holds anything besides Parquet, at any depth; it says so, and names the remedy.
    with pytest.raises(pl.exceptions.InvalidOperationError, match="glob pattern"):
        pl.scan_parquet(left_behind).collect()


def test_pyarrow_reads_the_folder(left_behind: str) -> None:
    assert pa.dataset.dataset(left_behind, format="parquet").to_table()["row_id"].to_pylist() == ROWS
    assert pq.read_table(left_behind)["row_id"].to_pylist() == ROWS


def test_datasets_reads_the_folder(left_behind: str) -> None:
    # In a process of its own: `datasets` looks for TensorFlow and the like when it is imported, and warns.
    program = """
import json, sys, datasets
folder, cache = sys.argv[1:]
datasets.disable_progress_bars()
ways = [
    datasets.load_dataset(folder, cache_dir=cache),
    datasets.load_dataset("parquet", data_dir=folder, cache_dir=cache),
    datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", cache_dir=cache),
]
print(json.dumps([{split: list(rows["row_id"]) for split, rows in way.items()} for way in ways]))
"""
    command = [sys.executable, "-W", "ignore", "-c", program, left_behind, f"{left_behind}-cache"]
    env = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": f"{left_behind}-home"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    assert json.loads(out) == [{"train": ROWS}] * 3
