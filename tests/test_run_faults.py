"""Whole runs whose storage or process dies: each ends with a clear word and a code, and resumes to the same rows."""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
import yaml
from commandline import batchgen
from faultproxy import Fault, FaultProxy

from batchgen.store import connect

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = 3


def submit(job: Path, *, code: int = 0, began: Callable[[int], None] = lambda pid: None) -> str:
    """What it wrote to stderr; `began` is called with its process id when it begins."""
    done = batchgen("submit", job, "--log", "plain", began=began)
    assert done.returncode == code, done.stderr
    return done.stderr


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
    gcs_folder: tuple[str, dict[str, Any]], faults: FaultProxy, tmp_path: Path
) -> None:
    """Every call of a job in turn, before it takes place and, of those that write, between deed and answer."""
    base, options = gcs_folder
    proxy = {"endpoint_url": faults.url}
    submit(job_file(tmp_path, f"{base}/undisturbed", **proxy))
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
            code = batchgen("submit", job, began=victims.put).returncode
            # The lease's beats come when they come, so the last calls of one run may be missing in another.
            assert code == -signal.SIGKILL or (code == 0 and faults.faults[0].times == 1), f"{call}: {do}"
            killed += code != 0
            faults.faults = []
            submit(job)
            assert table(output, **options) == expected, f"killed in {call}: {do}"
            left = [url for url in connect(output, options).find(output) if "/journal/" in url]
            assert left == [], f"killed in {call}: {do}"
    assert killed > len(calls)


def requests(log: list[str]) -> Counter[str]:
    """How many there were of each kind."""
    kinds = {"POST": "put", "DELETE": "delete"}
    return Counter(kinds.get(line.split()[0]) or ("list" if "/o?" in line else "get") for line in log)


def test_requests_of_a_shard_do_not_grow_with_what_is_finished(
    gcs_folder: tuple[str, dict[str, Any]], faults: FaultProxy, tmp_path: Path
) -> None:
    """One new shard beside few and beside many, and a submit that finds nothing to do."""
    new, nothing = [], []
    for shards in (2, 32):
        folder, output = tmp_path / f"{shards}", f"{gcs_folder[0]}/{shards}"
        folder.mkdir()
        job = job_file(folder, output, rows=shards, rows_per_part=1, endpoint_url=faults.url)
        sections = yaml.safe_load(job.read_text())
        sections["input"]["path"] = str(folder)
        job.write_text(yaml.safe_dump(sections))
        submit(job)
        prompts = pl.read_parquet(folder / f"prompts-{shards}.parquet").head(1)
        prompts.with_columns(id=pl.lit("new")).write_parquet(folder / "prompts-new.parquet")
        for counts in (new, nothing):
            faults.log.clear()
            submit(job)
            counts.append(requests(faults.log))
        assert len(table(output, endpoint_url=faults.url)) == shards + 1
    # The lease may beat once more in one of two runs: three requests.
    assert all(sum((many - few).values()) <= 3 for few, many in (new, nothing)), (new, nothing)


def test_listings_that_lag_behind_cost_no_row(
    gcs_folder: tuple[str, dict[str, Any]], faults: FaultProxy, tmp_path: Path
) -> None:
    """Every listing is as old as the lag; a run is killed in it, and resumed."""
    folder, options = gcs_folder
    submit(job_file(tmp_path, f"{folder}/undisturbed", **options))
    faults.lag_s = 2.0
    job, victims = job_file(tmp_path, f"{folder}/lagging", endpoint_url=faults.url), queue.Queue[int]()
    faults.faults = [Fault("POST .*upload", "reset", skip=7, strike=lambda: os.kill(victims.get(), signal.SIGKILL))]
    try:
        submit(job, code=-signal.SIGKILL, began=victims.put)
        submit(job)
        submit(job)
    finally:
        faults.lag_s = 0.0
    assert table(f"{folder}/lagging", **options) == table(f"{folder}/undisturbed", **options)


def test_repeated_requests_are_told(gcs_folder: tuple[str, dict[str, Any]], faults: FaultProxy, tmp_path: Path) -> None:
    faults.faults = [Fault("", "status", skip=skip) for skip in (1, 5, 9)]
    said = submit(job_file(tmp_path, gcs_folder[0], endpoint_url=faults.url))
    assert said.count("trying again") == 3
    summary = connect(gcs_folder[0], gcs_folder[1]).read(f"{gcs_folder[0]}/__batchgen/summary.json")
    assert json.loads(summary)["retries"] == 3


