"""Engines: requests in, completions out. torch, vllm and transformers models are imported on this floor only.

`build` is the one place that knows which kinds there are.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen import provenance
from batchgen.engines.rehearsal import RehearsalEngine, Script
from batchgen.errors import ModelError, SpecError
from batchgen.speculation.costs import load_costs, save_costs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.target import Target
    from batchgen.generate import Capture, Engine
    from batchgen.models import Model
    from batchgen.spec import Spec
    from batchgen.speculation.costs import Costs

log = logging.getLogger("batchgen.engines")


def device(spec: Spec) -> str:
    """`cpu` or `cuda`, as the job file says or the machine has."""
    if spec.engine.device != "auto":
        return spec.engine.device
    if spec.workers.gpus:  # of other machines than this one
        return "cuda"
    if not Path("/proc/driver/nvidia").exists():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype(spec: Spec) -> str:
    """The dtype that `model.dtype` stands for on this machine: `auto` is bfloat16 where that is fast, else float32."""
    if spec.engine.kind == "rehearsal":
        return "none"
    if spec.model.dtype != "auto":
        return spec.model.dtype
    if spec.engine.kind == "vllm":
        # On a GPU vLLM takes the checkpoint's own; on CPUs without such instructions its bfloat16 crawls.
        return "auto" if device(spec) == "cuda" else "bfloat16" if native_bfloat16() else "float32"
    if device(spec) == "cuda":
        return "bfloat16"
    # FBGEMM's two-byte weights need these (`engines/torch/linear.py`).
    return "bfloat16" if tiled_bfloat16() or {"avx2", "f16c", "fma"} <= _cpu_flags() else "float32"


def native_bfloat16() -> bool:
    """Whether this machine's CPU has bfloat16 instructions of any kind."""
    return "avx512_bf16" in _cpu_flags() or tiled_bfloat16()


def tiled_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware (AMX)."""
    return "amx_bf16" in _cpu_flags()


@functools.cache
def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _instructions() -> str:
    """A name for what this machine's CPU can do: the same model name may come with other instructions."""
    return hashlib.sha256(" ".join(sorted(_cpu_flags())).encode()).hexdigest()[:8]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _threads() -> int:
    # Ray tells its workers by this variable how many cores are theirs.
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or _cores()


def _share(spec: Spec) -> float:
    """A CPU worker's share of its machine's memory: the others see nothing yet of what this one will take."""
    return min(1.0, _threads() / _cores()) if spec.on_ray and device(spec) == "cpu" else 1.0


def build(
    spec: Spec, target: Model | None, draft: Model | None, decode: Callable[[Sequence[int]], str], costs: Path
) -> Engine:
    """The engine that the job file asks for, weights loaded; what passes cost is looked up in `costs`, or measured.

    Raises:
        ModelError: the model cannot run on this engine, or head and target do not fit.
    """
    if spec.engine.kind == "rehearsal":
        return RehearsalEngine(batch_size=spec.batch_size, script=Script.of(spec.engine.options))
    assert target is not None
    if spec.engine.kind == "vllm":
        return _vllm(spec, target, draft, decode, costs)
    import torch

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.engine import TorchEngine
    from batchgen.engines.torch.forest import Shape
    from batchgen.engines.torch.kvcache import budget
    from batchgen.engines.torch.width import AutoTree

    model = _target(spec, target)
    tree = spec.speculation.tree
    head: Draft | None = None
    width: Shape | AutoTree | None = None
    if draft is not None and tree != "off":
        head = Draft(draft.path, model, spec.model.aux_layers)
        if tree == "auto":
            facts = (target.identity, draft.identity, dtype(spec), str(spec.batch_size), str(torch.get_num_threads()))
            key = "|".join((provenance.machine(device(spec)), _instructions(), *facts, *provenance.versions().values()))
            passes = _costs(costs, key, model, head, spec.batch_size)
            on_cpu, lookup = model.device.type == "cpu", spec.speculation.lookup
            width = AutoTree(passes, model.pass_sizes, lookup=lookup, stops_early=on_cpu)
        else:
            width = Shape(tree.depth, tree.width, tree.nodes)
    memory_bytes = budget(model.device, _share(spec))
    return TorchEngine(model, head, decode=decode, batch_size=spec.batch_size, width=width, memory_bytes=memory_bytes)


def _vllm(
    spec: Spec, target: Model, draft: Model | None, decode: Callable[[Sequence[int]], str], folder: Path
) -> Engine:
    from batchgen.engines.torch.target import eos_token_ids
    from batchgen.engines.torch.weights import for_vllm
    from batchgen.engines.vllm import VllmEngine
    from batchgen.engines.vllm_process import cpu_memory_utilization, speculative_config

    options, tree = dict(spec.engine.options), spec.speculation.tree
    if spec.on_ray and device(spec) == "cuda":
        # Inside an actor vLLM would start actors of its own, whose GPUs this one holds already.
        options.setdefault("distributed_executor_backend", "mp")
        if (share := spec.workers.gpus or 1) < 1:
            options.setdefault("gpu_memory_utilization", round(0.9 * share, 3))
    elif spec.on_ray:
        options.setdefault("gpu_memory_utilization", cpu_memory_utilization(_share(spec)))
    sampled = spec.sampling.temperature > 0 or "temperature" in spec.input.sampling
    if sampled and tree != "off" and (draft is not None or speculative_config(options)):
        if device(spec) == "cpu":
            raise ModelError(
                "sampling.temperature: vLLM 0.32 on a CPU rejects nearly every draft of a sampled row and then draws a "
                "less likely token than it should; use speculation.tree: off, temperature 0, or engine.kind: torch"
            )
        log.warning(
            "sampling.seed: vLLM keeps to no row's seed while it drafts; sampled tokens will differ from run to run. "
            "For the same tokens again use speculation.tree: off, or engine.kind: torch"
        )
    config = _config(target)
    facts = (
        target.identity,
        draft.identity if draft else "none",
        dtype(spec),
        json.dumps(spec.engine.options, sort_keys=True),
    )
    key = "|".join((provenance.machine(device(spec)), *facts, *provenance.versions().values()))
    head = None if draft is None or tree == "off" else draft.path
    if head is not None and speculative_config(options).get("method", "eagle3") == "eagle3":
        scratch = tempfile.mkdtemp(prefix="batchgen-")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)  # an engine that died loads the head again
        shape = {"num_target_layers": config.num_hidden_layers, "target_hidden_size": config.hidden_size}
        head = for_vllm(head, Path(scratch), **shape, vocab_size=config.vocab_size, aux_layers=spec.model.aux_layers)
    return VllmEngine(
        target.path,
        head,
        decode=decode,
        end_token_ids=eos_token_ids(target.path, config),
        batch_size=spec.batch_size,
        dtype=dtype(spec),
        device=device(spec),
        options=options,
        length=None if tree == "auto" else 0 if tree == "off" else tree.depth,
        seed=spec.sampling.seed,
        lengths=folder / f"lengths-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json",
    )


