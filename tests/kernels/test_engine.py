"""The torch engine through our kernels, and through captured passes: the tokens are those of the references."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from batchgen.engines.torch.draft import Draft
from batchgen.engines.torch.engine import TorchEngine
from batchgen.engines.torch.forest import Shape
from batchgen.engines.torch.graphs import Graphs, cuda_graph
from batchgen.engines.torch.target import Target
from batchgen.engines.torch.width import AutoTree
from batchgen.record import Request, Sampling
from batchgen.speculation.costs import Costs, Table
from batchgen_kernels import dispatch

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, VOCAB = 32, 24  # so few tokens that a head that knows nothing is right now and then


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """A random Llama and a random head for it."""
    torch.manual_seed(3)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    ends = {"eos_token_id": VOCAB - 1, "bos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model("llama", num_hidden_layers=2, max_position_embeddings=256, **sizes, **heads, **ends)
    target, head = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("head")
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():  # as they come, logits hardly differ
        weight.data *= 4
    model.save_pretrained(target)
    norms = ["layers.0.hidden_norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"]
    products = {"fc": (HIDDEN, 3 * HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    products |= {f"layers.0.mlp.{name}_proj": (48, HIDDEN) for name in ("gate", "up")}
    products |= {"layers.0.mlp.down_proj": (HIDDEN, 48), "layers.0.self_attn.o_proj": (HIDDEN, 64)}
    products |= {f"layers.0.self_attn.{n}_proj": (size, 2 * HIDDEN) for n, size in (("q", 64), ("k", 32), ("v", 32))}
    tensors = {f"{name}.weight": torch.ones(HIDDEN) for name in norms}
    tensors |= {f"{name}.weight": torch.randn(shape) / 4 for name, shape in products.items()}
    save_file(tensors, head / "model.safetensors")
    layer = {"model_type": "llama", "num_hidden_layers": 1, "rms_norm_eps": 1e-5, **sizes, **heads}
    facts = {"draft_vocab_size": VOCAB, "eagle_aux_hidden_state_layer_ids": [0, 1, 2], "norm_output": True}
    facts |= {"speculators_model_type": "eagle3", "norm_before_residual": False}
    (head / "config.json").write_text(json.dumps(facts | {"transformer_layer_config": layer}))
    return target, head


def auto() -> AutoTree:
    flat = [Table([1, 1001], [second, second + 0.01]) for second in (0.03, 0.0001, 0.0001)]
    return AutoTree(Costs(*flat))


def again(run):
    """What a CUDA graph does, without one: a replay computes anew and writes to the tensors of the first time."""
    outputs = run()

    def replay() -> None:
        for old, new in zip(outputs, run(), strict=True):
            old.copy_(new)

    return replay, outputs


def decode(checkpoints, device, width, graphs: Graphs | None = None):
    """Three rows on two slots, greedy and sampled in turn; the tokens, and how many of them were drafted."""
    target = Target(checkpoints[0], torch.float32, device)
    target.graphs = graphs or Graphs(None)
    draft = Draft(checkpoints[1], target) if width is not None else None
    engine = TorchEngine(target, draft, decode=str, batch_size=2, width=width, prefill_tokens=12)
    samplings = (Sampling(max_tokens=6), Sampling(max_tokens=5, temperature=0.9, top_p=0.9, top_k=12, seed=5))
    for i in range(3):
        prompt = [(5 * i + 3 * j) % (VOCAB - 1) for j in range(4 + 5 * i)]
        engine.submit(Request(i, str(i), 0, prompt, samplings[i % 2]))
    done = []
    while engine.unfinished:
        done += engine.step()
    tokens = [list(c.token_ids) for c in sorted(done, key=lambda c: c.key)]
    return tokens, sum(c.acceptance.accepted_tokens for c in done)


@pytest.fixture(scope="module")
def plain(checkpoints):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "interpreted", False)
        tokens, _ = decode(checkpoints, torch.device("cpu"), None)
    return tokens


@pytest.fixture(scope="module")
def tree(device, checkpoints):
    """Tokens of a wide tree through kernels, and how many of them were drafted."""
    return decode(checkpoints, device, Shape(3, 4, 14))


def test_kernels_change_no_token(device, checkpoints, plain, tree):
    assert decode(checkpoints, device, None)[0] == plain
    for tokens, accepted in (tree, decode(checkpoints, device, auto())):
        assert tokens == plain
        assert accepted > 0


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # padding computes on what lay there
def test_captured_passes_change_no_token(device, checkpoints, plain, tree):
    graphs = Graphs(cuda_graph if device.type == "cuda" else lambda: again)
    tokens, accepted = decode(checkpoints, device, Shape(3, 4, 14), graphs)
    assert tokens == plain
    assert accepted == tree[1] > 0
    kinds = {key[0] for key in graphs._graphs}
    assert kinds == {"verify", "read", "extend", "level 4"}


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_few_graphs_are_kept_and_captured_again(device, checkpoints, plain, monkeypatch):
    begun = []

    def begin():
        begun.append(cuda_graph() if device.type == "cuda" else again)
        return begun[-1]

    monkeypatch.setattr("batchgen.engines.torch.graphs.MAX_GRAPHS", 2)
    graphs = Graphs(begin)
    tokens, _ = decode(checkpoints, device, Shape(3, 4, 14), graphs)
    assert tokens == plain
    assert len(graphs._graphs) == 2 < graphs.num_captured
    before = len(begun)
    graphs.clear()
    assert not graphs._graphs
    assert len(begun) == before + 1, "memory that all graphs left takes no new ones"


def test_what_cannot_be_captured_runs_as_it_comes(device, checkpoints, plain, caplog):
    def refuses(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = Graphs(lambda: refuses)
    tokens, _ = decode(checkpoints, device, Shape(2, 1, 2), graphs)
    assert tokens == plain
    assert "CUDA graphs are off" in caplog.text
    assert graphs.sizes == ()
