"""SYNTHETIC: what a model of any shape would gain. Random weights, acceptance drawn at given rates.

    python examples/bench/shape.py --shape llama-3.1-8b --device cuda --json examples/bench/results/shape.json

Every pass of target and head runs in full, at the shape's sizes, through the engine that jobs run. Only two things are
made up, since random weights make no sense: how likely the head finds its tokens, and whether the target keeps them.
The likeliest child's chance follows a Beta distribution whose mean at depth d is the d-th of `--acceptance` (0.74, ..
are what a published head of Llama-3.1-8B reaches) and whose spread is `--spread`: at 0 all tokens are alike, near 1 the
head knows nearly always. Real heads are in between; `--spread` decides what `auto` can gain over a chain, so read its
results for several. The next ranks share what is left by halves. Nothing here can be reached from a job.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.stats import beta
from transformers import AutoModelForCausalLM, LlamaConfig

from batchgen.engines.torch import verify
from batchgen.engines.torch.draft import Draft
from batchgen.engines.torch.engine import TorchEngine
from batchgen.engines.torch.measure import measure
from batchgen.engines.torch.target import Target
from batchgen.engines.torch.width import AutoTree
from batchgen.record import Request, Sampling

sys.path.insert(0, str(Path(__file__).parent))
from results import interleave, write
from speculation import decode, fixed_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from batchgen.engines.torch.forest import Forest, Shape
    from batchgen.engines.torch.width import Drafted


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A Llama's shape and its head's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    draft_vocab: int


SHAPES = {
    "llama-3.1-8b": Sizes(4096, 14336, 32, 32, 8, 128, 128256, 32000),
    "smollm2-135m": Sizes(576, 1536, 30, 9, 3, 64, 49152, 8192),
    "tiny": Sizes(64, 128, 8, 4, 2, 16, 512, 256),
}
MODES = ("plain", "chain-1", "chain-2", "chain-3", "chain-4", "chain-5", "tree-3x2x4", "auto")
QUANTILES = 1024


class RandomTarget(Target):
    """Weights as they are initialised, on the device at once."""

    def _load(self, path: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="batchgen_tree")


class DrawnDraft(Draft):
    """A head whose log-probabilities are drawn; its tokens are its own."""

    quantiles: torch.Tensor

    def top(self, state: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Draft.top`."""
        _, tokens = super().top(state, k)
        best = self.quantiles[torch.randint(QUANTILES, (len(state), 1), device=state.device)]
        rest = (1 - best) * 0.5 ** torch.arange(1, k, device=state.device)
        chance = torch.cat([best, torch.minimum(rest, best)], 1)
        return chance.log(), tokens


