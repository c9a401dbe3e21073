"""The EAGLE-3 head: one decoder layer over target features, feeding on its own output.

Math and conventions as in Li et al., "EAGLE-3" (arXiv 2503.01840) and the SafeAILab reference (eagle/model/cnets.py):
slot i pairs the target's feature at position i with the embedding of token i + 1, at rotary position i. After each
verification the slots of accepted tokens are rewritten from true target features (`extend`); what the tree put there is
thrown away. Skipping that rewrite costs 8 to 15 % of acceptance (vLLM issue 14649).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from batchgen.engines.torch.kvcache import Layout, Pool, Tile
from batchgen.engines.torch.weights import load_head
from batchgen.engines.torch.wide import Weight
from batchgen_kernels.tree_attention import Span, tree_attention

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from batchgen.engines.torch.target import Target


class Draft:
    """A draft head bound to its target, sharing the target's embedding and lm_head where it brings none."""

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
        self._w = {name: tensor.to(self.device, self.dtype) for name, tensor in head.tensors.items()}
        own = self._w.pop("embed_tokens.weight", None)
        self.embedding = target.embedding if own is None or torch.equal(own, target.embedding) else own
        matrices = {name for name, tensor in self._w.items() if tensor.dim() == 2}
        self._linear = {
            name.removesuffix(".weight"): Weight(self._w[name], self._w.get(name.removesuffix("weight") + "bias"))
            for name in matrices
        }
        self._linear.setdefault("lm_head", Weight(target.lm_head.weight.detach()))
        self._target_ids = None if head.target_ids is None else head.target_ids.to(self.device)
        layer = self.config.layer
        self._heads = layer.num_attention_heads
        self._kv_heads = layer.num_key_value_heads or self._heads
        self._head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // self._heads
        self._rotary = LlamaRotaryEmbedding(layer).to(self.device)
        target.capture(self.config.aux_layers)

    def pool(self) -> Pool:
        """An empty KV pool for the head's layers."""
        layers = self.config.layer.num_hidden_layers
        return Pool(layers, self._kv_heads, self._head_dim, self.dtype, self.device)

    def layout(self, tiles: list[Tile], spans: list[Span]) -> Layout:
        """Lay out a pass for this head."""
        group, window = self._heads // self._kv_heads, self.config.window
        return Layout.of(tiles, spans, group=group, dtype=self.dtype, device=self.device, window=window)

    @torch.no_grad()
    def fuse(self, final: torch.Tensor, captured: torch.Tensor | None) -> torch.Tensor:
        """The head's input features [N, H_draft] from what `Target.forward` returned."""
        if captured is None:
            return final
        if self.config.norm_before_fc:
            captured = self._norm(captured, "input_norm.weight")
        if self.config.fc_norm:
            parts = captured.chunk(len(self.config.aux_layers), -1)
            captured = torch.cat([self._norm(p, f"fc_norm.{i}.weight") for i, p in enumerate(parts)], -1)
        return self._linear["fc"](captured)

    @torch.no_grad()
    def forward(self, token_ids: torch.Tensor, hidden: torch.Tensor, layout: Layout, pool: Pool) -> torch.Tensor:
        """Run the head's layers over packed slots; writes their keys and values, returns the output state [N, H].

        `hidden` is a fused feature where the target has seen the slot, and the parent's output state in a tree. The
        result feeds both `logits` and the next tree level.
        """
        embedded = self._norm(self.embedding[token_ids], "layers.0.input_layernorm.weight")
        normed = self._norm(hidden, "layers.0.hidden_norm.weight")
        residual = normed if self.config.norm_before_residual else hidden
        x, y = torch.cat([embedded, normed], -1), residual
        for layer in range(self.config.layer.num_hidden_layers):
            if layer > 0:
                x = self._norm(y, f"layers.{layer}.input_layernorm.weight")
            y = y + self._attention(layer, x, layout, pool)
            z = self._norm(y, f"layers.{layer}.post_attention_layernorm.weight")
            y = y + self._mlp(layer, z)
        return self._norm(y, "norm.weight") if self.config.norm_output else y

    @torch.no_grad()
    def top(self, state: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `k` likeliest next tokens of output states [N, H]: log-probabilities float32 and target ids, [N, k]."""
        if not self.config.norm_output:
            state = self._norm(state, "norm.weight")
        logp = torch.log_softmax(self._linear["lm_head"](state).float(), -1)
        # Rounding must not lift a child above its parent: the tree's order relies on it.
        best, ids = logp.clamp(max=0.0).topk(k, -1)
        return best, ids if self._target_ids is None else self._target_ids[ids]

    def _attention(self, layer: int, x: torch.Tensor, layout: Layout, pool: Pool) -> torch.Tensor:
        prefix = f"layers.{layer}.self_attn"
        num_tokens = x.shape[0]
        q = self._linear[f"{prefix}.q_proj"](x).view(num_tokens, self._heads, self._head_dim)
        k = self._linear[f"{prefix}.k_proj"](x).view(num_tokens, self._kv_heads, self._head_dim)
        v = self._linear[f"{prefix}.v_proj"](x).view(num_tokens, self._kv_heads, self._head_dim)
        if f"{prefix}.q_norm.weight" in self._w:
            q, k = self._norm(q, f"{prefix}.q_norm.weight"), self._norm(k, f"{prefix}.k_norm.weight")
        cos, sin = self._rotary(x[None], layout.position_N[None])
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
        pool.write(layer, k[0], v, layout)
        scale = self._head_dim**-0.5
        out = tree_attention(q[0], pool.k[layer], pool.v[layer], layout.tiles, layout.spans, scale)
        return self._linear[f"{prefix}.o_proj"](out.reshape(num_tokens, -1))

    def _mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        prefix = f"layers.{layer}.mlp"
        gate = silu(self._linear[f"{prefix}.gate_proj"](x)) * self._linear[f"{prefix}.up_proj"](x)
        return self._linear[f"{prefix}.down_proj"](gate)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.config.layer.rms_norm_eps)
        return self._w[name] * x32.to(x.dtype)
