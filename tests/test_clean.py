"""Screening alone leaves the rows that a submit would generate, with everything that stood beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from commandline import batchgen

DIRTY = Path(__file__).parent / "data/dirty_prompts.parquet"


def job_file(folder: Path, path: Path, **changes: Any) -> Path:
    sections = {
        "input": {"path": str(path), "messages": "messages", "id": "id"},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal"},
        "screen": {"dedupe": "exact", "pii": {"action": "redact"}},
        "checkpoint": {"rows_per_part": 50},
        "max_error_rate": 1.0,
        "output": {"path": str(folder / "out")},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(sections | changes))
    return file


def test_what_is_kept_is_what_a_submit_generates(tmp_path: Path) -> None:
    job = job_file(tmp_path, DIRTY, checkpoint={"rows_per_part": 200})
    done = batchgen("screen", job, "--to", tmp_path / "clean", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert batchgen("submit", job).returncode == 0
    rows = pl.read_parquet(tmp_path / "out/*.parquet")
    clean = pl.read_parquet(tmp_path / "clean/*.parquet")
    generated = rows.filter(pl.col("status") == "ok")
    assert clean["id"].sort().to_list() == generated["row_id"].sort().to_list()
    assert (facts["kept"], facts["rows"]) == (clean.height, rows.height)
    refused = rows.filter(pl.col("status") != "ok").group_by("status", "error_type").len()
    assert facts["refused"] == {f"{status}: {kind}": count for status, kind, count in refused.rows()}
    assert facts["redacted"]
    # Everything else is as it was, and what the model reads is what a job would give it.
    before = pl.read_parquet(DIRTY).unique("id", keep="first").join(clean, on="id", how="semi").sort("id")
    assert clean.columns == before.columns
    assert clean.sort("id").drop("messages").equals(before.drop("messages"))
    read = dict(generated.select("row_id", "messages").rows())
    for row_id, messages in clean.select("id", "messages").rows():
        assert [m["content"] for m in messages] == [m["content"] for m in read[row_id]]


def test_it_resumes_and_does_what_is_new_but_mixes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    table = pl.read_parquet(DIRTY)
    table.head(120).write_parquet(source / "b.parquet")
    job, to = job_file(tmp_path, source), tmp_path / "clean"
    first = json.loads(batchgen("screen", job, "--to", to, "--json").stdout)
    assert first["files"] == 3
    made = {file: file.read_bytes() for file in to.glob("*.parquet")}
    max(made).unlink()  # killed before the last one
    assert json.loads(batchgen("screen", job, "--to", to, "--json").stdout) == first
    table.tail(72).write_parquet(source / "c.parquet")
    second = batchgen("screen", job, "--to", to)
    assert second.returncode == 0, second.stderr
    assert "of 192 rows kept" in second.stdout
    assert {file: file.read_bytes() for file in made} == made
    other = batchgen("screen", job, "--to", to, "--set", "screen.pii=off")
    assert (other.returncode, "choose an empty folder" in other.stderr) == (73, True), other.stderr


def test_a_file_of_which_nothing_is_left_is_written_empty(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in "ab":
        pl.read_parquet(DIRTY).head(3).write_parquet(source / f"{name}.parquet")
    done = batchgen("screen", job_file(tmp_path, source), "--to", tmp_path / "clean", "--json")
    assert done.returncode == 0, done.stderr
    kept = [len(pl.read_parquet(file)) for file in sorted((tmp_path / "clean").glob("*.parquet"))]
    assert kept[0] > kept[1] == 0


def test_prompts_in_a_column_of_their_own_are_masked_there(tmp_path: Path) -> None:
    asked = ["Write to jane.doe@example.com", "Nothing here"]
    pl.DataFrame({"q": asked, "s": [None, "Mail bob@example.com"], "n": [1, 2]}).write_parquet(tmp_path / "in.parquet")
    job = job_file(
        tmp_path, tmp_path / "in.parquet", input={"path": str(tmp_path / "in.parquet"), "prompt": "q", "system": "s"}
    )
    done = batchgen("screen", job, "--to", tmp_path / "clean")
    assert done.returncode == 0, done.stderr
    assert "masked: 2 EMAIL_ADDRESS" in done.stdout
    clean = pl.read_parquet(tmp_path / "clean/*.parquet")
    assert clean["n"].to_list() == [1, 2]
    assert clean["q"].to_list() == ["Write to <EMAIL_ADDRESS>", "Nothing here"]
    assert clean["s"].to_list() == [None, "Mail <EMAIL_ADDRESS>"]
