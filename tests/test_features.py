"""Hidden states are transformers' own, of every finished row once, whatever dies between."""

from __future__ import annotations

import json
import time
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commandline import Piped, batchgen
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from batchgen import engines, models
from batchgen.engines.torch.capture import PASS_TOKENS, TorchCapture, _passes
from batchgen.engines.torch.target import Target

ROOT = Path(__file__).parents[1]
LAYERS = (2, 15, 27, 30)


def job_file(folder: Path, **changes) -> Path:
    """Six short prompts, two samples each, in three parts."""
    table = pl.read_parquet(ROOT / "examples/prompts/eagle_gsm8k.parquet").head(6)
    table.write_parquet(folder / "in.parquet")
    sections = {
        "version": 1,
        "name": "features",
        "input": {"path": str(folder / "in.parquet"), "messages": "messages"},
        "model": {"target": "demo:smollm2-135m", "dtype": "float32"},
        "speculation": {"tree": "off"},
        "sampling": {"max_tokens": 12, "temperature": 0.8, "n": 2},
        "checkpoint": {"rows_per_part": 2},
        "output": {"path": str(folder / "out")},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(sections | changes))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished job."""
    folder = tmp_path_factory.mktemp("features")
    done = batchgen("submit", job_file(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def reference():
    """Transformers' hidden states [S, L, H] after `LAYERS`, the last before its norm."""
    model = AutoModelForCausalLM.from_pretrained(models.fetch("demo:smollm2-135m").path, dtype=torch.float32).eval()
    last = {}
    model.model.norm.register_forward_pre_hook(lambda module, args: last.update(states=args[0]))

    def states(ids):
        with torch.no_grad():
            found = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return torch.stack([last["states"][0] if layer == 30 else found[layer][0] for layer in LAYERS], 1)

    return states


def rows(folder: Path) -> dict[tuple[str, int], dict]:
    """What the files of `folder` hold of each row."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = {name: json.loads(value) for name, value in file.metadata().items()}
            assert about["layers"] == list(LAYERS)
            tensors = {name: file.get_tensor(name) for name in ("hidden_states", "token_ids", "loss_mask", "lengths")}
        lengths = tensors.pop("lengths").tolist()
        assert sum(lengths) == len(tensors["hidden_states"])
        parts = [torch.split(tensor, lengths) for tensor in tensors.values()]
        for key, *values in zip(zip(about["row_ids"], about["samples"], strict=True), *parts, strict=True):
            assert key not in found
            found[key] = dict(zip(tensors, values, strict=True))
    return found


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative distance of any layer."""
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found.unbind(1), expected.unbind(1), strict=True))


def test_every_finished_row_has_transformers_hidden_states(finished, reference):
    done = batchgen("features", finished / "job.yaml", "--dtype", "float32", "--to", finished / "f32")
    assert done.returncode == 0, done.stderr
    assert "3 of 3 files to do" in done.stderr
    found = rows(finished / "f32")
    table = pl.read_parquet(finished / "out/*.parquet")
    assert table.height == 12
    assert set(found) == set(table.select("row_id", "sample").rows())
    for row in table.iter_rows(named=True):
        mine = found[row["row_id"], row["sample"]]
        ids = row["prompt_token_ids"] + row["completion_token_ids"]
        assert mine["token_ids"].tolist() == ids
        assert mine["loss_mask"].tolist() == [0] * len(row["prompt_token_ids"]) + [1] * len(row["completion_token_ids"])
        assert off(mine["hidden_states"], reference(ids)) < 1e-4


def test_what_is_captured_is_left_alone_and_the_rest_is_done_after_a_kill(finished):
    folder = finished / "out/__batchgen/features"
    process = Piped("features", finished / "job.yaml")
    while not list(folder.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    again = batchgen("features", finished / "job.yaml")
    assert again.returncode == 0, again.stderr
    assert f"{3 - len(before)} of 3 files to do" in again.stderr
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())
    assert len(rows(folder)) == 12
    nothing = batchgen("features", finished / "job.yaml", "--json")
    assert json.loads(nothing.stdout)["todo"] == []
    assert not any(row["hidden_states"].isnan().any() for row in rows(folder).values())
    assert {row["hidden_states"].dtype for row in rows(folder).values()} == {torch.bfloat16}


