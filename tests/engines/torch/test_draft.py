"""Drafts equal an independent reference, for both checkpoint formats and every norm flag, on real weights."""

from __future__ import annotations

import functools
import itertools
import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from batchgen.engines.torch.draft import Draft
from batchgen.engines.torch.engine import TorchEngine
from batchgen.engines.torch.forest import Shape
from batchgen.engines.torch.layout import Tiles
from batchgen.engines.torch.weights import for_vllm, load_head
from batchgen.errors import ModelError
from batchgen.record import Sampling
from batchgen_kernels.tree_attention import MAX_NODES, Span

from .conftest import HEAD
from .reference import Reference

if TYPE_CHECKING:
    from pathlib import Path

DEPTH = 3
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


class Recording(TorchEngine):
    """Remembers what was drafted after which tokens, and how likely the head found it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.drafted: list[tuple[list[int], list[int], list[float]]] = []

    def _grow(self, slots):
        before = [list(self._rows[slot].tokens) for slot in slots]
        drafted, trees = super()._grow(slots)
        if drafted is not None:
            for row, (tokens, logp) in enumerate(zip(before, drafted.candidates.logp, strict=True)):
                nodes = (trees.row_N == row) & (trees.depth_N > 0)
                drafts = trees.token_N[nodes].tolist(), logp[trees.candidate_N[nodes]].tolist()
                self.drafted.append((tokens, *drafts))
        return drafted, trees


@pytest.fixture(scope="module")
def hidden_states(bench):
    """The residual stream after every layer, [T, H] each, by transformers' own eager attention."""
    model = AutoModelForCausalLM.from_pretrained(bench.path, dtype=torch.float32, attn_implementation="eager")

    @functools.cache  # no head changes what the target writes
    @torch.no_grad()
    def run(tokens: tuple[int, ...]) -> list[torch.Tensor]:
        return [h[0] for h in model.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states]

    return run


def write_head(folder: Path, fmt: str, flags: dict[str, bool], *, layers: dict | None = None, drop: tuple = ()) -> Path:
    """The demo's head's weights with other flags; norms that it lacks are made up."""
    config, w = json.loads((HEAD / "config.json").read_text()), load_file(HEAD / "model.safetensors")
    noise = torch.Generator().manual_seed(7)
    for name, size in [("input_norm.weight", 3 * 576), *((f"fc_norm.{i}.weight", 576) for i in range(3))]:
        w.setdefault(name, (1 + 0.2 * torch.randn(size, generator=noise)).to(torch.bfloat16))
    if fmt == "safeailab":
        layer = config["transformer_layer_config"]
        layer = {k: v for k, v in layer.items() if k not in ("layer_types", "use_sliding_window", "sliding_window")}
        flat = {**layer, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config["draft_vocab_size"]}
        config = flat | flags | (layers or {})
        w = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in w.items()}
    else:
        config = {k: v for k, v in config.items() if k != "eagle_aux_hidden_state_layer_ids"} | flags
        config |= layers or {"eagle_aux_hidden_state_layer_ids": [2, 15, 27]}
    for name in drop:
        config.pop(name, None)
        w.pop(name, None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in w.items()}, folder / "model.safetensors")
    return folder


def check_against_reference(bench, hidden_states, head: Path, flags: dict[str, bool], layers=(2, 15, 27)) -> int:
    # A prompt of more tokens than a tile holds, and behind it one of fewer: the head reads the second one first.
    prompts = bench.prompts("mt_bench", 2)[::-1]
    assert len(prompts[0]) > MAX_NODES > len(prompts[1])
    engine = bench.engine(Shape(DEPTH, 1, DEPTH), head=head, kind=Recording)
    done = bench.run(engine, prompts, Sampling(max_tokens=12))
    w = {name.replace("midlayer.", "layers.0."): t for name, t in load_file(head / "model.safetensors").items()}
    shape = {"heads": 9, "kv_heads": 3, "head_dim": 64, "theta": 100000.0, "eps": 1e-5}
    reference = Reference(shape | flags, w, engine._target.embedding.detach())
    states = {}
    for prompt, completion in zip(prompts, done, strict=True):
        states[tuple(prompt)] = hidden_states((*prompt, *completion.token_ids))
    compared = 0
    for tokens, drafted, logps in engine.drafted:
        whole = next(s for prompt, s in states.items() if tuple(tokens[: len(prompt)]) == prompt)
        seen = [whole[layer][: len(tokens) - 1] for layer in layers]
        expected, expected_logps = reference.drafts(tokens, seen, len(drafted))
        assert drafted == expected, f"after {len(tokens)} tokens, {flags}"
        # float32 over some hundred sums; a position or a key that is off by one moves these by 0.01 and more.
        assert logps == pytest.approx(expected_logps, abs=2e-3), f"after {len(tokens)} tokens, {flags}"
        compared += len(drafted)
    return compared


@pytest.mark.parametrize(
    "values", list(itertools.product((False, True), repeat=4)), ids=lambda v: "".join("ft"[x] for x in v)
)
def test_drafts_of_a_speculators_head_equal_the_reference(bench, hidden_states, tmp_path, values):
    flags = dict(zip(FLAGS, values, strict=True))
    head = write_head(tmp_path / "head", "speculators", flags)
    assert check_against_reference(bench, hidden_states, head, flags) >= 20


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_drafts_of_a_safeailab_head_equal_the_reference(bench, hidden_states, tmp_path, norm_before_residual):
    flags = {**dict.fromkeys(FLAGS, False), "norm_before_residual": norm_before_residual}
    head = write_head(tmp_path / "head", "safeailab", flags)
    assert check_against_reference(bench, hidden_states, head, flags, layers=(2, 15, 27)) >= 20