def _config(target: Model) -> Any:
    """The target's config as transformers reads it.

    Raises:
        ModelError: it does not, for instance because the model brings code of its own.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(target.path, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().partition("\n")[0][:200]
        raise ModelError(
            f"{target.path}: transformers cannot read its config ({why}); no code of a model is run"
        ) from error


def layers(
    target: Model, asked: Sequence[int] | None, draft: Model | None = None, aux_layers: Sequence[int] | None = None
) -> tuple[tuple[int, ...], int]:
    """Which decoder layers to capture, by their count from the embedding on, and the width of a hidden state.

    By default `aux_layers`, else those that the head `draft` listens to, else those that EAGLE-3 heads do
    (SafeAILab/EAGLE, `eagle/model/modeling_llama_kv.py`), and the last.

    Raises:
        SpecError: `asked`, or the default, names layers that the target does not have.
        ModelError: `draft` is no EAGLE-3 head.
    """
    config = _config(target)
    num = int(config.num_hidden_layers)
    if asked is not None:
        found = tuple(sorted(set(asked)))
    else:
        heard: Iterable[int] = {2, num // 2, num - 3} & set(range(num + 1))
        if aux_layers is not None:
            heard = aux_layers
        elif draft is not None:
            from batchgen.engines.torch.weights import heard_layers

            heard = heard_layers(draft.path, num)
        found = tuple(sorted({*heard, num}))
    if not found or found[0] < 0 or found[-1] > num:
        raise SpecError(f"layers: found {', '.join(map(str, found))}; {target.path} has 0 (the embedding) to {num}")
    return found, int(config.hidden_size)


def final_norm(target: Model) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm before the target's head: hidden states [S, H] to what the head multiplies, in their dtype.

    Raises:
        ModelError: the target has another norm than Llama's, or its weights are not where Llama's are.
    """
    import torch
    from safetensors import safe_open

    config, name = _config(target), "model.norm.weight"
    if config.model_type not in {"llama", "mistral", "qwen2", "qwen3"}:
        raise ModelError(f"{target.path}: {config.model_type} may have another norm than Llama's before its head")
    for file in sorted(target.path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  # it is no mapping
                weight_H, eps = tensors.get_tensor(name).float(), config.rms_norm_eps
                return lambda states: torch.rms_norm(states.float(), weight_H.shape, weight_H, eps).to(states.dtype)
    raise ModelError(f"{target.path}: no safetensors file holds {name}")


def capture(spec: Spec, target: Model, at: Sequence[int], out_dtype: str) -> Capture:
    """What reads hidden states after the layers `at` on the job's engine, in `out_dtype`, weights loaded.

    Raises:
        SpecError, ModelError: the engine has no hidden states, or cannot run the model.
    """
    if spec.engine.kind == "rehearsal":
        raise SpecError("engine.kind: rehearsal has no model, and so no hidden states; use torch or vllm")
    import torch

    if spec.engine.kind == "vllm":
        from batchgen.engines.vllm_capture import VllmCapture

        return VllmCapture(
            target.path,
            at,
            dtype=dtype(spec),
            out_dtype=getattr(torch, out_dtype),
            device=device(spec),
            batch_size=spec.batch_size,
            options={name: value for name, value in spec.engine.options.items() if name != "speculative_config"},
        )
    from batchgen.engines.torch.capture import TorchCapture

    return TorchCapture(_target(spec, target), at, getattr(torch, out_dtype))


def _target(spec: Spec, target: Model) -> Target:
    """The torch engine's target, loaded, with every core at its service that is its worker's."""
    import torch

    from batchgen.engines.torch.target import Target

    on = torch.device(device(spec))
    if on.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("engine.device is cuda, but torch sees no CUDA device; say cpu or auto")
    torch.set_num_threads(_threads())
    share = spec.workers.gpus or 1
    if on.type == "cuda" and share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    return Target(target.path, getattr(torch, dtype(spec)), on)


def _costs(folder: Path, key: str, target: Target, draft: Draft, batch_size: int) -> Costs:
    from batchgen.engines.torch.measure import measure

    found = load_costs(folder, key)
    if found is None:
        found, undisturbed = measure(target, draft, batch_size)
        if not undisturbed:
            log.warning("other processes took cores while passes were measured: trees may be chosen worse for a while")
            return found
        with contextlib.suppress(OSError):  # a read-only home costs a measurement, not a job
            save_costs(folder, key, found)
    return found