def test_one_folder_holds_one_kind_of_features(finished):
    assert batchgen("features", finished / "job.yaml", "--to", finished / "own", "--layers", "0,1").returncode == 0
    other = batchgen("features", finished / "job.yaml", "--to", finished / "own", "--layers", "1,2")
    assert other.returncode == 73
    assert "layers [0, 1], not [1, 2]" in other.stderr


def test_a_part_that_was_replaced_is_read_again(finished):
    folder, part = finished / "replaced", sorted((finished / "out").glob("*.parquet"))[1]
    assert batchgen("features", finished / "job.yaml", "--to", folder).returncode == 0
    before = {path.name for path in folder.glob("*.safetensors")}
    table = pq.read_table(part)
    commit = {b"batchgen.commit": b"another"}
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, **commit}), part, write_page_checksum=True)
    again = batchgen("features", finished / "job.yaml", "--to", folder)
    assert "1 of 3 files to do" in again.stderr
    after = {path.name for path in folder.glob("*.safetensors")}
    assert len(after) == 3
    assert len(before & after) == 2
    assert len(rows(folder)) == 12


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--layers", "2,31"], 2, "has 0 (the embedding) to 30"),
        (["--set", "engine.kind=rehearsal"], 2, "no hidden states"),
        (["--set", "output.path=nowhere"], 2, "submit the job first"),
        (["--layers", "two"], 2, "expected numbers"),
    ],
)
def test_what_cannot_be_captured_is_refused(finished, arguments, code, words):
    refused = batchgen("features", finished / "job.yaml", "--to", finished / "never", *arguments)
    assert refused.returncode == code, refused.stderr
    assert words in refused.stderr.replace("\n", " ")
    assert not list((finished / "never").glob("*.safetensors"))


def test_parts_without_token_ids_are_refused(tmp_path):
    file = job_file(tmp_path, output={"path": str(tmp_path / "out"), "token_ids": False})
    assert batchgen("submit", file).returncode == 0
    refused = batchgen("features", file)
    assert refused.returncode == 2
    assert "output.token_ids: true" in refused.stderr


def test_layers_are_by_default_those_that_the_jobs_head_listens_to(tmp_path):
    target, config = models.fetch("demo:smollm2-135m"), json.loads((ROOT / "examples/smollm2/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eagle_aux_hidden_state_layer_ids": [20, 1, 9]}))
    head = models.Model(tmp_path, "identity", "head")
    assert engines.layers(target, None, head)[0] == (1, 9, 20, 30)
    assert engines.layers(target, None, head, (3, 5))[0] == (3, 5, 30), "the job file has the last word"
    assert engines.layers(target, (4,), head, (3, 5))[0] == (4,)
    assert engines.layers(target, None)[0] == LAYERS


def test_rows_longer_than_a_pass_are_read_in_turns(reference):
    target = Target(models.fetch("demo:smollm2-135m").path, torch.float32, torch.device("cpu"))
    capture = TorchCapture(target, LAYERS, torch.float32)
    asked = [[7 + i % 900 for i in range(n)] for n in (40, PASS_TOKENS + 70, 3)]
    for found, ids in zip(capture.states(asked), asked, strict=True):
        assert found.shape == (len(ids), len(LAYERS), 576)
        assert off(found, reference(ids)) < 1e-4


@given(st.lists(st.integers(1, 3 * PASS_TOKENS), max_size=12))
def test_passes_hold_every_token_once_in_order_and_no_more_than_they_may(lengths):
    read = [0] * len(lengths)
    for spans, at in _passes([range(length) for length in lengths]):
        assert 0 < sum(span.stop - span.start for span in spans) <= PASS_TOKENS
        assert len({span.slot for span in spans}) == len(spans)
        for span, row in zip(spans, at, strict=True):
            assert span.prefix == read[row]
            assert read[row] == 0 or len(spans) == 1, "a row goes on in the slot that it began in"
            read[row] += span.stop - span.start
    assert read == lengths
