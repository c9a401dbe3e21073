"""Whole runs whose storage or process dies: each ends with a clear word and a code, and resumes to the same rows."""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
import yaml
from faultproxy import Fault

from batchgen.store import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faultproxy import FaultProxy

ROWS = 3


class Zygote:
    """`submit`s in forks of a process that has all imported; `said` is what the last one wrote to stderr."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self.said = ""

    def submit(self, job: Path, victims: queue.Queue[int] | None = None) -> int:
        """The exit code; the process is put into `victims` when it begins."""
        before = self._log.stat().st_size
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(["submit", str(job), "--log", "plain"]), file=self._process.stdin, flush=True)
        pid = int(self._process.stdout.readline())
        if victims is not None:
            victims.put(pid)
        code = int(self._process.stdout.readline())
        self.said = self._log.read_bytes()[before:].decode()
        return code


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    log = tmp_path_factory.mktemp("zygote") / "log"
    command = [sys.executable, Path(__file__).with_name("zygote.py")]
    with (
        log.open("ab") as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        yield Zygote(process, log)
        assert process.stdin is not None
        process.stdin.close()


def job_file(folder: Path, output: str, rows: int = ROWS, rows_per_part: int = 2, **more: Any) -> Path:
    """Shards of `rows_per_part` rows each; a segment for every row. `more` goes into output.storage_options."""
    turns = [[{"role": "user", "content": f"Say {i}."}] for i in range(rows)]
    source = folder / f"prompts-{rows}.parquet"
    if not source.exists():
        pl.DataFrame({"id": [f"row-{i:04d}" for i in range(rows)], "messages": turns}).write_parquet(source)
    sections = {
        "version": 1,
        "name": "faults",
        "input": {"path": str(source), "messages": "messages", "id": "id"},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal"},
        "sampling": {"max_tokens": 24},
        "batch_size": 2,
        "checkpoint": {"rows_per_part": rows_per_part, "journal_rows": 1},
        "output": {"path": output, "storage_options": more},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def table(output: str, **options: Any) -> list[dict[str, Any]]:
    """What makes a row, of every row in the output."""
    store = connect(output, options)
    parts = [pl.read_parquet(store.read(url)) for url in store.find(output, recursive=False)]
    return pl.concat(parts).select("row_id", "completion", "completion_token_ids", "status", "attempts").to_dicts()


def test_a_kill_in_any_storage_call_is_resumed_cleanly(
    zygote: Zygote, gcs_folder: tuple[str, dict[str, Any]], faults: FaultProxy, tmp_path: Path
) -> None:
    """Every call of a job in turn, before it takes place and, of those that write, between deed and answer."""
    base, options = gcs_folder
    proxy = {"endpoint_url": faults.url}
    assert zygote.submit(job_file(tmp_path, f"{base}/undisturbed", **proxy)) == 0, zygote.said
    expected, calls = table(f"{base}/undisturbed", **options), list(faults.log)
    assert [row["row_id"] for row in expected] == [f"row-{i:04d}" for i in range(ROWS)]
    killed = 0
    for i, call in enumerate(calls):
        for do in ("reset", "applied") if call.startswith(("POST", "DELETE")) else ("reset",):
            output, victims = f"{base}/{i}-{do}", queue.Queue[int]()
            job = job_file(tmp_path, output, **proxy)

            def strike(victims: queue.Queue[int] = victims) -> None:
                os.kill(victims.get(timeout=30), signal.SIGKILL)

            faults.faults = [Fault("", do, skip=i, status=None, strike=strike)]
            code = zygote.submit(job, victims)
            # The lease's beats come when they come, so the last calls of one run may be missing in another.
            assert code == -signal.SIGKILL or (code == 0 and faults.faults[0].times == 1), f"{call}: {do}"
            killed += code != 0
            faults.faults = []
            assert zygote.submit(job) == 0, f"killed in {call}: {do}: {zygote.said}"
            assert table(output, **options) == expected, f"killed in {call}: {do}"
            left = [url for url in connect(output, options).find(output) if "/journal/" in url]
            assert left == [], f"killed in {call}: {do}"
    assert killed > len(calls)


def test_requests_of_a_shard_do_not_grow_with_what_is_finished(
    zygote: Zygote, gcs_folder: tuple[str, dict[str, Any]], faults: FaultProxy, tmp_path: Path
) -> None:
    counts = []
    for shards in (2, 12, 22):
        faults.log.clear()
        job = job_file(tmp_path, f"{gcs_folder[0]}/{shards}", rows=shards, rows_per_part=1, endpoint_url=faults.url)
        assert zygote.submit(job) == 0, zygote.said
        counts.append(len(faults.log))
    assert counts[2] - counts[1] <= counts[1] - counts[0] + 12, "but for a beat of the lease or two"


def test_a_job_that_loses_its_bucket_says_so_and_goes_on_when_it_is_back(
    zygote: Zygote, gcs: str, faults: FaultProxy, tmp_path: Path
) -> None:
    name, options = f"lost-{uuid.uuid4().hex}", {"endpoint_url": gcs}
    bucket = f"gs://{name}"
    store = connect(bucket, options)
    store.fs.mkdir(name)

    def lose() -> None:
        store.delete(store.find(bucket))
        store.fs.rmdir(name)

    job = job_file(tmp_path, f"{bucket}/out", endpoint_url=faults.url)
    faults.faults = [Fault(r"^POST .*/upload/", "reset", skip=8, status=None, strike=lose)]
    assert zygote.submit(job) == 1
    assert "does the bucket exist?" in zygote.said
    assert "Traceback" not in zygote.said
    store.fs.mkdir(name)
    assert zygote.submit(job) == 0, zygote.said
    assert len(table(f"{bucket}/out", **options)) == ROWS


def test_a_job_whose_credentials_end_says_so_at_once_and_goes_on_with_others(
    zygote: Zygote, gcs_folder: tuple[str, dict[str, Any]], faults: FaultProxy, tmp_path: Path
) -> None:
    folder, options = gcs_folder
    job = job_file(tmp_path, folder, endpoint_url=faults.url)
    body = b'{"error": {"code": 403, "message": "does not have storage.objects.create access"}}'
    faults.faults = [Fault("", "status", skip=20, times=10_000, status=403, body=body)]
    began = time.monotonic()
    assert zygote.submit(job) == 1
    assert time.monotonic() - began < 20
    assert "does not have storage.objects.create access" in zygote.said
    assert "Traceback" not in zygote.said
    faults.faults = []
    assert zygote.submit(job) == 0, zygote.said
    assert len(table(folder, **options)) == ROWS


def test_a_full_disk_is_named_and_the_job_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses to write on, in the midst of a file."""
    job = job_file(tmp_path, f"{tmp_path}/out", rows=400, rows_per_part=400)
    job.write_text(job.read_text().replace("journal_rows: 1", "journal_rows: 100000"))

    def submit(*, room: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "batchgen", "submit", str(job)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
            capture_output=True,
            text=True,
            check=False,
        )

    full = submit(room=8192)
    assert full.returncode == 1
    assert "error: create " in full.stderr
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "out").glob("*.parquet"))
    assert submit(room=1 << 30).returncode == 0
    assert len(table(f"{tmp_path}/out")) == 400