def test_a_job_that_loses_its_bucket_says_so_and_goes_on_when_it_is_back(
    gcs: str, faults: FaultProxy, tmp_path: Path
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
    said = submit(job, code=1)
    assert "does the bucket exist?" in said
    assert "Traceback" not in said
    store.fs.mkdir(name)
    submit(job)
    assert len(table(f"{bucket}/out", **options)) == ROWS


GCS_DENIES = b'{"error": {"code": 403, "message": "does not have storage.objects.create access"}}'
GCS_EXPIRED = b'{"error": {"code": 401, "message": "the token has expired"}}'
S3_EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (403, GCS_DENIES, "does not have storage.objects.create access"),
        (401, GCS_EXPIRED, "the token has expired"),
        (400, S3_EXPIRED, "The provided token has expired"),
    ],
    ids=["gcs-403", "gcs-401", "s3"],
)
def test_a_job_whose_credentials_end_says_so_at_once_and_goes_on_with_others(
    gcs: str, s3: dict[str, Any], tmp_path: Path, status: int, body: bytes, expected: str
) -> None:
    scheme, options = ("s3", s3) if body == S3_EXPIRED else ("gs", {"endpoint_url": gcs})
    folder = f"{scheme}://batchgen-tests/{uuid.uuid4().hex}"
    with FaultProxy(options["endpoint_url"]).serve() as faults:
        job = job_file(tmp_path, folder, **options | {"endpoint_url": faults.url})
        faults.faults = [Fault("", "status", skip=20, times=10_000, status=status, body=body)]
        began = time.monotonic()
        said = submit(job, code=1)
        assert time.monotonic() - began < 20
        assert expected in said
        assert "Traceback" not in said
        faults.faults = []
        submit(job)
    assert len(table(folder, **options)) == ROWS


def test_an_output_whose_state_is_removed_midway_is_not_taken_for_another_run(tmp_path: Path) -> None:
    """Nobody would hear of a code that says: run again."""
    job = job_file(tmp_path, f"{tmp_path}/out", rows=400, rows_per_part=4)
    killed = threading.Thread(target=_remove_state, args=(tmp_path / "out",))
    killed.start()
    said = submit(job, code=1)
    killed.join()
    assert "lease.json: is gone, removed by somebody" in said
    submit(job)
    assert len(table(f"{tmp_path}/out")) == 400


def _remove_state(output: Path) -> None:
    while len(list(output.glob("part-*"))) < 3:
        time.sleep(0.005)
    (output / "__batchgen/lease.json").unlink()


def test_a_full_disk_is_named_and_the_job_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses to write on, in the midst of a file."""
    job = job_file(tmp_path, f"{tmp_path}/out", rows=400, rows_per_part=400)
    job.write_text(job.read_text().replace("journal_rows: 1", "journal_rows: 100000"))

    def submit_in(room: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "batchgen", "submit", str(job)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
            capture_output=True,
            text=True,
            check=False,
        )

    full = submit_in(8192)
    assert full.returncode == 1
    assert "error: create " in full.stderr
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "out").glob("*.parquet"))
    assert submit_in(1 << 30).returncode == 0
    assert len(table(f"{tmp_path}/out")) == 400


def test_a_row_that_kills_its_process_is_found_by_submitting_again(tmp_path: Path) -> None:
    """A worker in process has nobody to begin again but who submits: the journal remembers."""
    rows = 40
    job = job_file(tmp_path, f"{tmp_path}/out", rows=rows, rows_per_part=20)
    sections = yaml.safe_load(job.read_text())
    sections |= {"engine": {"kind": "rehearsal", "options": {"kill": ["row-0013"]}}, "max_error_rate": 0.1}
    job.write_text(yaml.safe_dump(sections))
    codes = []
    while not codes or codes[-1] != 0:
        codes.append(batchgen("submit", job).returncode)
        assert len(codes) < 12
    assert set(codes[:-1]) == {-signal.SIGKILL}
    failed = [row for row in table(f"{tmp_path}/out") if row["status"] != "ok"]
    assert [row["row_id"] for row in failed] == ["row-0013"]
    assert len(table(f"{tmp_path}/out")) == rows


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    said = submit(job_file(tmp_path, "/sys/batchgen/out"), code=1)
    assert "error: create /sys/batchgen/out/__batchgen/lease.json: " in said
    assert "Traceback" not in said
