"""A job that is killed at any moment and submitted again ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml

from batchgen import spec
from batchgen.job import progress

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "examples/prompts/quickstart.parquet"
KILLS = 10


def job_file(folder: Path, **changes) -> Path:
    """A job over the quickstart's prompts in `folder`; `changes` replace whole sections."""
    sections = {
        "version": 1,
        "name": "resume",
        "input": {"path": str(PROMPTS), "messages": "messages", "id": "id", "keep": ["source"]},
        "model": {"target": "demo:smollm2-135m", "draft": str(ROOT / "examples/smollm2"), "dtype": "float32"},
        "speculation": {"tree": {"depth": 3, "width": 1}},
        "sampling": {"max_tokens": 24},
        "batch_size": 8,
        "checkpoint": {"rows_per_part": 24, "journal_rows": 4, "journal_seconds": 1.0},
        "output": {"path": str(folder / "out")},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(sections | changes))
    return file


def rehearsal(folder: Path, rows: int, **options) -> Path:
    """A job without a model, so that its runner can be watched closely."""
    table = pq.read_table(PROMPTS).slice(0, 1).to_pylist()[0]
    source = folder / "prompts.parquet"
    pl.DataFrame([table | {"id": f"row-{i}"} for i in range(rows)]).write_parquet(source)
    return job_file(
        folder,
        input={"path": str(source), "messages": "messages", "id": "id"},
        engine={"kind": "rehearsal", "options": options},
        speculation={"tree": "auto"},
        checkpoint={"rows_per_part": rows // 3, "journal_rows": 7, "journal_seconds": 30.0},
    )


def batchgen(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "batchgen", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "batchgen", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(output: Path) -> list[dict]:
    return pl.read_parquet(output / "*.parquet").sort("row_id").to_dicts()


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    """Until the job says that it is planned; what follows is loading and generating."""
    assert process.stderr is not None
    for line in process.stderr:
        if "rows to do" in line:
            return
    raise AssertionError(f"ended early with {process.wait()}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_lose_no_row_double_none_and_change_no_text(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    shortest = pl.col("messages").list.first().struct.field("content").str.len_chars()
    pl.read_parquet(PROMPTS).sort(shortest, "id").head(40).write_parquet(tmp_path / "prompts.parquet")
    source = {"path": str(tmp_path / "prompts.parquet"), "messages": "messages", "id": "id", "keep": ["source"]}
    assert batchgen("submit", job_file(undisturbed, input=source)).returncode == 0
    job = job_file(killed, input=source)
    rng, journalled = random.Random(11), 0
    for kill in range(KILLS):
        process = start("submit", job, "--log", "plain")
        wait_until_ready(process)
        time.sleep(rng.uniform(1.0, 7.0))
        process.kill()
        process.communicate()
        found = progress(spec.load(job))
        safe = found.rows_done + found.rows_journalled
        assert safe >= journalled, f"kill {kill} took journalled rows away"
        journalled = safe
    assert journalled > 0, "the kills came while rows were being finished"
    last = batchgen("submit", job)
    assert last.returncode == 0, last.stderr
    expected, found = rows(undisturbed / "out"), rows(killed / "out")
    assert [r["row_id"] for r in found] == [r["row_id"] for r in expected]
    assert len({r["row_id"] for r in found}) == 40
    assert [r["completion"] for r in found] == [r["completion"] for r in expected]
    assert [r["completion_token_ids"] for r in found] == [r["completion_token_ids"] for r in expected]
    assert not list((killed / "out").rglob("seg-*")), "the journal is gone once its rows are in parts"


def test_a_kill_costs_at_most_the_journal_interval(tmp_path):
    """Each kill may cost the unwritten interval (6 rows) and what ended in the step that it met."""
    job = rehearsal(tmp_path, rows=90, step_s=0.01, tokens_per_step=64)
    log, rng = tmp_path / "finished.log", random.Random(5)
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, Path(__file__).parent / "resume_driver.py", job, log])
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size == before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.wait()
    subprocess.run([sys.executable, Path(__file__).parent / "resume_driver.py", job, log], check=True)
    assert [row["row_id"] for row in rows(tmp_path / "out")] == sorted(f"row-{i}" for i in range(90))
    finished = log.read_text().split()
    assert len(set(finished)) == 90
    redone = len(finished) - 90
    # 6 rows that wait for a seventh, and 8 that ended in the very step.
    assert redone <= KILLS * (6 + 8), f"{redone} rows redone in {KILLS} kills"


def test_a_second_submit_does_nothing_and_takes_seconds(tmp_path):
    job = rehearsal(tmp_path, rows=30)
    assert batchgen("submit", job).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    began = time.monotonic()
    again = batchgen("submit", job, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["ran"] is False
    assert json.loads(again.stdout)["ok"] == 30
    assert time.monotonic() - began < 30
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_next_submit_goes_on(tmp_path, number):
    job = rehearsal(tmp_path, rows=60, step_s=0.1, tokens_per_step=64)
    process = start("submit", job, "--log", "plain")
    wait_until_ready(process)
    while not list((tmp_path / "out").rglob("seg-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    [drained] = re.findall(r"drained: (\d+) rows", errors)
    found = json.loads(batchgen("status", job, "--json").stdout)
    assert found["rows_journalled"] == int(drained) > 0, "what was finished was written before the end"
    last = batchgen("submit", job)
    assert last.returncode == 0
    assert "taken over from an earlier run's journal" in last.stdout
    assert len(rows(tmp_path / "out")) == 60
