"""Prompts to completions to an export to features to a trained head, which drafts on both engines."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from batchgen import models

pytest.importorskip("speculators")
ROOT = Path(__file__).parents[3]


def run(*command: str | Path) -> str:
    environment = os.environ | {"COLUMNS": "200", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    words = [sys.executable, "-W", "ignore", *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def begun(
    folder: Path, vocab: int, tokens: dict[int, int], *, exchange: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """What the trainer is given of the demo's head: tensors and config."""
    begin, target = (
        runpy.run_path(str(ROOT / "examples/train_head/train.py"))["begun"],
        models.fetch("demo:smollm2-135m"),
    )
    copy = begin(ROOT / "examples/smollm2", folder, target.path, vocab, tokens, exchange=exchange)
    return load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())


def test_a_head_is_trained_further_in_float32(tmp_path):
    """The trainer trains weights in the type that they are stored in, and in bfloat16 small steps are lost."""
    tensors, config = begun(tmp_path, 0, {})
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    assert config["dtype"] == "float32"
    old = load_file(ROOT / "examples/smollm2/model.safetensors")
    assert torch.equal(tensors["t2d"], old["t2d"]), "it proposes what it did, unless more is asked for"


def test_a_head_learns_to_propose_more_tokens(tmp_path):
    old = load_file(ROOT / "examples/smollm2/model.safetensors")
    known = old["t2d"].nonzero().flatten()
    rare, frequent, unused = (~old["t2d"]).nonzero().flatten()[[3, 500, 7]].tolist()
    tokens = {frequent: 9, rare: 2, unused: 1, int(known[0]): 50}
    tensors, config = begun(tmp_path, len(known) + 2, tokens)
    chosen = tensors["t2d"].nonzero().flatten()
    assert sorted(chosen.tolist()) == sorted([*known.tolist(), rare, frequent])
    assert torch.equal(torch.arange(len(chosen)) + tensors["d2t"], chosen)
    assert config["draft_vocab_size"] == len(chosen)
    target = load_file(models.fetch("demo:smollm2-135m").path / "model.safetensors")["model.embed_tokens.weight"]
    for token, row in zip(chosen.tolist(), tensors["lm_head.weight"], strict=True):
        expected = target[token] if token in (rare, frequent) else old["lm_head.weight"][known == token][0]
        assert torch.equal(row, expected.float())


def test_a_head_exchanges_what_it_proposes_in_vain(tmp_path):
    old = load_file(ROOT / "examples/smollm2/model.safetensors")
    known = old["t2d"].nonzero().flatten().tolist()
    rare, frequent = (~old["t2d"]).nonzero().flatten()[[3, 500]].tolist()
    idle = known[5]
    tokens = dict.fromkeys(known, 1) | {idle: 0, frequent: 100, rare: 2}
    tensors, config = begun(tmp_path, 0, tokens, exchange=True)
    chosen = tensors["t2d"].nonzero().flatten()
    assert sorted(chosen.tolist()) == sorted({*known, frequent} - {idle})
    assert torch.equal(torch.arange(len(chosen)) + tensors["d2t"], chosen)
    assert config["draft_vocab_size"] == len(known)
    target = load_file(models.fetch("demo:smollm2-135m").path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["lm_head.weight"][chosen == frequent][0], target[frequent].float())


def test_a_head_keeps_a_share_of_what_it_was(tmp_path):
    publish = runpy.run_path(str(ROOT / "examples/train_head/train.py"))["publish"]
    before = ROOT / "examples/smollm2"
    old = load_file(before / "model.safetensors")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/config.json").write_text((before / "config.json").read_text())
    save_file(
        {n: t + 1 if t.is_floating_point() else t for n, t in old.items()}, tmp_path / "trained/model.safetensors"
    )
    publish(tmp_path / "trained", tmp_path / "head", "demo:smollm2-135m", before, 0.25)
    new = load_file(tmp_path / "head/model.safetensors")
    assert new.keys() == old.keys()
    for name, tensor in new.items():
        expected = old[name] + 0.75 if tensor.is_floating_point() else old[name]
        assert torch.allclose(tensor.float(), expected.float(), atol=0.03), name
        assert tensor.dtype == old[name].dtype


@pytest.mark.timeout(1200)
def test_a_head_is_trained_on_a_jobs_rows_and_drafts_on_both_engines(tmp_path):
    job = ("jobs/train.yaml", "--set", f"output.path={tmp_path}/out", "--set", "sampling.max_tokens=12")
    run("-m", "batchgen", "submit", *job, "--set", "speculation.tree=off")
    run("-m", "batchgen", "features", *job)
    sets = {"even": "prompt_tokens % 2 = 0", "odd": "prompt_tokens % 2 = 1"}
    exported = [run("-m", "batchgen", "export", *job, "--form", "speculators-states", "--to", tmp_path / name,
                    "--where", where, "--hold-out", "0.1", "--json") for name, where in sets.items()]  # fmt: skip
    rows_of = [json.loads(each)["rows"] for each in exported]
    assert min(rows_of) > 20
    assert sum(rows_of) == 200

    def train(to: str, *options: str) -> list[float]:
        said = run("examples/train_head/train.py", "--target", "demo:smollm2-135m", "--data", tmp_path / "even",
                   tmp_path / "odd", "--to", tmp_path / to, *options, "--total-seq-len=384", "--log-freq=1",
                   "--ttt-steps=2", "--num-workers=0")  # fmt: skip
        return [float(loss) for loss in re.findall(r"train/loss=([\d.]+)", said)]

    losses = train("first", "--vocab", "2048", "--", "--epochs=1")
    assert len(losses) >= 50
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    further = train("head", "--head", tmp_path / "first", "--vocab", "2100", "--keep", "0.25", "--", "--epochs=1",
                    "--max-steps=10")  # fmt: skip
    assert sum(further) < 0.8 * sum(losses[:10])
    for engine in ("torch", "vllm"):
        few = tmp_path / "few.parquet"
        pl.read_parquet(ROOT / "examples/prompts/train.parquet").head(8).write_parquet(few)
        run("-m", "batchgen", "submit", "jobs/train.yaml", *(f"--set={setting}" for setting in (
            f"input.path={few}", f"output.path={tmp_path}/{engine}", f"model.draft={tmp_path}/head",
            f"engine.kind={engine}", "model.dtype=float32", "speculation.tree.depth=2", "sampling.max_tokens=16",
        )))  # fmt: skip
    rows = {engine: pl.read_parquet(tmp_path / engine / "*.parquet").sort("row_id") for engine in ("torch", "vllm")}
    assert all(table["draft_tokens"].min() > 0 for table in rows.values())
    assert rows["torch"]["completion"].to_list() == rows["vllm"]["completion"].to_list()
