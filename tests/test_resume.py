"""A job that is killed at any moment and submitted again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from commandline import Piped, batchgen

from batchgen import spec
from batchgen.job import progress, submit

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


def edited(job: Path, section: str, **changes) -> Path:
    """The same job file with some keys of a section replaced."""
    sections = yaml.safe_load(job.read_text())
    sections[section] |= changes
    job.write_text(yaml.safe_dump(sections))
    return job


def rows(output: Path) -> list[dict]:
    return pl.read_parquet(output / "*.parquet").sort("row_id").to_dicts()


def segments(output: Path) -> set[Path]:
    """What is journalled there."""
    return set(output.rglob("seg-*"))


def wait_until_ready(process: Piped) -> None:
    """Until the job says that it is planned; what follows is loading and generating."""
    for line in process.stderr:
        if "rows to do" in line:
            return
    raise AssertionError(f"ended early with {process.wait()}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_lose_no_row_double_none_and_change_no_text(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    shortest = pl.col("messages").list.first().struct.field("content").str.len_chars()
    pl.read_parquet(PROMPTS).sort(shortest, "id").head(32).write_parquet(tmp_path / "prompts.parquet")
    source = {"path": str(tmp_path / "prompts.parquet"), "messages": "messages", "id": "id", "keep": ["source"]}
    short = {"input": source, "sampling": {"max_tokens": 12}}
    assert batchgen("submit", job_file(undisturbed, **short)).returncode == 0
    job = job_file(killed, **short)
    rng, journalled = random.Random(11), 0
    for kill in range(KILLS):
        process = Piped("submit", job, "--log", "plain")
        wait_until_ready(process)
        before = segments(killed / "out")
        # How long loading takes is the machine's; every third kill comes after rows have been finished.
        while kill % 3 == 1 and process.poll() is None and not segments(killed / "out") - before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4 if kill % 3 == 1 else 2.0))
        process.kill()
        process.communicate()
        found = progress(spec.load(job))
        safe = found.rows_done + found.rows_journalled
        assert safe >= journalled, f"kill {kill} took journalled rows away"
        journalled = safe
    assert journalled > 0
    last = batchgen("submit", job)
    assert last.returncode == 0, last.stderr
    expected, found = rows(undisturbed / "out"), rows(killed / "out")
    assert [r["row_id"] for r in found] == [r["row_id"] for r in expected]
    assert len({r["row_id"] for r in found}) == 32
    assert [r["completion"] for r in found] == [r["completion"] for r in expected]
    assert [r["completion_token_ids"] for r in found] == [r["completion_token_ids"] for r in expected]
    assert not segments(killed / "out"), "the journal is gone once its rows are in parts"


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

    def files():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file() and p.stem != "lease"}

    before = files()
    began = time.monotonic()
    again = batchgen("submit", job, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["ran"] is False
    assert json.loads(again.stdout)["ok"] == 30
    assert time.monotonic() - began < 30
    assert files() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_next_submit_goes_on(tmp_path, number):
    job = rehearsal(tmp_path, rows=60, step_s=0.1, tokens_per_step=64)
    process = Piped("submit", job, "--log", "plain")
    wait_until_ready(process)
    while not segments(tmp_path / "out"):
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
    assert "taken over from journals" in last.stdout
    assert len(rows(tmp_path / "out")) == 60


def test_who_watches_a_job_hears_of_it_before_a_row_ends(tmp_path):
    """From then on a signal drains, and the first step may end rows."""
    seen = []
    submit(spec.load(rehearsal(tmp_path, rows=12, tokens_per_step=64)), watch=lambda tally: seen.append(tally.samples))
    assert seen[0] == 0 < seen[1]


def test_a_signal_while_the_model_loads_ends_it_at_once(tmp_path):
    job = job_file(tmp_path)
    process = Piped("submit", job, "--log", "plain")
    wait_until_ready(process)
    time.sleep(0.2)  # the weights are being read
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "drained before the first step" in errors
    assert not segments(tmp_path / "out")
    assert batchgen("status", job).returncode == 0


def test_of_two_submits_at_once_one_runs_and_the_other_says_who(tmp_path):
    job = rehearsal(tmp_path, rows=60, step_s=0.6)
    first = Piped("submit", job, "--log", "plain")
    wait_until_ready(first)
    began = time.monotonic()
    second = batchgen("submit", job)
    assert time.monotonic() - began < 10
    assert second.returncode == 75
    assert re.search(rf"held by process {first.pid} on .*, since 20", second.stderr)
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert len({row["row_id"] for row in rows(tmp_path / "out")}) == 60


def test_who_is_stopped_past_its_lease_changes_nothing_when_it_wakes(tmp_path):
    job = edited(rehearsal(tmp_path, rows=60, step_s=0.2), "checkpoint", lease_seconds=2)
    zombie = Piped("submit", job, "--log", "plain")
    while not segments(tmp_path / "out"):
        time.sleep(0.05)
    zombie.send_signal(signal.SIGSTOP)
    took_over = batchgen("submit", job, "--log", "plain")
    assert took_over.returncode == 0, took_over.stderr
    assert f"took over from process {zombie.pid}" in took_over.stderr
    before = {file: file.read_bytes() for file in (tmp_path / "out").glob("*.parquet")}
    zombie.send_signal(signal.SIGCONT)
    _, err = zombie.communicate(timeout=30)
    assert zombie.returncode == 75
    assert "taken over by process" in err
    assert {file: file.read_bytes() for file in (tmp_path / "out").glob("*.parquet")} == before


def test_rows_that_fail_again_do_not_stop_a_retry(tmp_path):
    """Of the rows that are done again, all have failed once: that most of them do says nothing of the job."""
    job = rehearsal(tmp_path, rows=750, fail=[f"row-{i}" for i in range(0, 750, 6)])
    job.write_text(job.read_text() + "max_error_rate: 0.2\n")
    assert batchgen("submit", job).returncode == 0
    again = batchgen("submit", job, "--retry-failed")
    assert again.returncode == 0, again.stderr
    assert "625 ok, 125 error" in again.stdout


def test_failed_rows_are_done_again_and_nothing_else(tmp_path):
    """The part with failed rows is replaced, these count their attempts, and no other row is touched."""

    job = rehearsal(tmp_path, rows=60)

    def submit(*arguments, **options):
        return batchgen("submit", edited(job, "engine", options=options), *arguments)

    def table():
        return pl.read_parquet(tmp_path / "out/*.parquet").sort("row_id")

    assert submit(fail=["row-3", "row-5"]).returncode == 1
    before, parts = table(), {file: file.read_bytes() for file in (tmp_path / "out").glob("*.parquet")}
    assert submit().returncode == 1, "an error row is an answer; only --retry-failed asks again"
    half = submit("--retry-failed", fail=["row-5"])
    assert half.returncode == 1
    assert "18 rows left as they stood" in half.stdout
    done = submit("--retry-failed")
    assert done.returncode == 0, done.stderr
    after, again = table(), pl.col("row_id").is_in(["row-3", "row-5"])
    assert after["row_id"].to_list() == before["row_id"].to_list()
    assert after.filter(~again).equals(before.filter(~again))
    assert after.filter(again).select("row_id", "attempts", "status").rows() == [("row-3", 2, "ok"), ("row-5", 3, "ok")]
    assert sum(file.read_bytes() != data for file, data in parts.items()) == 1
    assert "nothing to do" in submit("--retry-failed").stdout


def test_a_kill_while_failed_rows_are_done_again_costs_none(tmp_path):
    """Every row fails first; then the second try of many rows is killed again and again, on its way to the swap too."""
    job, rng = rehearsal(tmp_path, rows=90, fail=["*"]), random.Random(3)
    assert batchgen("submit", job).returncode == 1
    edited(job, "engine", options={"step_s": 0.02, "tokens_per_step": 8})
    for _ in range(KILLS):
        process = Piped("submit", job, "--retry-failed", "--log", "plain")
        wait_until_ready(process)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert sorted(row["row_id"] for row in rows(tmp_path / "out")) == sorted(f"row-{i}" for i in range(90))
    last = batchgen("submit", job, "--retry-failed")
    assert last.returncode == 0, last.stderr
    assert {(row["status"], row["attempts"]) for row in rows(tmp_path / "out")} == {("ok", 2)}
    # Who died between a part's swap and the removal of its journal left that to gc.
    assert batchgen("gc", job).returncode == 0
    assert not list((tmp_path / "out").rglob("*.rows"))


def test_gc_removes_what_no_submit_will_use(tmp_path):
    """The journals of shards whose input changed meanwhile, and a file that a writer began long ago."""
    job = rehearsal(tmp_path, rows=90, step_s=0.1)
    process = Piped("submit", job)
    while not segments(tmp_path / "out"):
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert batchgen("gc", job).stdout == "nothing to remove\n", "the next submit will use its journal"
    recut = batchgen("gc", job, "--set", "checkpoint.rows_per_part=7")
    assert recut.stdout == "nothing to remove\n", "the right number would use it"
    source = tmp_path / "prompts.parquet"
    pl.read_parquet(source).with_columns(extra=1).write_parquet(source)
    old = tmp_path / "out/.tmp-0123"
    old.write_bytes(b"half a p")
    os.utime(old, (0, 0))
    named = batchgen("gc", job, "--dry-run").stdout
    assert re.fullmatch(rf"(would remove .*/__batchgen/journal/[0-9a-f]{{16}}\n)+would remove {old}\n", named)
    assert batchgen("gc", job).stdout == named.replace("would remove", "removed")
    assert not old.exists()
    assert not segments(tmp_path / "out")


def test_rows_of_an_input_that_changed_while_it_was_read_are_not_kept(tmp_path):
    """What is put back may have the old version again; what was read meanwhile is of unknown bytes."""
    job = rehearsal(tmp_path, rows=90, step_s=0.1)
    process = Piped("submit", job)
    while not segments(tmp_path / "out"):
        time.sleep(0.05)
    (tmp_path / "prompts.parquet").touch()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "changed since it was planned" in said
    assert not segments(tmp_path / "out")


def test_gc_removes_the_journal_of_an_input_that_is_gone_and_of_a_second_try_that_was_done(tmp_path):
    """The second try is killed on its way; its journal is kept until another second try has replaced the part."""
    job = rehearsal(tmp_path, rows=90, fail=["*"])
    assert batchgen("submit", job).returncode == 1
    edited(job, "engine", options={"step_s": 0.05})
    process = Piped("submit", job, "--retry-failed")
    while not segments(tmp_path / "out"):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert batchgen("gc", job).stdout == "nothing to remove\n"
    [left] = (tmp_path / "out/__batchgen/journal").iterdir()
    done_since = left.with_name(f"{left.name.partition('-')[0]}-{'0' * 32}")
    shutil.copytree(left, done_since)
    assert batchgen("gc", job).stdout == f"removed {done_since}\n"
    assert batchgen("submit", job, "--retry-failed").returncode == 0
    source = tmp_path / "prompts.parquet"
    elsewhere = tmp_path / "other.parquet"
    pl.read_parquet(source).with_columns(pl.col("id") + "-other").write_parquet(elsewhere)
    process = Piped("submit", job, "--set", f"input.path={elsewhere}")
    while not segments(tmp_path / "out"):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert re.fullmatch(r"removed .*/__batchgen/journal/[0-9a-f]{16}\n", batchgen("gc", job).stdout)
