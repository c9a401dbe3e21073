"""Engines: requests in, completions out. torch, vllm and transformers models are imported on this floor only.

`build` is the one place that knows which kinds there are.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from batchgen.engines.rehearsal import RehearsalEngine, Script
from batchgen.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.generate import Engine
    from batchgen.models import Model
    from batchgen.spec import Spec

# What `speculation.tree: auto` means until the width is tuned per step: of the fixed chains, the one that lost least
# where it lost (examples/bench/results/speculation-cpu-bfloat16.json: 1.19x plain at 1 row, 1.0x at 16, 0.92x at 64).
AUTO_DEPTH = 2


def device(spec: Spec) -> str:
    """`cpu` or `cuda`, as the job file says or the machine has."""
    if spec.engine.device != "auto":
        return spec.engine.device
    if not Path("/proc/driver/nvidia").exists():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype(spec: Spec) -> str:
    """The dtype that `model.dtype` stands for on this machine: `auto` is bfloat16 where the hardware computes it.

    A CPU without bfloat16 instructions gains nothing from it (`engines/torch/wide.py`).
    """
    if spec.engine.kind == "rehearsal":
        return "none"
    if spec.model.dtype != "auto":
        return spec.model.dtype
    if device(spec) == "cuda":
        return "bfloat16"
    return "bfloat16" if native_bfloat16() else "float32"


@functools.cache
def native_bfloat16() -> bool:
    """Whether this machine's CPU has bfloat16 instructions."""
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def build(spec: Spec, target: Model | None, draft: Model | None, decode: Callable[[Sequence[int]], str]) -> Engine:
    """The engine that the job file asks for, weights loaded.

    Raises:
        ModelError: the model cannot run on this engine, or head and target do not fit.
    """
    if spec.engine.kind == "rehearsal":
        return RehearsalEngine(batch_size=spec.batch_size, script=Script.of(spec.engine.options))
    assert spec.engine.kind == "torch", "validation refuses every other kind"
    assert target is not None
    import os

    import torch

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.engine import TorchEngine
    from batchgen.engines.torch.target import Target

    on = torch.device(device(spec))
    if on.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("engine.device is cuda, but torch sees no CUDA device; say cpu or auto")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Target(target.path, getattr(torch, dtype(spec)), on)
    shape = tree_shape(spec)
    head = Draft(draft.path, model, spec.model.aux_layers) if draft is not None and shape is not None else None
    return TorchEngine(model, head, decode=decode, batch_size=spec.batch_size, tree=shape if head else None)


def tree_shape(spec: Spec) -> Shape | None:
    """The fixed tree that the job drafts with, None for plain decoding."""
    from batchgen.engines.torch.forest import Shape

    tree = spec.speculation.tree
    if spec.model.draft is None or tree == "off":
        return None
    if tree == "auto":
        return Shape(AUTO_DEPTH, 1, AUTO_DEPTH)
    return Shape(tree.depth, tree.width, tree.nodes)


if TYPE_CHECKING:
    from batchgen.engines.torch.forest import Shape