class Drawn(verify.Sampled):
    """Follows a node with one of its drafted children as likely as the head found it, by depth."""

    def follow(self, nodes: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Let `tokens` follow `nodes`."""
        self._tokens_N[nodes] = tokens


class DrawnEngine(TorchEngine):
    """Verifies by chance."""

    fades: list[float]
    never_drafted: int
    dice = np.random.default_rng(0)

    def _sample(
        self, logits: torch.Tensor, draws: verify.Draws, trees: Forest, drafted: Drafted | None
    ) -> verify.Sampled:
        sampled = Drawn(logits, draws)
        if drafted is None:
            return sampled
        child = np.flatnonzero(trees.depth_N > 0)
        child = child[np.argsort(trees.parent_N[child], kind="stable")]
        parent = trees.parent_N[child]
        place = np.searchsorted(np.array(drafted.rows), trees.row_N[child])
        fade = np.array(self.fades)[np.minimum(trees.depth_N[child], len(self.fades)) - 1]
        chance = fade * np.exp(drafted.candidates.logp.numpy()[place, trees.candidate_N[child]])
        up_to = np.cumsum(chance)
        first = np.searchsorted(parent, parent)
        before = up_to[first] - chance[first]
        dice = before + self.dice.random(len(trees.row_N))[parent]
        sampled.follow(parent, np.full(len(parent), self.never_drafted))
        hit = (up_to > dice) & (up_to - chance <= dice)
        sampled.follow(parent[hit], trees.token_N[child[hit]])
        return sampled


class Machine:
    """A random model of a shape, with its head."""

    def __init__(self, sizes: Sizes, dtype: str, device: str, acceptance: list[float], spread: float) -> None:
        self.sizes = sizes
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            target, head = Path(folder) / "target", Path(folder) / "head"
            shape = {"hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate, "head_dim": sizes.head_dim}
            shape |= {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads}
            shape |= {"vocab_size": sizes.vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
            LlamaConfig(**shape, num_hidden_layers=sizes.layers, tie_word_embeddings=False).save_pretrained(target)
            self.target = RandomTarget(target, getattr(torch, dtype), torch.device(device))
            self.target.eos_token_ids = frozenset()
            self._write_head(head, shape)
            self.draft = DrawnDraft(head, self.target)
        rate = acceptance[0]
        width = spread / (1 - spread) if spread < 1 else np.inf
        table = np.full(QUANTILES, rate)
        if width > 0:
            table = beta.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES, rate / width, (1 - rate) / width)
        self.draft.quantiles = torch.tensor(table.clip(0.01, 0.999), dtype=torch.float32, device=device)
        self._fades = [each / rate for each in acceptance]
        self._auto: dict[int, AutoTree] = {}

    def _write_head(self, folder: Path, layer: dict[str, Any]) -> None:
        s = self.sizes
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        products = {"fc": (s.hidden, 3 * s.hidden), "lm_head": (s.draft_vocab, s.hidden)}
        products |= {
            f"layers.0.self_attn.{n}_proj": (size, 2 * s.hidden) for n, size in (("q", q), ("k", kv), ("v", kv))
        }
        products |= {"layers.0.self_attn.o_proj": (s.hidden, q), "layers.0.mlp.down_proj": (s.hidden, s.intermediate)}
        products |= {f"layers.0.mlp.{name}_proj": (s.intermediate, s.hidden) for name in ("gate", "up")}
        norms = ["layers.0.hidden_norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"]
        tensors = {
            f"{name}.weight": 0.02 * torch.randn(shape, dtype=torch.bfloat16) for name, shape in products.items()
        }
        tensors |= {f"{name}.weight": torch.ones(s.hidden, dtype=torch.bfloat16) for name in norms}
        tensors["d2t"] = torch.zeros(s.draft_vocab, dtype=torch.int64)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        facts = {"speculators_model_type": "eagle3", "norm_before_residual": True, "draft_vocab_size": s.draft_vocab}
        facts["transformer_layer_config"] = layer | {"model_type": "llama", "num_hidden_layers": 1}
        facts["eagle_aux_hidden_state_layer_ids"] = [2, s.layers // 2, s.layers - 1]
        (folder / "config.json").write_text(json.dumps(facts))

    def engine(self, mode: str, rows: int) -> TorchEngine:
        """A fresh engine that decodes by `mode`."""
        width: Shape | AutoTree | None = fixed_shape(mode)
        if mode == "auto":
            if rows not in self._auto:
                (costs, _), on_cpu = measure(self.target, self.draft, rows), self.target.device.type == "cpu"
                # Random texts repeat nothing, and what is kept is drawn for what the head drafted.
                self._auto[rows] = AutoTree(costs, self.target.pass_sizes, lookup=False, stops_early=on_cpu)
            width = self._auto[rows]
        draft = None if width is None else self.draft
        engine = DrawnEngine(self.target, draft, decode=str, batch_size=rows, width=width)
        engine.fades = self._fades
        engine.never_drafted = self.sizes.vocab - 1  # the head's vocabulary is the first part of the target's
        return engine

    def floor_s(self, rows: int, context: int) -> float:
        """Seconds that reading all weights, and keys and values of `context` tokens a row, takes at a copy's speed."""
        s, device = self.sizes, self.target.device
        layer = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads) + 3 * s.hidden * s.intermediate
        num_bytes = (s.layers * layer + s.vocab * s.hidden) * self.target.weights_dtype.itemsize
        num_bytes += 2 * rows * context * s.layers * s.kv_heads * s.head_dim * self.target.dtype.itemsize
        block = torch.zeros((1 << 30 if device.type == "cuda" else 1 << 27) // 4, device=device)
        best = float("inf")
        for _ in range(10):
            began = time.perf_counter()
            block.clone()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        return num_bytes * best / (2 * block.numel() * 4)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options.add_argument("--device", default="cuda")
    options.add_argument("--rows", default="1,8,16,32,64", help="numbers of running rows")
    options.add_argument("--modes", default=",".join(MODES))
    options.add_argument("--acceptance", default="0.74,0.66,0.62,0.58,0.55", help="of the likeliest child, by depth")
    options.add_argument("--spread", type=float, default=0.4, help="0: all alike; towards 1: the head knows")
    options.add_argument("--context", type=int, default=512, help="prompt tokens of a row")
    options.add_argument("--max-tokens", type=int, default=128)
    options.add_argument("--turns", type=int, default=1, help="turns of each mode, of which the median counts")
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    rates = [float(rate) for rate in args.acceptance.split(",")]
    machine = Machine(SHAPES[args.shape], args.dtype, args.device, rates, args.spread)
    results: list[dict[str, Any]] = []
    for rows in map(int, args.rows.split(",")):
        prompt = [token % SHAPES[args.shape].vocab for token in range(args.context)]
        requests = [Request(i, str(i), 0, prompt, Sampling(max_tokens=args.max_tokens)) for i in range(rows)]
        about = {"synthetic": True, "shape": args.shape, "rows": rows}

        def turn(mode: str, rows: int = rows, requests: list[Request] = requests) -> dict[str, float]:
            return decode(machine.engine(mode, rows), requests)

        found = interleave(turn, args.modes.split(","), args.turns, **about)
        floor = machine.floor_s(rows, args.context + args.max_tokens // 2)
        for each in found:
            if each["mode"] == "plain":
                each["bandwidth_floor_share"] = round(floor * each["tokens_per_s"] / rows, 3)
        results += found
    write(args.json, results, args, args.device)


if __name__ == "__main__":
    main()
