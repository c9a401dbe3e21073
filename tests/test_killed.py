"""Real processes, killed with SIGKILL at random moments of a put, a create, a journal flush and a commit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen import write
from batchgen.journal import Journal
from batchgen.record import Shard
from batchgen.store import connect

Anywhere = tuple[str, dict[str, Any]]

SHARD = Shard(3, "gs://in/a.parquet", "7", 0, 100, "f" * 16)

# A writer on disk that is killed while it overwrites one object and creates others, as fast as it can.
WRITER = """
import itertools, sys
from batchgen.store import connect
folder = sys.argv[1]
store = connect(folder)
for i in itertools.count():
    body = str(i % 10).encode() * 3_000_000
    store.put(f"{folder}/put", body)
    assert store.create(f"{folder}/created/{i:06d}", body)
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_whole_objects_on_disk(tmp_path: Path) -> None:
    store, rng = connect(str(tmp_path)), random.Random(0)
    for turn in range(5):
        folder = f"{tmp_path}/{turn}"
        with subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            writer.kill()
            written = writer.stdout.read().split()
        bodies = {url: store.read(url) for url in store.find(folder)}
        assert {len(body) for body in bodies.values()} == {3_000_000}
        assert all(body == body[:1] * len(body) for body in bodies.values())
        assert len(bodies) - 1 in {len(written) + 1, len(written) + 2}, "an answered create is there"
        assert store.create(f"{folder}/created/{len(bodies) + 9:06d}", b"another writer goes on")
        store.remove(folder)
        assert not Path(folder).exists(), "what the killed writer left is gone too"


# Imports once, then forks worker after worker and kills each at a random moment; a worker prints a row's number when
# the flush that holds it has returned.
KILLED_WORKERS = """
import json, os, random, signal, sys, time
import pyarrow as pa
from batchgen import filesystems, journal
from batchgen.journal import Journal
from batchgen.record import Shard
from batchgen.store import connect

folder, options, longest_s = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
shard = Shard(3, "gs://in/a.parquet", "7", 0, 100, "f" * 16)
schema = pa.schema([("row_id", pa.string()), ("sample", pa.int32()), ("error_type", pa.string())])
filesystems.gcs()
if folder.startswith("s3"):
    import s3fs
if folder.startswith("az"):
    filesystems.azure()
journal._decode(journal._encode(schema.empty_table()))  # Arrow imports pandas at the first use

def work():
    journal = Journal.claim(connect(folder, options), folder, shard, schema, worker="w")
    waiting = []
    for i in range(10_000):
        if (f"r{i}", 0) not in journal.done:
            journal.add({"row_id": f"r{i}", "sample": 0})
            waiting.append(i)
            if i % 3 == 0:
                journal.flush()
                os.write(1, "".join(f"{i}\\n" for i in waiting).encode())
                waiting = []

rng = random.Random(1)
for turn in range(10):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    time.sleep(rng.uniform(0, longest_s))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_killed_workers_lose_no_flushed_row(anywhere: Anywhere) -> None:
    folder, options = anywhere
    longest_s = {"gs": 0.3, "s3": 2.0, "az": 3.0}.get(folder[:2], 0.1)  # a client of S3 takes its time to start
    command = [sys.executable, "-c", KILLED_WORKERS, folder, json.dumps(options), str(longest_s)]
    answered = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout.split()
    schema = pa.schema([("row_id", pa.string()), ("sample", pa.int32()), ("error_type", pa.string())])
    final = Journal.claim(connect(folder, options), folder, SHARD, schema, worker="w")
    assert len(answered) == len(set(answered)) > 30, "workers got somewhere, and none did again what was answered"
    assert {(f"r{i}", 0) for i in answered} <= final.done
    assert final.table().num_rows == len(final.done)


# Imports once, then forks committer after committer of ever new shards and kills each at a random moment.
KILLED_COMMITTERS = """
import json, os, random, signal, sys, time
import pyarrow as pa
from batchgen import filesystems, write
from batchgen.record import Shard
from batchgen.store import connect

folder, options, longest_s = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
rows = pa.table({"row_id": [f"r{i}" for i in range(4000)], "sample": [0] * 4000, "text": [os.urandom(400)] * 4000})
write._encode(rows, {})  # Arrow imports pandas at the first use
filesystems.gcs()
if folder.startswith("s3"):
    import s3fs
if folder.startswith("az"):
    filesystems.azure()

def work(turn):
    store = connect(folder, options)
    for i in range(10_000):
        shard = Shard(turn, "file", "1", i, i + 1, "f")
        if write.commit(store, folder, shard, rows, metadata={"turn": str(turn)}):
            os.write(1, f"{shard.key}\\n".encode())

rng = random.Random(2)
for turn in range(8):
    child = os.fork()
    if child == 0:
        work(turn)
        os._exit(0)
    time.sleep(rng.uniform(0, longest_s))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_killed_committers_leave_whole_parts_and_none_twice(anywhere: Anywhere) -> None:
    folder, options = anywhere
    longest_s = {"gs": 0.5, "s3": 2.0, "az": 3.0}.get(folder[:2], 0.25)
    command = [sys.executable, "-c", KILLED_COMMITTERS, folder, json.dumps(options), str(longest_s)]
    answered = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout.split()
    store = connect(*anywhere)
    found = write.parts(store, folder)
    assert len(answered) == len(set(answered)) > 10
    assert set(answered) <= set(found)
    for url in found.values():
        whole = pq.ParquetFile(pa.BufferReader(store.read(url)), page_checksum_verification=True).read()
        assert whole.num_rows == 4000
    rows = pa.table({"row_id": ["r0"], "sample": [0]})
    # A committer that died between the note and the part stands in nobody's way.
    for i in range(len(found) + 1):
        shard = Shard(99, "file", "1", i, i + 1, "f")
        assert write.commit(store, folder, shard, rows, metadata={}) is (shard.key not in found)
    assert set(write.parts(store, folder)) >= {Shard(0, "file", "1", i, i + 1, "f").key for i in range(len(found) + 1)}
