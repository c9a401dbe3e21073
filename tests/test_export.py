"""What trainers read of a finished job: the right rows, token ids and masks, whatever is chosen, in every form."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commandline import batchgen
from datasets import load_dataset, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from batchgen import models, spec
from batchgen.export import Selection, run

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 60


def job_file(folder: Path, rows: int = ROWS, **changes) -> Path:
    facts = [(f"row-{i:02d}", [{"role": "user", "content": f"Say {i}."}], "ab"[i % 2]) for i in range(rows)]
    pl.DataFrame(facts, schema=["id", "messages", "source"], orient="row").write_parquet(folder / "in.parquet")
    sections = {
        "input": {"path": str(folder / "in.parquet"), "messages": "messages", "id": "id", "keep": ["source"]},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal", "options": {"fail": ["row-07"]}},
        "sampling": {"max_tokens": 90, "temperature": 0.8, "n": 2},
        "max_error_rate": 0.1,
        "checkpoint": {"rows_per_part": 20},
        "output": {"path": str(folder / "out")},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(sections | changes))
    return file


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    """A finished job of three parts, two samples a row, some cut off by length and one row failed."""
    folder = tmp_path_factory.mktemp("export")
    done = batchgen("submit", job_file(folder))
    assert done.returncode == 0, done.stderr
    return folder


def finished(folder: Path) -> pl.DataFrame:
    table = pl.read_parquet(folder / "out/*.parquet")
    assert table["finish_reason"].is_in(["stop", "length", "error"]).all()
    assert table["finish_reason"].n_unique() == 3
    return table.filter(pl.col("status") == "ok")


def exported(folder: Path, form: str, *options: str) -> tuple[Path, str]:
    to = folder / "to"
    shutil.rmtree(to, ignore_errors=True)
    done = batchgen("export", folder / "job.yaml", "--form", form, "--to", to, *options)
    assert done.returncode == 0, done.stderr
    return to, done.stdout


def test_ids_and_masks_are_those_of_every_finished_row(rehearsed, tmp_path):
    to, said = exported(rehearsed, "speculators")
    table = finished(rehearsed)
    found = load_dataset(
        "json", data_files=[str(f) for f in to.glob("*.jsonl")], split="train", cache_dir=str(tmp_path)
    )
    mine = {row["id"]: row for row in found}
    assert len(mine) == len(found) == table.height == 2 * (ROWS - 1)
    for row in table.iter_rows(named=True):
        other = mine[f"{row['row_id']}_gen{row['sample']}"]
        assert other["primary_id"] == row["row_id"]
        assert other["input_ids"] == row["prompt_token_ids"] + row["completion_token_ids"]
        assert other["loss_mask"] == [0] * row["prompt_tokens"] + [1] * row["completion_tokens"]
    tokens = table["prompt_tokens"].sum() + table["completion_tokens"].sum()
    assert f"118 rows: {tokens:,} tokens, {table['completion_tokens'].sum():,} of them the target's own" in said


@pytest.mark.parametrize("form", ["specforge", "modelopt", "messages", "sharegpt"])
def test_conversations_end_with_the_targets_whole_answer(rehearsed, form):
    to, said = exported(rehearsed, form)
    table = finished(rehearsed).filter(pl.col("finish_reason") == "stop")
    if form in ("specforge", "modelopt"):
        found = [json.loads(line) for file in to.glob("*.jsonl") for line in file.read_text().splitlines()]
    else:
        found = pl.read_parquet(to / "*.parquet").to_dicts()
    name = "conversation_id" if form == "modelopt" else "id"
    who, what = ("from", "value") if form == "sharegpt" else ("role", "content")
    chats = {row[name]: row["messages" if form == "messages" else "conversations"] for row in found}
    names = {"system": "system", "user": "human", "assistant": "gpt"} if form == "sharegpt" else {}
    assert len(chats) == table.height
    for row in table.iter_rows(named=True):
        turns = [*row["messages"], {"role": "assistant", "content": row["completion"]}]
        expected = [{who: names.get(t["role"], t["role"]), what: t["content"]} for t in turns]
        assert chats[f"{row['row_id']}/{row['sample']}"] == expected
    assert f"left out: {118 - table.height} cut off by length" in said


def ids(folder: Path) -> set[str]:
    return {json.loads(line)["id"] for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()}


def test_rows_are_chosen_by_any_column(rehearsed):
    to, _ = exported(rehearsed, "speculators", "--where", "source = 'a' AND completion_tokens < 60")
    chosen = finished(rehearsed).filter((pl.col("source") == "a") & (pl.col("completion_tokens") < 60))
    assert 0 < chosen.height < 59
    assert ids(to) == {f"{row}_gen{sample}" for row, sample in chosen.select("row_id", "sample").rows()}


@pytest.mark.parametrize("where", ["acceptance < 0.5", "source <", "completion", "DROP TABLE x"])
def test_a_condition_that_makes_no_sense_is_an_error_that_names_the_columns(rehearsed, tmp_path, where):
    done = batchgen("export", rehearsed / "job.yaml", "--form", "messages", "--to", tmp_path / "x", "--where", where)
    assert done.returncode == 2
    assert f"--where {where!r}" in done.stderr
    assert "acceptance_rate" in done.stderr
    assert not (tmp_path / "x").exists()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(few=st.integers(1, 118), more=st.integers(1, 200), share=st.floats(0.01, 0.99))
def test_samples_are_of_the_size_asked_for_and_grow_by_what_is_new(rehearsed, tmp_path, few, more, share):
    job = spec.load(str(rehearsed / "job.yaml"))
    sizes = sorted((few, more))
    found = []
    for size in sizes:
        assert run(job, "speculators", str(tmp_path), Selection(sample=size, hold_out=share)).rows == min(size, 118)
        found.append(ids(tmp_path / "train") | ids(tmp_path / "validation"))
    assert found[0] <= found[1]
    rows = {place: {name.split("_")[0] for name in ids(tmp_path / place)} for place in ("train", "validation")}
    assert not rows["train"] & rows["validation"], "all samples of a row are on one side"


def test_a_sample_is_of_rows_that_fit(rehearsed, tmp_path):
    job = spec.load(str(rehearsed / "job.yaml"))
    fit = finished(rehearsed).filter(pl.col("finish_reason") == "stop").height
    assert 20 < fit < 118
    for size in (20, fit):
        assert run(job, "messages", str(tmp_path), Selection(sample=size)).rows == size


def test_an_export_is_replaced_and_nothing_else_is(rehearsed, tmp_path):
    job = rehearsed / "job.yaml"
    assert batchgen("export", job, "--form", "messages", "--to", tmp_path / "to").returncode == 0
    assert batchgen("export", job, "--form", "modelopt", "--to", tmp_path / "to").returncode == 0
    assert {file.suffix for file in (tmp_path / "to").iterdir()} == {".jsonl", ".json"}
    spelled = os.path.relpath(tmp_path / "to")
    assert batchgen("export", job, "--form", "messages", "--to", spelled).returncode == 0, "the same folder"
    assert {file.suffix for file in (tmp_path / "to").iterdir()} == {".parquet", ".json"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("all of it")
    refused = batchgen("export", job, "--form", "messages", "--to", tmp_path / "mine")
    assert refused.returncode == 73
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert batchgen("export", job, "--form", "messages", "--to", rehearsed / "out").returncode == 73


def test_the_trainers_set_has_each_row_beside_its_hidden_states(tmp_path):
    job = job_file(
        tmp_path,
        16,
        engine={"kind": "torch"},
        speculation={"tree": "off"},
        sampling={"max_tokens": 6, "temperature": 0.8},
        checkpoint={"rows_per_part": 10},
    )
    assert batchgen("submit", job).returncode == 0
    to = tmp_path / "to"
    export = ("export", job, "--form", "speculators-states", "--to", to)
    missing = batchgen(*export)
    assert missing.returncode == 2
    assert "batchgen features" in missing.stderr
    assert batchgen("features", job).returncode == 0
    middle = tmp_path / "middle"
    assert batchgen("features", job, "--layers", "2,15", "--to", middle).returncode == 0
    wrong = batchgen(*export, "--states", middle)
    assert (wrong.returncode, "the last one, 30" in wrong.stderr) == (2, True)
    done = batchgen(*export, "--hold-out", "0.2", "--where", "source = 'a'", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    table = pl.read_parquet(tmp_path / "out/*.parquet").filter(pl.col("source") == "a")
    expected = {tuple(p + c): len(p) for p, c in table.select("prompt_token_ids", "completion_token_ids").rows()}
    found = load_from_disk(str(to))
    assert isinstance(found[0]["input_ids"], torch.Tensor), "the trainer takes them as they come"
    found = found.with_format(None)
    assert len(found) == facts["rows"] == table.height
    assert int(len(found) * facts["train_data_ratio"]) == len(found) - facts["held_out"] < len(found)
    counts = torch.zeros(49152, dtype=torch.int64)
    for i, row in enumerate(found):
        states = load_file(to / f"hidden_states/hs_{i}.safetensors")
        assert states["token_ids"].tolist() == row["input_ids"]
        assert states["hidden_states"].shape == (row["seq_len"], 4, 576)
        prompt = expected.pop(tuple(row["input_ids"]))
        assert row["loss_mask"] == [0] * prompt + [1] * (row["seq_len"] - prompt)
        counts += torch.bincount(torch.tensor(row["input_ids"][prompt:]), minlength=len(counts))
    assert not expected
    assert torch.load(to / "token_freq.pt") == {t: n for t, n in enumerate(counts.tolist()) if n}
    held_out = batchgen("export", job, "--form", "speculators", "--to", tmp_path / "text", "--hold-out", "0.2",
                        "--where", "source = 'a'")  # fmt: skip
    assert held_out.returncode == 0
    lines = [json.loads(line) for f in (tmp_path / "text/validation").iterdir() for line in f.read_text().splitlines()]
    last = found.select(range(len(found) - facts["held_out"], len(found)))
    assert sorted(line["input_ids"] for line in lines) == sorted(last["input_ids"]), "the same rows in every form"


def test_in_a_mixed_folder_equal_ids_have_states_of_their_own_and_other_targets_rows_stay_out(tmp_path):
    for num, more in ((6, []), (4, ["--mix"])):
        job = job_file(
            tmp_path,
            3,
            engine={"kind": "torch"},
            speculation={"tree": "off"},
            sampling={"max_tokens": num, "temperature": 0.8},
        )
        assert batchgen("submit", job, *more).returncode == 0
    table = pl.read_parquet(tmp_path / "out/*.parquet")
    assert table["row_id"].n_unique() == 3

    def states(*options: str) -> list[list[int]]:
        assert batchgen("features", job).returncode == 0
        done = batchgen("export", job, "--form", "speculators-states", "--to", tmp_path / "to", *options)
        assert done.returncode == 0, done.stderr
        found = load_from_disk(str(tmp_path / "to")).with_format(None)["input_ids"]
        for i, ids in enumerate(found):
            assert load_file(tmp_path / f"to/hidden_states/hs_{i}.safetensors")["token_ids"].tolist() == ids
        return sorted(found)

    asked = [p + c for p, c in table.select("prompt_token_ids", "completion_token_ids").rows()]
    assert states() == sorted(asked)
    parts = {file: pl.read_parquet(file)["completion_tokens"].max() for file in (tmp_path / "out").glob("*.parquet")}
    [part] = (file for file, longest in parts.items() if longest > 4)
    rows = pq.read_table(part)
    another = {**rows.schema.metadata, b"batchgen.target_identity": b"another"}
    pq.write_table(rows.replace_schema_metadata(another), part, write_page_checksum=True)
    assert states() == sorted(ids for ids, num in zip(asked, table["completion_tokens"], strict=True) if num <= 4)


@pytest.mark.filterwarnings("ignore:The first message is from system")
def test_specforges_own_parser_finds_our_ids_and_our_mask(tmp_path):
    """It renders the text again: where it comes out as it went in, its ids are the target's, and so is its mask."""
    parse = pytest.importorskip("specforge.data.parse")
    template = pytest.importorskip("specforge.data.template").ChatTemplate(
        user_header="<|im_start|>user\n", assistant_header="<|im_start|>assistant\n", end_of_turn_token="<|im_end|>"
    )
    answers = {"engine": {"kind": "torch"}, "sampling": {"max_tokens": 120}, "max_error_rate": 0.0}
    job = job_file(tmp_path, rows=16, **answers)
    assert batchgen("submit", job).returncode == 0
    for form in ("specforge", "speculators"):
        assert batchgen("export", job, "--form", form, "--to", tmp_path / form).returncode == 0

    def rows(form: str) -> dict[str, Any]:
        lines = [line for file in (tmp_path / form).glob("*.jsonl") for line in file.read_text().splitlines()]
        return {row["id"]: row for row in map(json.loads, lines)}

    texts, ours = rows("specforge"), rows("speculators")
    parser = parse.GeneralParser(AutoTokenizer.from_pretrained(models.fetch("demo:smollm2-135m").path), template)
    assert len(texts) >= 8
    for name, row in texts.items():
        ids, mask = (each.view(-1).tolist() for each in parser.parse(row["conversations"], 4096))
        mine = ours[name.replace("/", "_gen")]
        whole = len(mine["input_ids"])
        assert (ids[:whole], mask[:whole]) == (mine["input_ids"], mine["loss_mask"])
        assert not any(mask[whole:]), "what the template puts behind the end token is nobody's answer"


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    """A finished job of real answers, its hidden states beside it."""
    folder = tmp_path_factory.mktemp("captured")
    job = job_file(folder, 12, engine={"kind": "torch"}, sampling={"max_tokens": 6}, max_error_rate=0.0)
    sections = yaml.safe_load(job.read_text())
    sections["model"]["dtype"] = "float32"
    job.write_text(yaml.safe_dump(sections))
    assert batchgen("submit", job).returncode == 0
    assert batchgen("features", job, "--dtype", "float32").returncode == 0
    return folder


