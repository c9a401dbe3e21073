"""The target model: a transformers decoder over our own KV pool.

Layers of the usual make run in `decoder.py`, on merged weights. Any other decoder runs unmodified: transformers calls
our attention function with rotated queries, keys and values; ours writes them to the pool and reads prefix and tree
from there. The packed layout travels as a keyword argument of `forward`, so no global state is set.
Auxiliary hidden states are the residual stream *after L layers* (L = 0 is the embedding); the convention is EAGLE-3's
as in vLLM (vllm/model_executor/models/interfaces.py, 0.32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import Cache
from transformers.utils.logging import disable_progress_bar

from batchgen.engines.torch.decoder import Decoder
from batchgen.engines.torch.graphs import Graphs, cuda_graph
from batchgen.engines.torch.kvcache import Pool, out_of_memory
from batchgen.engines.torch.layout import Heads, Layout, Tiles
from batchgen.engines.torch.linear import FEW_NUMBERS, Weight, compute_dtype, use_weights
from batchgen.errors import ModelError
from batchgen_kernels.tree_attention import Span, tree_attention

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_ATTENTION = "batchgen_tree"
_WAY_OUT = "use engine.kind: vllm for this model"
_CANNOT_RUN = (TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError, ValueError)


class _PoolCache(Cache):
    """Satisfies transformers' cache protocol; keys and values go to the pool, and back out untouched."""

    def __init__(self, pool: Pool, layout: Layout) -> None:
        super().__init__(layers=[])
        self._pool, self._layout = pool, layout

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._pool.write(layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), self._layout)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    layout: Layout,
    pool: Pool,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    out = tree_attention(query[0].transpose(0, 1), pool.k[layer], pool.v[layer], layout.tiles, layout.spans, scaling)
    return out[None], None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)


