"""Whole jobs through the command line: what lands in the folder, how it opens, and how a job says no."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commandline import Piped, batchgen
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from batchgen import models, record, spec

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples/prompts/quickstart.parquet"
DIRTY = ROOT / "tests/data/dirty_prompts.parquet"


def job_file(folder: Path, **changes) -> Path:
    """A small job with the real model; `changes` replace whole sections."""
    sections = {
        "version": 1,
        "name": "test",
        "input": {
            "path": str(folder / "in.parquet"),
            "messages": "messages",
            "id": "id",
            "keep": ["source", "category"],
        },
        "model": {"target": "demo:smollm2-135m", "draft": str(ROOT / "examples/smollm2"), "dtype": "float32"},
        "speculation": {"tree": {"depth": 3, "width": 2, "nodes": 5}},
        "sampling": {"max_tokens": 8},
        "batch_size": 6,
        "output": {"path": str(folder / "out")},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (sections | changes).items() if v is not None}))
    return file


def prompts(folder: Path, num: int = 6) -> pl.DataFrame:
    shortest = pl.col("messages").list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()
    table = pl.read_parquet(QUICKSTART).sort(shortest, "id").head(num)
    table.write_parquet(folder / "in.parquet")
    return table


REHEARSAL = {"engine": {"kind": "rehearsal"}, "speculation": None}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a real job of six rows, two samples each, with what a dead run could have left in it."""
    folder = tmp_path_factory.mktemp("finished")
    prompts(folder)
    sampling = {"max_tokens": 8, "temperature": 0.8, "n": 2}
    done = batchgen("submit", job_file(folder, sampling=sampling, checkpoint={"rows_per_part": 4}))
    assert done.returncode == 0, done.stderr
    left = folder / "out/__batchgen/journal/0123456789abcdef"
    left.mkdir(parents=True)
    (left / "claim-0001.json").write_text("{}")
    part = next((folder / "out").glob("part-*.parquet"))
    (left / "seg-0001-0123456789ab-000000.rows").write_bytes(part.read_bytes())
    return folder


def test_the_output_has_the_schema_of_the_design(finished):
    for part in (finished / "out").glob("part-*.parquet"):
        kept = [pq.read_schema(finished / "in.parquet").field(name) for name in ("source", "category")]
        assert pq.read_schema(part).remove_metadata().equals(record.output_schema(kept), check_metadata=False)