@pytest.fixture(scope="module")
def hidden(captured) -> dict[tuple[int, ...], tuple[int, list[torch.Tensor]]]:
    """What transformers has for each row's tokens: prompt length and all hidden states, the last behind the norm."""
    model = AutoModelForCausalLM.from_pretrained(models.fetch("demo:smollm2-135m").path, dtype=torch.float32)
    found = {}
    for prompt, completion in (
        pl.read_parquet(captured / "out/*.parquet").select("prompt_token_ids", "completion_token_ids").rows()
    ):
        with torch.no_grad():
            states = model(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
        found[*prompt, *completion] = len(prompt), [state[0] for state in states]
    return found


def states_exported(captured: Path, to: Path, form: str) -> None:
    done = batchgen("export", captured / "job.yaml", "--form", form, "--to", to, "--hold-out", "0.3")
    assert done.returncode == 0, done.stderr


def agrees(hidden, ids: torch.Tensor, mask: torch.Tensor, heard: torch.Tensor, last: torch.Tensor) -> None:
    prompt, states = hidden.pop(tuple(ids.tolist()))
    assert mask.tolist() == [0] * prompt + [1] * (len(ids) - prompt)
    assert torch.allclose(heard, torch.cat([states[k] for k in (2, 15, 27)], -1), rtol=1e-3, atol=1e-2)
    assert torch.allclose(last, states[-1], rtol=1e-3, atol=1e-2)


def test_specforge_reads_our_hidden_states(captured, hidden, tmp_path):
    """By its own reader, store and normalizer."""
    data = pytest.importorskip("specforge.algorithms.eagle3.data")
    from specforge.runtime.data_plane.feature_store import LocalFeatureStore
    from specforge.runtime.data_plane.offline_reader import OfflineManifestReader

    states_exported(captured, tmp_path / "to", "specforge-states")
    left, store = dict(hidden), LocalFeatureStore()
    for part in ("train", "validation"):
        for ref in OfflineManifestReader(str(tmp_path / "to" / part), validate_files=True):
            raw, _ = store.get(ref)
            row = data.normalize_offline_sample(raw, max_len=2048)
            row["loss_mask"][0, -1] = 1  # which it takes away: nothing follows the last token
            agrees(left, row["input_ids"][0], row["loss_mask"][0], row["hidden_state"][0], row["target"][0])
    assert not left


def test_modelopt_reads_our_hidden_states(captured, hidden, tmp_path):
    """By its own dataset, in a process of its own: what it imports replaces modules of others."""
    if importlib.util.find_spec("modelopt") is None:
        pytest.skip("nox installs it")
    states_exported(captured, tmp_path / "to", "modelopt-states")
    code = """
import pathlib, sys, torch
from modelopt.torch.speculative.eagle.utils import OfflineSupervisedDataset
found = OfflineSupervisedDataset(sorted(pathlib.Path(sys.argv[1]).rglob("*.pt")), answer_only_loss=True)
torch.save([found[i] for i in range(len(found))], sys.argv[2])
"""
    command = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "to", tmp_path / "rows"]
    subprocess.run(command, check=True, capture_output=True)
    left = dict(hidden)
    for file in (tmp_path / "to").rglob("*.pt"):
        row = torch.load(file)
        held = sum(each.numel() * each.element_size() for each in row.values() if isinstance(each, torch.Tensor))
        assert held < file.stat().st_size < held + 4096, "a row, and not the file that it was cut from"
    for row in torch.load(tmp_path / "rows"):
        agrees(left, row["input_ids"], row["loss_mask"], row["aux_hidden_states"], row["base_model_hidden_states"])
        assert row["base_hidden_prenorm"] is False
    assert not left
