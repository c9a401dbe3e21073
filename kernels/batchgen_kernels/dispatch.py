"""Which of an operation's two forms runs: its Triton kernel on CUDA tensors, its plain-torch reference elsewhere.

Every operation is a public function in `<name>.py`, whose body is a plain-torch reference, and a kernel in
`triton_<name>.py`, imported at the first call that wants it: without triton the package still imports and runs on CPUs.
float64 always takes the reference, which is then the yardstick for both.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")

# Send CPU tensors to the kernels too, which works under Triton's interpreter only. A module flag rather than a look at
# the variable in every call: tests/kernels switch it on for themselves and leave the rest of their process alone.
interpreted = os.environ.get("TRITON_INTERPRET") == "1"

if interpreted:
    from batchgen_kernels.interpreter import repair

    repair()


def on_triton(x: torch.Tensor) -> bool:
    """Whether an operation on `x`, and on what lies beside it, is the Triton kernel's."""
    return (x.is_cuda or interpreted) and x.dtype is not torch.float64


def with_kernel(module: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a reference the operation: where its first argument is `on_triton`, `module`'s function of its name runs.

    The reference stays at hand as the operation's `__wrapped__`.
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(reference)
        def operation(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0]
            assert isinstance(first, torch.Tensor)
            if not on_triton(first):
                return reference(*args, **kwargs)
            launch: Callable[P, R] = getattr(importlib.import_module(f"batchgen_kernels.{module}"), reference.__name__)
            return launch(*args, **kwargs)

        return operation

    return decorate


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype that references compute in: float32, or float64 where it is that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
