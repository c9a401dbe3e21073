"""bfloat16 matrix products on CPUs that have no instructions for them.

torch falls back to scalar code there, five times slower than float32. A product of bfloat16 numbers accumulated in
float32 and rounded once is the same thing, so such CPUs keep a float32 copy of each weight and use it for all but the
thinnest products, which are bound by reading the weight and faster in two bytes a number.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from batchgen.engines import native_bfloat16

# Rows up to which reading half the bytes wins (measured on an AVX2 machine: 4x at 1 row, break-even at about 5).
THIN_ROWS = 4


class Weight:
    """A weight matrix [out, in] with its optional bias; call it with activations [..., in] of the same dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self._wide: torch.Tensor | None = None
        if weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and not native_bfloat16():
            self._wide = weight.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product [..., out], in the dtype of `x`."""
        if self._wide is None or x.numel() <= THIN_ROWS * x.shape[-1]:
            return linear(x, self._weight, self._bias)
        y = linear(x.float(), self._wide, None if self._bias is None else self._bias.float())
        return y.to(x.dtype)


def widen(model: torch.nn.Module) -> None:
    """Let every linear layer of `model` compute through `Weight`, in place."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:  # a subclass has weights of its own kind
            module.forward = Weight(module.weight.detach(), module.bias).__call__  # type: ignore[method-assign, assignment]