def test_a_row_that_kills_its_process_is_found_by_submitting_again(zygote: Zygote, tmp_path: Path) -> None:
    """A worker in process has nobody to begin again but who submits: the journal remembers."""
    rows = 40
    job = job_file(tmp_path, f"{tmp_path}/out", rows=rows, rows_per_part=20)
    sections = yaml.safe_load(job.read_text())
    sections |= {"engine": {"kind": "rehearsal", "options": {"kill": ["row-0013"]}}, "max_error_rate": 0.1}
    job.write_text(yaml.safe_dump(sections))
    codes = []
    while not codes or codes[-1] != 0:
        codes.append(zygote.submit(job))
        assert len(codes) < 12
    assert set(codes[:-1]) == {-signal.SIGKILL}
    failed = [row for row in table(f"{tmp_path}/out") if row["status"] != "ok"]
    assert [row["row_id"] for row in failed] == ["row-0013"]
    assert len(table(f"{tmp_path}/out")) == rows


def test_an_output_that_cannot_be_written_is_named(zygote: Zygote, tmp_path: Path) -> None:
    assert zygote.submit(job_file(tmp_path, "/sys/batchgen/out")) == 1
    assert "error: create /sys/batchgen/out/__batchgen/lease.json: " in zygote.said
    assert "Traceback" not in zygote.said