class Target:
    """A causal language model loaded from `path`, ready for packed passes.

    Raises:
        ModelError: this engine cannot run the architecture, or not to the same logits; the message names the way out.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            why = _first_line(error)
            raise ModelError(f"{path}: transformers cannot read its config ({why}); {_WAY_OUT}") from error
        _refuse_unsupported(config, path)
        model = self._load(path, config, dtype, device)
        self.weights_dtype, self.dtype, self.device = dtype, compute_dtype(dtype, device), device
        model.to(device).eval()
        if self.dtype is not dtype:  # only then: a cast takes the rotary frequencies along, which are float32
            model.to(self.dtype)
        self.config = model.config
        self._theirs = model.get_decoder()
        self.lm_head = Weight(*_weight_and_bias(model.get_output_embeddings()), two_bytes=self.two_bytes)
        self.embedding: torch.Tensor = model.get_input_embeddings().weight.detach()
        self.num_layers = int(config.num_hidden_layers)
        num_heads = int(config.num_attention_heads)
        num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
        self._heads = Heads(num_heads, num_kv_heads, self.dtype, device)
        self.max_tokens = int(config.max_position_embeddings)
        self.eos_token_ids = eos_token_ids(path, config)
        self._capture: tuple[int, ...] = ()
        self._captured: dict[int, torch.Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._ours: Decoder | None = None
        self.graphs = Graphs(None)
        self._choose(model, path)

    def _load(self, path: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
        disable_progress_bar()  # type: ignore[no-untyped-call]  # the job shows its own progress
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=_ATTENTION, trust_remote_code=False
        )

    @property
    def two_bytes(self) -> bool:
        """Whether weights, whatever dtype they are in, hold numbers of a two-byte one."""
        return self.weights_dtype.itemsize == 2

    @property
    def pass_sizes(self) -> tuple[int, ...]:
        """Packed counts for passes of decoding rows to choose from, () of any: of these there are captures, or code."""
        if self.device.type == "cpu" and self.dtype is torch.bfloat16:
            return FEW_NUMBERS
        return self.graphs.sizes

    def _choose(self, model: Any, path: Path) -> None:
        """Run on our layers if they give the model's own logits, else on transformers' if those do.

        Architectures that scale or cap their logits, or do not attend through the interface, load without complaint
        and would be sampled wrongly.
        """
        try:
            model.set_attn_implementation("eager")
            with torch.inference_mode():
                own = model(input_ids=self._probe()[None], use_cache=False).logits[0].float()
            model.set_attn_implementation(_ATTENTION)
        except _CANNOT_RUN as error:
            raise self._refused(model, path, _first_line(error)) from error
        try:
            self._ours = Decoder(self._theirs, self._heads, two_bytes=self.two_bytes)
            if self._differs(own) is None:
                self._theirs = None  # its weights live on in ours
                if self.device.type == "cuda":
                    self.graphs = Graphs(cuda_graph)
                return
        except _CANNOT_RUN as error:
            if out_of_memory(error):
                raise
        self._ours = None
        use_weights(self._theirs, two_bytes=self.two_bytes)
        try:
            problem = self._differs(own)
        except _CANNOT_RUN as error:
            raise self._refused(model, path, _first_line(error)) from error
        if problem is not None:
            raise self._refused(model, path, problem)

    def _probe(self) -> torch.Tensor:
        return torch.arange(12, device=self.device) % self.embedding.shape[0]

    def _differs(self, own: torch.Tensor) -> str | None:
        ids, pool = self._probe(), self.pool()
        pool.resize(1, len(ids))
        layouts = [self.layout(None, [span]) for span in (Span(0, 7, 0, 0), Span(0, 5, 0, 7))]
        halves = [self.forward(i, at, pool)[0] for i, at in zip((ids[:7], ids[7:]), layouts, strict=True)]
        off = float((self.logits(torch.cat(halves)).float() - own).norm() / own.norm())
        # Two orders of summation differ by a tenth in bfloat16 after 30 layers, and by 1e-5 in float32.
        return None if off < (0.001 if self.dtype is torch.float32 else 0.3) else f"its logits are off by {off:.1%}"

    def _refused(self, model: Any, path: Path, why: str) -> ModelError:
        return ModelError(f"{path}: the torch engine cannot run {type(model).__name__} ({why}); {_WAY_OUT}")

    def pool(self) -> Pool:
        """An empty KV pool for this model."""
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self._heads.num_heads
        return Pool(self.num_layers, self._heads.num_kv_heads, head_dim, self.dtype, self.device)

    def layout(self, tiles: Tiles | None, spans: list[Span]) -> Layout:
        """Lay out a pass for this model."""
        return Layout.of(tiles, spans, self._heads)

    def capture(self, layers: Sequence[int]) -> None:
        """From now on `forward` also returns the residual stream after exactly these decoder layers."""
        self._capture = tuple(sorted(set(layers)))
        self.graphs.clear()
        if self._theirs is None:
            return
        for hook in self._hooks:
            hook.remove()
        stops = [*self._theirs.layers, self._theirs.norm]
        self._hooks = [stops[n].register_forward_pre_hook(self._hook(n), with_kwargs=True) for n in layers]

    def _hook(self, layer: int) -> Any:
        def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._captured[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        return keep

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, layout: Layout, pool: Pool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Final hidden states after the last norm [N, H] and the captured features side by side [N, sum H] or None."""
        if self._ours is not None:
            hidden, features = self._ours(token_ids, layout, pool, self._capture)
            return hidden, torch.cat(features, -1) if features else None
        out = self._theirs(
            input_ids=token_ids[None],
            position_ids=layout.position_N[None],
            past_key_values=_PoolCache(pool, layout),
            use_cache=True,
            layout=layout,
            pool=pool,
        )
        captured = [self._captured[layer] for layer in sorted(self._captured)]
        self._captured.clear()
        return out.last_hidden_state[0], torch.cat(captured, -1) if captured else None

    def verify(
        self, token_ids: torch.Tensor, layout: Layout, pool: Pool, asked: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What `forward` returns, and the next-token logits of the packed tokens `asked` about, or of all.

        Another call may overwrite them.
        """
        if asked is not None:
            final, captured = self.forward(token_ids, layout, pool)
            return final, captured, self.logits(final[asked])

        def run(layout: Layout, token_ids: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            final, captured = self.forward(token_ids, layout, pool)
            return final, captured, self.logits(final)

        hidden, features, logits = self.graphs.run("verify", run, pool, layout, token_ids)
        return hidden, features, logits

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [N, V] of final hidden states [N, H]."""
        return self.lm_head(hidden)


def _weight_and_bias(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return module.weight.detach(), None if getattr(module, "bias", None) is None else module.bias.detach()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _refuse_unsupported(config: Any, path: Path) -> None:
    kind = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{path}: {kind} is an encoder-decoder; the torch engine runs decoders only; {_WAY_OUT}")
    for name, neutral in (("logits_scaling", 1), ("logit_scale", 1), ("final_logit_softcapping", None)):
        if getattr(config, name, neutral) not in (neutral, None):
            raise ModelError(f"{path}: {kind} changes its logits ({name}), the torch engine does not; {_WAY_OUT}")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{path}: its weights are quantized; the torch engine runs plain ones; {_WAY_OUT}")
    if not hasattr(config, "num_hidden_layers"):
        raise ModelError(f"{path}: {kind} is made of several models; the torch engine runs decoders only; {_WAY_OUT}")
    if not hasattr(config, "num_attention_heads"):
        raise ModelError(f"{path}: {kind} does not attend; the torch engine runs transformers only; {_WAY_OUT}")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ModelError(f"{path}: {kind} uses latent attention (MLA), which the torch engine cannot cache; {_WAY_OUT}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ModelError(
            f"{path}: {kind} rotates by the longest row of a pass ({rope}), so a row's tokens would depend on its "
            f"neighbours; {_WAY_OUT}"
        )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types - {"full_attention"}:
        found = ", ".join(sorted(layer_types - {"full_attention"}))
        raise ModelError(f"{path}: {kind} has {found} layers; the torch engine runs full attention only; {_WAY_OUT}")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ModelError(f"{path}: {kind} attends through a sliding window of {config.sliding_window}; {_WAY_OUT}")


def eos_token_ids(path: Path, config: Any) -> frozenset[int]:
    """The tokens that end a completion, of the model in `path`."""
    source = config
    if (path / "generation_config.json").exists():
        source = GenerationConfig.from_pretrained(path)
    eos = source.eos_token_id
    if eos is None:
        eos = config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