def test_a_head_of_two_layers_reads_all_at_once_as_it_does_one_by_one(bench, tmp_path):
    head = write_head(tmp_path / "head", "speculators", dict.fromkeys(FLAGS, False))
    config, w = json.loads((head / "config.json").read_text()), load_file(head / "model.safetensors")
    config["transformer_layer_config"]["num_hidden_layers"] = 2
    w |= {name.replace("layers.0.", "layers.1."): w[name].clone() for name in list(w) if name.startswith("layers.0.")}
    for name in "qkv":  # of the first layer they read the token's embedding, too
        w[f"layers.1.self_attn.{name}_proj.weight"] = w[f"layers.0.self_attn.{name}_proj.weight"][:, 576:].contiguous()
    (head / "config.json").write_text(json.dumps(config))
    save_file(w, head / "model.safetensors")
    draft = Draft(head, bench.target(torch.float32))
    few, many = 5, MAX_NODES + 6
    ids, features = torch.arange(few + many), torch.randn(few + many, draft.feature_width)
    pool = draft.pool()
    pool.resize(2, 128)
    at_once = draft.extend(ids, features, Tiles.chains([0], [0], [few]), [Span(few, few + many, 1, 0)], pool)
    for slot, (start, stop) in enumerate([(0, few), (few, few + many)]):
        for i in range(start, stop):
            last = draft.extend(ids[i : i + 1], features[i : i + 1], Tiles.chains([slot], [i - start], [1]), [], pool)
        torch.testing.assert_close(at_once[slot], last[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("fmt", "layers", "expected"),
    [
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [20, 1, 10]}, (1, 10, 20)),  # raw: after L layers
        ("safeailab", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 9, 19]}}, (1, 10, 20)),  # outputs: + 1
        ("safeailab", {}, (2, 15, 27)),  # the default of a 30-layer target
    ],
)
def test_layer_ids_are_read_by_the_convention_of_their_place(bench, hidden_states, tmp_path, fmt, layers, expected):
    flags = dict.fromkeys(FLAGS, False)
    head = write_head(tmp_path / "head", fmt, flags, layers=layers)
    assert fit(head).config.aux_layers == expected
    assert check_against_reference(bench, hidden_states, head, flags, layers=expected) >= 20


def fit(head: Path, **shape):
    known = {"num_target_layers": 30, "target_hidden_size": 576, "vocab_size": 49152, "aux_layers": None}
    return load_head(head, **(known | shape))


def test_a_missing_norm_flag_follows_the_rule_of_its_format(tmp_path):
    for fmt, expected in (("speculators", True), ("safeailab", False)):
        head = write_head(tmp_path / fmt, fmt, dict.fromkeys(FLAGS, False), drop=("norm_before_residual",))
        assert fit(head).config.norm_before_residual is expected


def test_a_head_without_auxiliary_layers_listens_to_the_last_state(tmp_path):
    layers = {"eagle_config": {"use_aux_hidden_state": False}}
    head = write_head(tmp_path / "head", "safeailab", dict.fromkeys(FLAGS, False), layers=layers, drop=("fc.weight",))
    assert fit(head).config.aux_layers == ()


def test_the_job_file_can_override_the_layers():
    assert fit(HEAD, aux_layers=[5, 3, 4]).config.aux_layers == (3, 4, 5)


@pytest.mark.parametrize("fmt", ["safeailab", "speculators"])
def test_vllm_is_told_of_what_it_would_guess(tmp_path, fmt):
    """It would take nested ids as they stand, or the default, and True for a missing flag in one of the formats."""
    nested = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 9, 19], "use_aux_hidden_state": True}}
    head = write_head(tmp_path / "head", fmt, dict.fromkeys(FLAGS, False), layers=nested)
    config = json.loads((head / "config.json").read_text())
    del config["norm_before_residual"]
    (head / "config.json").write_text(json.dumps(config))
    shape = {"num_target_layers": 30, "target_hidden_size": 576, "vocab_size": 49152}
    told = for_vllm(head, tmp_path / fmt, **shape, aux_layers=None)
    said = json.loads((told / "config.json").read_text())
    assert said["eagle_aux_hidden_state_layer_ids"] == [1, 10, 20]
    assert said["eagle_config"] == {"use_aux_hidden_state": True}
    assert said["norm_before_residual"] == (fmt == "speculators")
    assert fit(told) is not None
    assert json.loads((head / "config.json").read_text()) == config, "the head itself is left alone"
    with pytest.raises(ModelError, match="4096"):
        for_vllm(head, tmp_path, **(shape | {"target_hidden_size": 4096}), aux_layers=None)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"target_hidden_size": 4096}, ["576", "4096"]),
        ({"vocab_size": 32000}, ["49152", "32000"]),
        ({"num_target_layers": 12}, ["27", "12"]),
    ],
)
def test_a_head_that_does_not_fit_names_both_sides(shape, words):
    with pytest.raises(ModelError) as caught:
        fit(HEAD, **shape)
    assert all(word in str(caught.value) for word in [str(HEAD), *words])


def test_absolute_ids_in_d2t_are_refused(tmp_path):
    head = write_head(tmp_path / "head", "speculators", dict.fromkeys(FLAGS, False))
    w = load_file(head / "model.safetensors")
    save_file(w | {"d2t": w["d2t"] + 49152}, head / "model.safetensors")
    with pytest.raises(ModelError, match="d2t"):
        fit(head)


def test_another_architecture_is_refused_by_name(bench):
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        fit(bench.path)
