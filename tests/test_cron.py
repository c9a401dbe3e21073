"""What cron runs: silent while all is well, one mail's worth when not; and the days that templates name."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import polars as pl
import pytest
import yaml

from batchgen import spec

ROOT = Path(__file__).parents[1]
NIGHT = ROOT / "examples/cron/night.sh"


def job_file(folder: Path, **options: object) -> Path:
    chat = [[{"role": "user", "content": "Say it."}]]
    pl.DataFrame({"messages": chat * 20}).write_parquet(folder / "in.parquet")
    sections = {
        "version": 1,
        "name": "night of {{ date }}",
        "input": {"path": str(folder / "in.parquet"), "messages": "messages"},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal", "options": options},
        "sampling": {"max_tokens": 16},
        "batch_size": 2,
        "output": {"path": f"{folder}/{{{{ yesterday }}}}"},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def night(job: Path, *arguments: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "BATCHGEN_LOG": str(job.with_name("log"))}
    return subprocess.Popen(
        [NIGHT, job, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_night_that_went_well_is_silent_and_logged(tmp_path: Path) -> None:
    for said in ("20 rows: 20 ok", "nothing to do"):
        run = night(job_file(tmp_path) if said.startswith("20") else tmp_path / "job.yaml")
        assert run.communicate(timeout=60)[0] == ""
        assert run.returncode == 0
        assert said in (tmp_path / "log").read_text()


def test_a_night_that_another_run_holds_up_is_silent(tmp_path: Path) -> None:
    job = job_file(tmp_path, step_s=1.0)
    first = night(job)
    while not list(tmp_path.rglob("claim-*")):
        assert first.poll() is None
    second = night(job)
    assert second.communicate(timeout=60)[0] == ""
    assert second.returncode == 0
    assert "held by process" in (tmp_path / "log").read_text()
    assert first.communicate(timeout=60)[0] == ""


def test_a_night_that_failed_is_a_mail(tmp_path: Path) -> None:
    run = night(job_file(tmp_path, fail=["*"]))
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 1
    assert said.startswith(f"batchgen submit {tmp_path}/job.yaml ended with exit code 1; the end of its log")
    assert "20 of 20 rows are errors, more than max_error_rate 0.0 allows" in said


@pytest.mark.parametrize(
    ("now", "date", "yesterday"),  # clocks of Berlin
    [
        ((2026, 3, 1, 0, 30), "2026-03-01", "2026-02-28"),
        ((2028, 3, 1, 0, 30), "2028-03-01", "2028-02-29"),
        ((2027, 1, 1, 0, 0), "2027-01-01", "2026-12-31"),
        ((2026, 3, 29, 3, 30), "2026-03-29", "2026-03-28"),  # clocks went forward an hour ago
        ((2026, 3, 30, 0, 30), "2026-03-30", "2026-03-29"),  # 24 hours ago it was the 28th
        ((2026, 10, 26, 0, 30), "2026-10-26", "2026-10-25"),  # 24 hours ago it was the 25th, 1:30
        ((2026, 10, 25, 2, 30), "2026-10-25", "2026-10-24"),  # the hour that comes twice
    ],
)
def test_days_are_those_of_the_calendar(tmp_path: Path, now: tuple[int, ...], date: str, yesterday: str) -> None:
    job = spec.load(str(job_file(tmp_path)), now=datetime(*now, tzinfo=ZoneInfo("Europe/Berlin")))
    assert (job.name, job.output.path) == (f"night of {date}", f"{tmp_path}/{yesterday}")
