"""Decoder layers of the usual make, run on merged weights: one product for q, k and v, one for gate and up.

Llama, Mistral, Qwen2 and Qwen3 run here; `Target` compares the logits with the model's own and keeps to transformers'
forward pass where they differ or where a part is of another make.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from batchgen.engines.torch.linear import Weight
from batchgen_kernels.norm import rms_norm
from batchgen_kernels.rope import rope_and_store, signed
from batchgen_kernels.swiglu import swiglu
from batchgen_kernels.tree_attention import tree_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.engines.torch.kvcache import Pool
    from batchgen.engines.torch.layout import Heads, Layout

_LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def angles(rotary: Any, x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and `signed` sines [N, D] of a pass's positions, from a transformers rotary embedding, as wide as `x`."""
    cos, sin = rotary(x[None], layout.position_N[None])
    return cos[0], signed(sin[0])


class Norm:
    """An RMSNorm's weight [H] and epsilon."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed sum of `x` and `residual`, and the sum."""
        return rms_norm(x, self._weight, self._eps, residual)


class Attention:
    """Self-attention over the pool, with merged q, k and v."""

    def __init__(self, qkv: Weight, out: Weight, norms: tuple[Norm, Norm] | None, heads: Heads) -> None:
        self._qkv, self._out, self._norms, self._heads = qkv, out, norms, heads

    def __call__(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], layout: Layout, pool: Pool, layer: int
    ) -> torch.Tensor:
        """Attention output [N, H] of inputs [N, H_in], whose keys and values are written to the pool first."""
        return self.read(self.store(x, rotary, layout, pool, layer), layout, pool, layer)

    def store(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], layout: Layout, pool: Pool, layer: int
    ) -> torch.Tensor:
        """Write keys and values of inputs [N, H_in] to the pool; return their rotated queries [N, heads, D]."""
        qkv = self._qkv(x)
        k_pool, v_pool = pool.k[layer], pool.v[layer]
        head_dim = k_pool.shape[-1]
        if self._norms is not None:
            nums = [self._heads.num_heads, self._heads.num_kv_heads, self._heads.num_kv_heads]
            q, k, v = torch.split(qkv.view(len(x), -1, head_dim), nums, 1)
            qkv = torch.cat([self._norms[0](q)[0], self._norms[1](k)[0], v], 1).view(len(x), -1)
        at = (layout.slot_N, layout.pool_position_N)
        return rope_and_store(qkv, *rotary, k_pool, v_pool, *at, self._heads.num_heads)

    def read(self, q: torch.Tensor, layout: Layout, pool: Pool, layer: int) -> torch.Tensor:
        """Attention output [N, H] of rotated queries [N, heads, D]."""
        out = tree_attention(q, pool.k[layer], pool.v[layer], layout.tiles, layout.spans, q.shape[-1] ** -0.5)
        return self._out(out.view(len(q), -1))


class Mlp:
    """A SwiGLU block with merged gate and up."""

    def __init__(self, gate_up: Weight, down: Weight) -> None:
        self._gate_up, self._down = gate_up, down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Output [N, H] of inputs [N, H]."""
        return self._down(swiglu(self._gate_up(x)))


class Decoder:
    """A transformers decoder's layers over a pool.

    Raises:
        TypeError: the decoder has parts of another make; the message names the first one.
    """

    # Others have the same parts and join them differently: SmolLM3 rotates in some layers only.
    KINDS = frozenset({"llama", "mistral", "qwen2", "qwen3"})

    def __init__(self, model: Any, heads: Heads, *, two_bytes: bool) -> None:
        if model.config.model_type not in self.KINDS:
            raise TypeError(f"a decoder of type {model.config.model_type}")
        self._embedding = model.embed_tokens.weight.detach()
        self._rotary = model.rotary_emb
        self._norm = _norm(model.norm)
        self._layers = []
        for layer in model.layers:
            _expect(layer, _LAYER_PARTS)
            attention, mlp = layer.self_attn, layer.mlp
            has_norms = _expect(attention, _ATTENTION_PARTS, {"q_norm", "k_norm"})
            _expect(mlp, _MLP_PARTS)
            if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
                raise TypeError(f"activation {type(mlp.act_fn).__name__}")
            qkv = _merged(attention.q_proj, attention.k_proj, attention.v_proj, two_bytes=two_bytes)
            out = Weight(*_parts(attention.o_proj), two_bytes=two_bytes)
            norms = (_norm(attention.q_norm), _norm(attention.k_norm)) if has_norms else None
            gate_up = _merged(mlp.gate_proj, mlp.up_proj, two_bytes=two_bytes)
            self._layers.append(
                (
                    _norm(layer.input_layernorm),
                    Attention(qkv, out, norms, heads),
                    _norm(layer.post_attention_layernorm),
                    Mlp(gate_up, Weight(*_parts(mlp.down_proj), two_bytes=two_bytes)),
                )
            )

    def __call__(
        self, token_ids: torch.Tensor, layout: Layout, pool: Pool, capture: Sequence[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Final hidden states [N, H] after the last norm, and the residual stream after each layer of `capture`."""
        x = self._embedding[token_ids]
        rotary = angles(self._rotary, x, layout)
        captured = {0: x} if 0 in capture else {}
        normed, residual = self._layers[0][0](x)
        for i, (_, attention, after, mlp) in enumerate(self._layers, 1):
            normed, residual = after(attention(normed, rotary, layout, pool, i - 1), residual)
            following = self._layers[i][0] if i < len(self._layers) else self._norm
            normed, residual = following(mlp(normed), residual)
            if i in capture:
                captured[i] = residual
        return normed, [captured[i] for i in sorted(captured)]


def _merged(*modules: Any, two_bytes: bool) -> Weight:
    """One weight that stacks the outputs of several; the modules' own weights become views of it."""
    parts = [_parts(module) for module in modules]
    whole = torch.cat([weight for weight, _ in parts])
    for module, view in zip(modules, torch.split(whole, [len(weight) for weight, _ in parts]), strict=True):
        module.weight.data = view
    biases = [bias for _, bias in parts if bias is not None]
    if biases and len(biases) < len(parts):
        raise TypeError("a bias on some of the merged products only")
    return Weight(whole, torch.cat(biases) if biases else None, two_bytes=two_bytes)


def _parts(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if type(module) is not torch.nn.Linear:
        raise TypeError(f"a linear layer of type {type(module).__name__}")
    return module.weight.data, None if module.bias is None else module.bias.data


def _norm(module: Any) -> Norm:
    if not hasattr(module, "variance_epsilon"):
        raise TypeError(f"a norm of type {type(module).__name__}")
    return Norm(module.weight.detach(), module.variance_epsilon)


def _expect(module: Any, names: set[str], both_or_none: frozenset[str] | set[str] = frozenset()) -> bool:
    """Whether `module` has the optional parts as well.

    Raises:
        TypeError: it has parts beyond these, or lacks some.
    """
    found = {name for name, _ in module.named_children()}
    if found not in (names, names | both_or_none):
        raise TypeError(f"{type(module).__name__} made of {', '.join(sorted(found))}")
    return found != names
