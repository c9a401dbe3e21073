"""The folder of an earlier job: what the next submit finds there, does, leaves alone and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import yaml
from commandline import batchgen

from batchgen import ownership

QUICKSTART = Path(__file__).parents[1] / "examples/prompts/quickstart.parquet"


def job_file(folder: Path, **changes) -> Path:
    """A rehearsal; `changes` replace whole sections."""
    keep = ["source", "category"]
    sections = {
        "version": 1,
        "name": "test",
        "input": {"path": str(folder / "in.parquet"), "messages": "messages", "id": "id", "keep": keep},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal"},
        "sampling": {"max_tokens": 8},
        "output": {"path": str(folder / "out")},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(sections | changes))
    return file


def prompts(folder: Path) -> pl.DataFrame:
    table = pl.read_parquet(QUICKSTART).head(6)
    table.write_parquet(folder / "in.parquet")
    return table


def test_another_jobs_output_is_refused_unless_asked(tmp_path):
    prompts(tmp_path)
    assert batchgen("submit", job_file(tmp_path)).returncode == 0
    keep = ["source", "category"]
    elsewhere = {"path": str(tmp_path / "*.parquet"), "messages": "messages", "id": "id", "keep": keep}
    other = job_file(tmp_path, sampling={"max_tokens": 5}, input=elsewhere)
    refused = batchgen("submit", other)
    assert refused.returncode == 73
    assert "differs in sampling; " in refused.stderr
    assert "--mix" in refused.stderr
    assert len(list((tmp_path / "out").glob("part-*"))) == 1
    assert batchgen("submit", other, "--mix").returncode == 0
    assert len(list((tmp_path / "out").glob("part-*"))) == 2


def test_rows_of_a_job_beside_another_are_not_done_twice_either(tmp_path):
    prompts(tmp_path)
    assert batchgen("submit", job_file(tmp_path)).returncode == 0
    other = job_file(tmp_path, sampling={"max_tokens": 5})
    assert batchgen("submit", other, "--mix").returncode == 0
    recut = batchgen("submit", other, "--mix", "--set", "checkpoint.rows_per_part=2")
    assert (recut.returncode, "cut at other rows now" in recut.stderr) == (73, True), recut.stderr
    (tmp_path / "in.parquet").touch()
    changed = batchgen("submit", other, "--mix")
    assert (changed.returncode, "which has changed" in changed.stderr) == (73, True), changed.stderr
    assert pl.read_parquet(tmp_path / "out/*.parquet").height == 12


def test_an_input_by_another_name_is_the_same_input(tmp_path):
    prompts(tmp_path)
    job = job_file(tmp_path)
    assert batchgen("submit", job).returncode == 0
    for name in (f"file://{tmp_path}/in.parquet", f"{tmp_path}/../{tmp_path.name}/in.parquet"):
        again = batchgen("submit", job, "--set", f"input.path={name}")
        assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stderr


def test_what_a_job_notes_of_itself_holds_no_secret_and_is_not_trusted(tmp_path):
    prompts(tmp_path)
    job = job_file(tmp_path, output={"path": f"{tmp_path}/out", "storage_options": {"auto_mkdir": True}})
    assert batchgen("submit", job).returncode == 0
    note = tmp_path / "out/__batchgen/job.json"
    assert "auto_mkdir" not in note.read_text()
    note.write_text("{")
    damaged = batchgen("submit", job)
    assert (damaged.returncode, "not what batchgen notes of a job" in damaged.stderr) == (1, True), damaged.stderr
    assert "Traceback" not in damaged.stderr


def test_what_may_be_secret_among_engine_options_is_not_noted():
    options = {
        "hf_token": "s3cr3t",
        "tensor_parallel_size": 2,
        "compilation_config": {"level": 3, 7: [{"api-key": "s3cr3t"}]},
        "download_dir": "https://me:s3cr3t@host/x?sig=s3cr3t",
    }
    noted = ownership._masked(options)
    assert "s3cr3t" not in json.dumps(noted)
    assert (noted["tensor_parallel_size"], noted["compilation_config"]["level"]) == (2, 3)
    assert noted["download_dir"] == "https://host/x?..."


def test_other_columns_are_refused(tmp_path):
    prompts(tmp_path)
    assert batchgen("submit", job_file(tmp_path)).returncode == 0
    kept = {"path": str(tmp_path / "in.parquet"), "messages": "messages", "id": "id", "keep": ["source"]}
    refused = batchgen("submit", job_file(tmp_path, input=kept))
    assert refused.returncode == 73
    assert "category: " in refused.stderr


def test_a_new_file_is_all_that_the_next_submit_does(tmp_path):
    table = prompts(tmp_path)
    (tmp_path / "in").mkdir()
    everything = {"path": str(tmp_path / "in"), "messages": "messages", "id": "id"}
    job = job_file(tmp_path, input=everything)
    table.head(4).write_parquet(tmp_path / "in/b.parquet")
    assert batchgen("submit", job).returncode == 0
    [before] = (tmp_path / "out").glob("part-*")
    made = before.stat().st_mtime_ns
    table.tail(2).write_parquet(tmp_path / "in/a.parquet")  # sorts before the old one
    again = batchgen("submit", job, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["ok"] == 6
    assert before.stat().st_mtime_ns == made
    assert pl.read_parquet(tmp_path / "out/*.parquet")["row_id"].n_unique() == 6


def test_a_missing_or_damaged_part_is_noticed(tmp_path):
    prompts(tmp_path)
    job = job_file(tmp_path, checkpoint={"rows_per_part": 3})
    assert batchgen("submit", job).returncode == 0
    part = min((tmp_path / "out").glob("part-*"))
    pl.read_parquet(part).head(2).write_parquet(part)
    short = batchgen("submit", job)
    assert short.returncode == 1
    assert "2 rows, expected 3" in short.stderr
    data = part.read_bytes()
    part.write_bytes(data[: len(data) // 2])
    broken = batchgen("submit", job)
    assert broken.returncode == 1
    assert f"{part}: does not read back" in broken.stderr
    assert "Traceback" not in broken.stderr
    part.unlink()
    assert batchgen("submit", job).returncode == 0, "a part that is not there is simply done again"


def test_what_was_reconciled_is_read_again_where_it_cannot_be_relied_on(tmp_path):
    """Once its bytes are damaged, as once a part has changed."""
    prompts(tmp_path)
    job = job_file(tmp_path, checkpoint={"rows_per_part": 2})
    first = batchgen("submit", job, "--json")
    kept = tmp_path / "out/__batchgen/reconciled"
    good = kept.read_bytes()
    for at in range(0, len(good), len(good) // 4):
        kept.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        again = batchgen("submit", job, "--json")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout) == json.loads(first.stdout) | {"ran": False}
        assert kept.read_bytes() == good


def test_what_would_write_the_same_rows_again_is_refused(tmp_path):
    prompts(tmp_path)
    job = job_file(tmp_path)
    assert batchgen("submit", job).returncode == 0
    other_size = batchgen("submit", job, "--set", "checkpoint.rows_per_part=2")
    assert other_size.returncode == 73
    assert "keep 4096" in other_size.stderr
    (tmp_path / "in.parquet").touch()
    changed = batchgen("submit", job)
    assert changed.returncode == 73
    assert "part-00000" in changed.stderr
    assert pl.read_parquet(tmp_path / "out/*.parquet").height == 6


def test_a_submit_that_never_finished_a_row_leaves_the_folder_free(tmp_path):
    prompts(tmp_path)
    broken = {"kind": "rehearsal", "options": {"tokens_per_step": 0}}
    assert batchgen("submit", job_file(tmp_path, engine=broken)).returncode == 2
    done = batchgen("submit", job_file(tmp_path, sampling={"max_tokens": 5}))
    assert done.returncode == 0, done.stderr