def test_every_row_stands_there_once_per_sample_with_honest_counts(finished):
    table = pl.read_parquet(finished / "out/*.parquet")
    ids = pl.read_parquet(finished / "in.parquet")["id"].to_list()
    assert table.select("row_id", "sample").rows() == [(i, s) for i in ids for s in (0, 1)]
    for row in table.iter_rows(named=True):
        assert row["status"] == "ok"
        assert sum(row["accepted_per_depth"]) == row["accepted_tokens"]
        assert row["completion_tokens"] == len(row["completion_token_ids"])
        assert row["prompt_tokens"] == len(row["prompt_token_ids"])
        assert row["draft_tokens"] > 0
        assert row["acceptance_rate"] == pytest.approx(row["accepted_tokens"] / row["draft_tokens"])
        assert row["acceptance_length"] == pytest.approx((row["completion_tokens"] - 1) / row["target_steps"])
        assert row["messages"][0] == {
            "role": "system",
            "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        }
        assert (row["engine"], row["attempts"]) == ("torch", 1)
    first, second = (table.filter(pl.col("sample") == s)["completion"].to_list() for s in (0, 1))
    assert first != second
    assert table["source"].to_list()[::2] == pl.read_parquet(finished / "in.parquet")["source"].to_list()


def test_prompt_ids_decode_to_what_messages_render_to(finished):
    tokenizer = AutoTokenizer.from_pretrained(models.fetch("demo:smollm2-135m").path)
    for row in pl.read_parquet(finished / "out/*.parquet").iter_rows(named=True):
        text = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(row["prompt_token_ids"]) == text


def test_polars_and_pyarrow_open_the_folder_and_see_no_journal(finished):
    folder = finished / "out"
    assert pl.read_parquet(folder / "*.parquet").height == 12
    assert pl.scan_parquet(folder / "**/*.parquet").collect().height == 12
    assert ds.dataset(folder, format="parquet").count_rows() == 12
    assert pq.read_table(folder).num_rows == 12


def test_parts_say_what_made_them(finished):
    for part in (finished / "out").glob("part-*.parquet"):
        facts = {k.decode(): v.decode() for k, v in pq.read_metadata(part).metadata.items() if k != b"ARROW:schema"}
        assert facts["batchgen.target"] == "demo:smollm2-135m"
        assert facts["batchgen.draft"].endswith("examples/smollm2")
        assert facts["batchgen.dtype"] == "float32"
        assert facts["batchgen.version_batchgen"]
    stored = json.loads((finished / "out/__batchgen/job.json").read_text())
    assert "storage_options" not in json.dumps(stored)
    assert stored["spec"]["sampling"]["n"] == 2


def test_without_a_head_acceptance_is_null_and_the_text_is_the_same(tmp_path):
    prompts(tmp_path, 4)
    assert batchgen("submit", job_file(tmp_path)).returncode == 0
    drafted = pl.read_parquet(tmp_path / "out/*.parquet")
    plain = batchgen(
        "submit", job_file(tmp_path, speculation={"tree": "off"}), "--set", f"output.path={tmp_path}/plain"
    )
    assert plain.returncode == 0, plain.stderr
    assert "acceptance rate" not in plain.stdout
    table = pl.read_parquet(tmp_path / "plain/*.parquet")
    assert table["completion"].to_list() == drafted["completion"].to_list()
    for row in table.iter_rows(named=True):
        assert (row["draft_steps"], row["draft_tokens"], row["accepted_tokens"]) == (0, 0, 0)
        assert row["acceptance_rate"] is None
        assert row["acceptance_length"] == 1.0
        assert row["target_steps"] == row["completion_tokens"] - 1


@pytest.mark.slow
def test_192_dirty_rows_get_192_verdicts_and_the_exit_code_that_was_asked_for(tmp_path):
    job = job_file(
        tmp_path,
        input={"path": str(DIRTY), "messages": "messages", "id": "id", "keep": ["defect"]},
        sampling={"max_tokens": 4},
        screen={"max_prompt_tokens": 150},
        batch_size=32,
        speculation={"tree": {"depth": 2}},
    )
    strict = batchgen("submit", job)
    assert strict.returncode == 1
    assert "more than max_error_rate 0.0 allows" in strict.stderr
    lenient = batchgen("submit", job, "--set", "max_error_rate=0.5")
    assert lenient.returncode == 0, lenient.stderr
    table = pl.read_parquet(tmp_path / "out/*.parquet")
    assert table.height == 192
    assert table["row_id"].n_unique() == 192
    assert set(table["status"]) == {"ok", "error", "skipped"}
    bad = table.filter(pl.col("status") != "ok")
    assert bad["error_type"].null_count() == bad["error"].null_count() == 0
    assert bad["completion"].null_count() == bad.height
    tokenizer = AutoTokenizer.from_pretrained(models.fetch("demo:smollm2-135m").path)
    special = set(tokenizer.all_special_ids)
    for row in table.filter(pl.col("status") == "ok").iter_rows(named=True):
        num_turns = len(row["messages"])
        # <|im_start|> and <|im_end|> around each message, and one <|im_start|> for the answer.
        assert sum(i in special for i in row["prompt_token_ids"]) == 2 * num_turns + 1, row["row_id"]


def test_rows_that_are_refused_before_the_first_is_generated_stop_no_job(tmp_path):
    """All 1,024 rows that run at once are under way when the first 100 of the others have failed; all are kept."""
    group = [[None if i % 10 == 3 else f"prompt {g}-{i}" for i in range(100)] for g in range(15)]
    coded = pa.dictionary(pa.int8(), pa.string())  # as pandas writes categories; together they are too many for int8
    schema = pa.schema([("prompt", pa.string()), ("k", coded)])
    with pq.ParquetWriter(tmp_path / "in.parquet", schema) as file:
        for asked in group:
            kept = pa.array([str(each) for each in asked]).dictionary_encode().cast(coded)
            file.write_table(pa.table({"prompt": asked, "k": kept}, schema=schema))
    read = {"path": str(tmp_path / "in.parquet"), "prompt": "prompt", "keep": ["k"]}
    done = batchgen("submit", job_file(tmp_path, **REHEARSAL, input=read, batch_size=1024, max_error_rate=0.2))
    assert done.returncode == 0, done.stderr
    table = pl.read_parquet(tmp_path / "out/*.parquet")
    assert table["status"].value_counts(sort=True).rows() == [("ok", 1350), ("error", 150)]
    assert table["k"].to_list() == [str(each) for asked in group for each in asked]


def test_all_problems_of_an_input_are_one_line_and_exit_2(tmp_path):
    prompts(tmp_path)
    wrong = {"path": str(tmp_path / "in.parquet"), "messages": "mesages", "id": "id"}
    done = batchgen("submit", job_file(tmp_path, input=wrong, **REHEARSAL))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "mesages" in done.stderr
    assert "did you mean" in done.stderr
    assert "Traceback" not in done.stderr


def test_rows_that_need_no_engine_are_journalled_and_drained_all_the_same(tmp_path):
    table = prompts(tmp_path, 1)
    pl.concat([table] * 200_000).with_columns(id=pl.lit(None, pl.String)).write_parquet(tmp_path / "in.parquet")
    checkpoint = {"rows_per_part": 200_000, "journal_rows": 1000}
    job = job_file(tmp_path, **REHEARSAL, checkpoint=checkpoint, max_error_rate=1.0)
    process = Piped("submit", job)
    while process.poll() is None and not list((tmp_path / "out").rglob("seg-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75, "segments come before the end, and so does the drain"


def test_equal_ids_in_two_files_do_not_pass_for_one_row(tmp_path):
    table = prompts(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        table.write_parquet(tmp_path / f"in/{name}.parquet")
    everything = {"path": str(tmp_path / "in"), "messages": "messages", "id": "id"}
    done = batchgen("submit", job_file(tmp_path, **REHEARSAL, input=everything))
    assert done.returncode == 1
    assert "input.id must be unique over all files" in done.stderr


def test_scripted_failures_end_as_error_rows(tmp_path):
    table = prompts(tmp_path)
    failing = table["id"][2]
    job = job_file(tmp_path, engine={"kind": "rehearsal", "options": {"fail": [failing]}}, speculation=None)
    assert batchgen("submit", job).returncode == 1
    assert batchgen("submit", job, "--set", "max_error_rate=0.2").returncode == 0
    bad = pl.read_parquet(tmp_path / "out/*.parquet").filter(pl.col("status") == "error")
    assert bad.select("row_id", "error_type", "finish_reason").rows() == [(failing, "scripted", "error")]


@pytest.mark.slow
@pytest.mark.parametrize(("action", "code"), [("fail", 1), ("disable", 0)])
def test_the_acceptance_gate_does_what_the_job_file_says(tmp_path, action, code):
    prompts(tmp_path, 12)
    speculation = {"tree": {"depth": 8, "width": 4, "nodes": 48}, "min_acceptance": 0.9, "below_min": action}
    job = job_file(tmp_path, speculation=speculation, sampling={"max_tokens": 32}, batch_size=12)
    done = batchgen("submit", job, "--log", "plain")
    assert done.returncode == code, done.stderr
    assert "is below speculation.min_acceptance 0.9" in done.stderr
    assert ("decoding plainly" in done.stderr) == (action == "disable")
    if action == "disable":
        table = pl.read_parquet(tmp_path / "out/*.parquet")
        assert table.filter(pl.col("draft_steps") < pl.col("target_steps")).height > 0


def test_a_night_on_which_the_head_got_worse_fails_with_all_its_rows_there(tmp_path):
    table = prompts(tmp_path, 12)
    (tmp_path / "in").mkdir()
    table.head(6).write_parquet(tmp_path / "in/a.parquet")
    worse = tmp_path / "head"
    shutil.copytree(ROOT / "examples/smollm2", worse)
    weights = load_file(worse / "model.safetensors")
    save_file(weights | {"fc.weight": torch.zeros_like(weights["fc.weight"])}, worse / "model.safetensors")
    changes = {
        "input": {"path": str(tmp_path / "in"), "messages": "messages", "id": "id"},
        "speculation": {"tree": {"depth": 2}, "max_drift": 0.05},
        "sampling": {"max_tokens": 24},
    }
    job = job_file(tmp_path, **changes)
    assert batchgen("submit", job).returncode == 0
    table.tail(6).write_parquet(tmp_path / "in/b.parquet")
    night = batchgen("submit", job, "--set", f"model.draft={worse}")
    assert night.returncode == 1
    assert "below speculation.max_drift 0.05" in night.stderr
    assert pl.read_parquet(tmp_path / "out/*.parquet").height == 12
    assert batchgen("submit", job).returncode == 0, "there is nothing to do"


def test_a_job_on_a_bucket_is_the_same_job(gcs_folder, tmp_path):
    url, options = gcs_folder
    table = prompts(tmp_path)
    from batchgen.store import connect

    store = connect(url, options)
    store.put(f"{url}/in/a.parquet", (tmp_path / "in.parquet").read_bytes())
    source = {"path": f"{url}/in/*.parquet", "messages": "messages", "id": "id", "storage_options": options}
    sink = {"path": f"{url}/out", "storage_options": dict(options)}
    job = job_file(tmp_path, **REHEARSAL, input=source, output=sink)
    done = batchgen("submit", job, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] == 6
    found = [u for u in store.find(f"{url}/out") if u.endswith(".parquet")]
    assert len(found) == 1
    rows = pq.read_table(__import__("io").BytesIO(store.read(found[0]))).to_pylist()
    assert [r["row_id"] for r in rows] == table["id"].to_list()
    assert options["endpoint_url"] not in store.read(f"{url}/out/__batchgen/job.json").decode()
    status = batchgen("status", job)
    assert "1 of 1 done" in status.stdout


def test_help_says_what_to_run_and_what_exit_codes_mean():
    shown = batchgen("--help").stdout
    for line in (
        "  batchgen plan jobs/quickstart.yaml      what would run\n",
        "  Exit codes: 0 done;",
        "  73 the output holds another job's rows; 75 drained, Ray gone, or another run holds",
    ):
        assert line in shown


def test_the_example_jobs_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BATCHGEN_BUCKET", "some-bucket")
    for file in sorted((ROOT / "jobs").glob("*.yaml")):
        spec.load(str(file))
