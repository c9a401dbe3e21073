"""The EAGLE-3 head: one decoder layer over target features, feeding on its own output.

Math and conventions as in Li et al., "EAGLE-3" (arXiv 2503.01840) and the SafeAILab reference (eagle/model/cnets.py):
slot i pairs the target's feature at position i with the embedding of token i + 1, at rotary position i. After each
verification the slots of accepted tokens are rewritten from true target features (`extend`); what the tree put there is
thrown away. Skipping that rewrite costs 8 to 15 % of acceptance (vLLM issue 14649).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from batchgen.engines.torch.decoder import Attention, Mlp, Norm, angles
from batchgen.engines.torch.kvcache import Pool
from batchgen.engines.torch.layout import Heads, Layout, Tiles, upload
from batchgen.engines.torch.linear import Weight
from batchgen.engines.torch.weights import load_head
from batchgen.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from batchgen.engines.torch.target import Target
    from batchgen_kernels.tree_attention import Span


class Draft:
    """A draft head bound to its target, sharing the target's embedding and lm_head where it brings none.

    feature_width: numbers in the target features of one token
    """

    def __init__(self, path: Path, target: Target, aux_layers: Sequence[int] | None = None) -> None:
        head = load_head(
            path,
            num_target_layers=target.num_layers,
            target_hidden_size=target.embedding.shape[1],
            vocab_size=target.embedding.shape[0],
            aux_layers=aux_layers,
        )
        self.config = head.config
        self.dtype, self.device = target.dtype, target.device
        w = {name: tensor.to(self.device, target.weights_dtype).to(self.dtype) for name, tensor in head.tensors.items()}
        own = w.get("embed_tokens.weight")
        self.embedding = target.embedding if own is None or torch.equal(own, target.embedding) else own
        layer = self.config.layer
        num_heads = layer.num_attention_heads
        num_kv_heads = layer.num_key_value_heads or num_heads
        self._head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // num_heads
        self.heads = Heads(num_heads, num_kv_heads, self.dtype, self.device, self.config.window)
        self._rotary = LlamaRotaryEmbedding(layer).to(self.device)

        def norm(name: str) -> Norm:
            return Norm(w[f"{name}.weight"], layer.rms_norm_eps)

        def product(prefix: str, *names: str) -> Weight:
            biases = [w[f"{prefix}{name}.bias"] for name in names if f"{prefix}{name}.bias" in w]
            if biases and len(biases) < len(names):
                raise ModelError(f"{path}: {prefix}{{{','.join(names)}}} have biases in part; expected all or none")
            stacked = torch.cat([w[f"{prefix}{name}.weight"] for name in names])
            return Weight(stacked, torch.cat(biases) if biases else None, two_bytes=target.two_bytes)

        def attention(prefix: str) -> Attention:
            qkv, out = product(prefix, "q_proj", "k_proj", "v_proj"), product(prefix, "o_proj")
            norms = (norm(f"{prefix}q_norm"), norm(f"{prefix}k_norm")) if f"{prefix}q_norm.weight" in w else None
            return Attention(qkv, out, norms, self.heads)

        self._layers = [
            (
                norm(f"layers.{i}.input_layernorm"),
                attention(f"layers.{i}.self_attn."),
                norm(f"layers.{i}.post_attention_layernorm"),
                Mlp(product(f"layers.{i}.mlp.", "gate_proj", "up_proj"), product(f"layers.{i}.mlp.", "down_proj")),
            )
            for i in range(layer.num_hidden_layers)
        ]
        self._hidden_norm = norm("layers.0.hidden_norm")
        self._final_norm = norm("norm")
        self._input_norm = norm("input_norm") if self.config.norm_before_fc else None
        self._fc_norms = (
            [norm(f"fc_norm.{i}") for i in range(len(self.config.aux_layers))] if self.config.fc_norm else []
        )
        self._fc = product("", "fc") if "fc.weight" in w else None
        self._lm_head = product("", "lm_head") if "lm_head.weight" in w else target.lm_head
        self._target_ids = None if head.target_ids is None else head.target_ids.to(self.device)
        target.capture(self.config.aux_layers)
        self._graphs = target.graphs
        self.feature_width = max(1, len(self.config.aux_layers)) * int(target.embedding.shape[1])

    def pool(self) -> Pool:
        """An empty KV pool for the head's layers."""
        layers = self.config.layer.num_hidden_layers
        return Pool(layers, self.heads.num_kv_heads, self._head_dim, self.dtype, self.device)

    def _fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The head's input [N, H_draft] from target features [N, sum H]."""
        if self._fc is None:
            return features
        if self._input_norm is not None:
            features = self._input_norm(features)[0]
        if self._fc_norms:
            parts = features.chunk(len(self._fc_norms), -1)
            features = torch.cat([norm(part)[0] for norm, part in zip(self._fc_norms, parts, strict=True)], -1)
        return self._fc(features)

    def _begin(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, layout: Layout, pool: Pool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values of all layers; the last one's queries [N, heads, D], and what it adds to [N, H].

        `hidden` is a fused feature where the target has seen the slot, and the parent's output state in a tree.
        """
        rotary = angles(self._rotary, hidden, layout)
        normed = self._hidden_norm(hidden)[0]
        y = normed if self.config.norm_before_residual else hidden
        x = torch.cat([self._layers[0][0](self.embedding[token_ids])[0], normed], -1)
        for i, (_, attention, after, mlp) in enumerate(self._layers[:-1]):
            x, residual = after(attention(x, rotary, layout, pool, i), y)
            y = residual + mlp(x)
            x = self._layers[i + 1][0](y)[0]
        return self._layers[-1][1].store(x, rotary, layout, pool, len(self._layers) - 1), y

    def _end(self, q: torch.Tensor, y: torch.Tensor, layout: Layout, pool: Pool) -> torch.Tensor:
        """The output state [N, H] of what `_begin` returned; it feeds both `top` and the next tree level."""
        _, attention, after, mlp = self._layers[-1]
        x, residual = after(attention.read(q, layout, pool, len(self._layers) - 1), y)
        y = residual + mlp(x)
        return self._final_norm(y)[0] if self.config.norm_output else y

    @torch.inference_mode()
    def extend(
        self, token_ids: torch.Tensor, features: torch.Tensor, tiles: Tiles | None, spans: list[Span], pool: Pool
    ) -> torch.Tensor:
        """Read target features [N, sum H] of `tiles` and `spans`; each row's last output state [R, H], tiles' first.

        Of other tokens only keys and values are of use: the last layer attends, and computes its MLP, for these alone.
        `features` are what `Target.forward` captured, or its final hidden states where the head listens to no layers.
        Another call may overwrite the result.
        """

        def begin(layout: Layout, token_ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return self._begin(token_ids, self._fuse(features), layout, pool)

        def end(layout: Layout, q: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return (self._end(q, y, layout, pool),)

        rows = [] if tiles is None else [np.stack([tiles.slot_R, tiles.prefix_R, tiles.count_R])]
        rows += [np.array([[span.slot], [span.prefix], [span.stop - span.start]]) for span in spans]
        slot_R, prefix_R, count_R = np.concatenate(rows, 1)
        ends = Tiles.chains(slot_R, prefix_R + count_R - 1, np.ones_like(count_R))
        last_R = upload(count_R.cumsum() - 1, self.device)
        layout = Layout.of(tiles, spans, self.heads, attends=len(self._layers) > 1)
        q, y = self._graphs.run("read", begin, pool, layout, token_ids, features)
        out: torch.Tensor
        [out] = self._graphs.run("extend", end, pool, Layout.of(ends, [], self.heads), q[last_R], y[last_R])
        return out

    def level(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, layout: Layout, pool: Pool, children: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output states of the nodes of a tree level [N, H], and their `top`; another call may overwrite them.

        `hidden` [N, H] are the output states of their parents.
        """

        def run(layout: Layout, token_ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            out = self._end(*self._begin(token_ids, hidden, layout, pool), layout, pool)
            return out, *self.top(out, children)

        out, logp, tokens = self._graphs.run(f"level {children}", run, pool, layout, token_ids, hidden)
        return out, logp, tokens

    @torch.inference_mode()
    def top(self, state: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `k` likeliest next tokens of output states [N, H]: log-probabilities float32 and target ids, [N, k]."""
        if not self.config.norm_output:
            state = self._final_norm(state)[0]
        logits = self._lm_head(state)
        ids = logits.topk(k, -1).indices
        # Never above 0: rounding must not lift a child above its parent, the tree's order relies on it.
        logp = torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, ids)
        return logp, ids if self._target_ids is None else self._target_ids[ids]
