"""EAGLE-3 head checkpoints of both families, read into one form.

SafeAILab, SGLang and SpecForge publish a flat Llama config and tensors under `midlayer.`; speculators nests the layer's
config and names tensors `layers.0.`. They differ in defaults that each silently halve acceptance, so every choice that
the file leaves open is made here, follows vLLM's rule, and is logged. Refuses pickles that hold more than tensors.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from batchgen.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

log = logging.getLogger("batchgen.engines.torch")

_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


@dataclasses.dataclass(frozen=True, slots=True)
class HeadConfig:
    """What a head computes, whatever family its file is of.

    `aux_layers` are "after L decoder layers", ascending; empty means the target's last hidden state after its final
    norm and no `fc` (`use_aux_hidden_state: false`). `layer` is the draft layer's own config, rope included.
    """

    layer: LlamaConfig
    draft_vocab_size: int
    target_hidden_size: int
    aux_layers: tuple[int, ...]
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    window: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """A head's config and tensors by speculators' names; `target_ids` maps draft ids to target ids, int64 [DV]."""

    config: HeadConfig
    tensors: dict[str, torch.Tensor]
    target_ids: torch.Tensor | None


def load_head(
    path: Path, *, num_target_layers: int, target_hidden_size: int, vocab_size: int, aux_layers: Sequence[int] | None
) -> Head:
    """Read the head in folder `path` and check that it fits a target of the given shape.

    `aux_layers` overrides what the checkpoint says about the layers it listens to.

    Raises:
        ModelError: not an EAGLE-3 head, or head and target differ; the message names both sides.
    """
    raw = _config(path)
    config = _head_config(raw, path, num_target_layers, target_hidden_size, aux_layers)
    tensors = {_speculators_name(name): tensor for name, tensor in _tensors(path).items()}
    offsets = tensors.pop("d2t", None)
    tensors.pop("t2d", None)
    if config.draft_vocab_size == vocab_size:
        offsets = None
    head = Head(config, tensors, None if offsets is None else torch.arange(len(offsets)) + offsets.to(torch.int64))
    _check_fit(head, path, num_target_layers, target_hidden_size, vocab_size)
    return head


def heard_layers(path: Path, num_target_layers: int) -> tuple[int, ...]:
    """After how many layers of its target the head in `path` listens, by its config alone.

    Raises:
        ModelError: as `load_head`.
    """
    raw = _config(path)
    return _aux_layers(raw, raw.get("eagle_config") or {}, path, num_target_layers, None)


def for_vllm(path: Path, folder: Path, **target: Any) -> Path:
    """The head in `path` as vLLM must be told of it: `folder` with the same files and a complete config.

    vLLM reads nested layer ids without their plus 1, or not at all, and has defaults of its own. `target` as in
    `load_head`.

    Raises:
        ModelError: as `load_head`.
    """
    config, raw = load_head(path, **target).config, _config(path)
    full = raw | {"norm_before_residual": config.norm_before_residual}
    if config.aux_layers:
        full[_LAYER_IDS] = list(config.aux_layers)
        full["num_aux_hidden_states"] = len(config.aux_layers)
        full["eagle_config"] = {k: v for k, v in (raw.get("eagle_config") or {}).items() if k != _LAYER_IDS}
    folder.mkdir(exist_ok=True)
    for file in path.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(full, indent=2))
    return folder


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        raise ModelError(f"{path}: no config.json; expected an EAGLE-3 head in SafeAILab/SGLang or speculators format")
    config: dict[str, Any] = json.loads(file.read_text())
    return config


def _speculators_name(name: str) -> str:
    return name.removeprefix("model.").replace("midlayer.", "layers.0.", 1)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    pickled = sorted(path.glob("pytorch_model*.bin"))
    if pickled:
        loaded = [torch.load(file, map_location="cpu", weights_only=True) for file in pickled]
        return {name: tensor for part in loaded for name, tensor in part.items()}
    raise ModelError(f"{path}: no *.safetensors and no pytorch_model.bin; expected the weights of an EAGLE-3 head")


def _head_config(
    raw: dict[str, Any], path: Path, num_target_layers: int, target_hidden_size: int, override: Sequence[int] | None
) -> HeadConfig:
    eagle = raw.get("eagle_config") or {}
    if "speculators_model_type" in raw:
        if raw["speculators_model_type"] != "eagle3":
            kind = raw["speculators_model_type"]
            raise ModelError(f"{path}: speculators_model_type is {kind!r}; this engine drafts with eagle3 heads")
        layer, default_norm = dict(raw["transformer_layer_config"]), True
    elif any("eagle3" in a.lower() for a in raw.get("architectures") or []):
        layer, default_norm = dict(raw), False
    else:
        found = ", ".join(raw.get("architectures") or ["nothing"])
        raise ModelError(f"{path}: architectures is {found}; expected an EAGLE-3 head such as LlamaForCausalLMEagle3")
    if layer.get("model_type", "llama") not in ("llama", "qwen3"):
        raise ModelError(f"{path}: draft layers of type {layer['model_type']!r}; expected llama or qwen3")
    if "norm_before_residual" not in raw:
        log.warning("%s: norm_before_residual is not stated; using %s, as vLLM does", path, default_norm)
    for name in ("architectures", "model_type", "eagle_config", "dtype", "torch_dtype", "auto_map"):
        layer.pop(name, None)
    window = layer.get("sliding_window") if layer.get("use_sliding_window", True) else None
    sliding = "sliding_attention" in (layer.pop("layer_types", None) or [])
    config = LlamaConfig(**layer)
    return HeadConfig(
        layer=config,
        draft_vocab_size=int(raw.get("draft_vocab_size") or config.vocab_size),
        target_hidden_size=int(raw.get("target_hidden_size") or config.hidden_size),
        aux_layers=_aux_layers(raw, eagle, path, num_target_layers, override),
        norm_before_residual=bool(raw.get("norm_before_residual", default_norm)),
        norm_before_fc=bool(raw.get("norm_before_fc", False)),
        fc_norm=bool(raw.get("fc_norm", False)),
        norm_output=bool(raw.get("norm_output", False)),
        window=window if sliding else None,
    )


def _aux_layers(
    raw: dict[str, Any], eagle: dict[str, Any], path: Path, num_layers: int, override: Sequence[int] | None
) -> tuple[int, ...]:
    if override is not None:
        layers, source = list(override), "the job file"
    elif eagle.get("use_aux_hidden_state", True) is False:
        layers, source = [], "use_aux_hidden_state: false"
    elif raw.get(_LAYER_IDS):
        layers, source = list(raw[_LAYER_IDS]), f"{_LAYER_IDS} (after so many layers)"
    elif eagle.get(_LAYER_IDS):
        # SGLang, SpecForge and ModelOpt count layer outputs from 0: layer id l is the state after l + 1 layers.
        layers, source = (
            [layer + 1 for layer in eagle[_LAYER_IDS]],
            f"eagle_config.{_LAYER_IDS} (0-based layer outputs, plus 1)",
        )
    else:
        layers, source = [2, num_layers // 2, num_layers - 3], "the EAGLE-3 default (2, n//2, n-3)"
    log.info("%s: features after layers %s, from %s", path, sorted(set(layers)), source)
    return tuple(sorted(set(layers)))


def _check_fit(head: Head, path: Path, num_layers: int, hidden_size: int, vocab_size: int) -> None:
    problems = [
        *_misfits(head, num_layers, hidden_size, vocab_size),
        *_vocabulary_misfits(head, hidden_size, vocab_size),
        *_missing(head),
    ]
    if problems:
        raise ModelError(f"{path}: the head does not fit the target: {'; '.join(problems)}")


def _misfits(head: Head, num_layers: int, hidden_size: int, vocab_size: int) -> Iterator[str]:
    config, tensors = head.config, head.tensors
    if config.target_hidden_size != hidden_size:
        yield f"it reads hidden states of size {config.target_hidden_size}, the target has {hidden_size}"
    if config.aux_layers and max(config.aux_layers) > num_layers:
        yield f"it reads layers {config.aux_layers}, the target has {num_layers}"
    if config.layer.vocab_size != vocab_size:
        yield f"its vocabulary has {config.layer.vocab_size} tokens, the target's {vocab_size}"
    expected = len(config.aux_layers) * config.target_hidden_size
    if config.aux_layers and "fc.weight" in tensors and tensors["fc.weight"].shape[1] != expected:
        found = tensors["fc.weight"].shape[1]
        yield f"fc.weight takes {found} features, {len(config.aux_layers)} layers give {expected}"
    if "embed_tokens.weight" not in tensors and config.layer.hidden_size != hidden_size:
        width = config.layer.hidden_size
        yield f"it brings no embedding and is {width} wide, the target's embedding is {hidden_size}"


def _vocabulary_misfits(head: Head, hidden_size: int, vocab_size: int) -> Iterator[str]:
    ids, num_drafts = head.target_ids, head.config.draft_vocab_size
    if "lm_head.weight" not in head.tensors and (ids is not None or head.config.layer.hidden_size != hidden_size):
        yield "it brings no lm_head, and the target's gives other tokens than its drafts"
    if ids is None:
        if num_drafts != vocab_size:
            yield f"it has {num_drafts} draft tokens but no d2t, the target has {vocab_size} tokens"
    elif len(ids) != num_drafts or ids.min() < 0 or ids.max() >= vocab_size or len(set(ids.tolist())) < len(ids):
        yield f"d2t does not map its {num_drafts} draft tokens to distinct target tokens"


def _missing(head: Head) -> Iterator[str]:
    config = head.config
    needed = ["norm.weight", "layers.0.hidden_norm.weight"]
    for layer in range(config.layer.num_hidden_layers):
        needed += [f"layers.{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
        needed += [f"layers.{layer}.self_attn.{name}_proj.weight" for name in "qkvo"]
        needed += [f"layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    if config.aux_layers:
        needed.append("fc.weight")
    if config.norm_before_fc:
        needed.append("input_norm.weight")
    if config.fc_norm:
        needed += [f"fc_norm.{i}.weight" for i in range(len(config.aux_layers))]
    missing = [name for name in needed if name not in head.tensors]
    if missing:
        yield f"tensors are missing: {', '.join(missing)}"
