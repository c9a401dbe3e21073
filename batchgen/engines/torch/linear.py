"""Matrix products with a weight, by the fastest exact way that the machine has.

A CPU without bfloat16 instructions computes bfloat16 products in scalar code. The same product, accumulated in float32
and rounded once, is had from FBGEMM's packed float16 weights (pytorch/FBGEMM, FbgemmFP16.h): a bfloat16 number has
fewer digits than a float16, so packing is exact from 2^-14 to 65504 in magnitude, and off by at most 2^-25 below. It
reads two bytes a weight; on an AVX2 machine most products took a half to an eighth of float32's time with up to 8 rows,
and about two thirds of it with 64.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from batchgen.engines import native_bfloat16

FLOAT16_MAX = 65504.0


class Weight:
    """A weight matrix [out, in] with its optional bias; call it with activations [..., in] of the same dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight: torch.Tensor | None = weight
        self._bias = bias
        self._packed: torch.ScriptObject | None = None
        self._wide: torch.Tensor | None = None
        if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu" or native_bfloat16():
            return
        wide = weight.float()
        wide_bias = None if bias is None else bias.float()
        if "fbgemm" in torch.backends.quantized.supported_engines and float(wide.abs().max()) <= FLOAT16_MAX:
            self._packed = torch.ops.quantized.linear_prepack_fp16(wide, wide_bias)
        else:
            self._wide, self._bias = wide, wide_bias
        self._weight = None  # one copy is enough

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product [..., out], in the dtype of `x`."""
        if self._packed is not None:
            y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed)
            return y.to(x.dtype)
        if self._wide is not None:
            return linear(x.float(), self._wide, self._bias).to(x.dtype)
        assert self._weight is not None
        return linear(x, self._weight, self._bias)


def use_weights(model: torch.nn.Module) -> None:
    """Let every linear layer of `model` compute through `Weight`, in place."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:  # a subclass has weights of its own kind
            module.forward = Weight(module.weight.detach(), module.bias).__call__  # type: ignore[method-assign, assignment]
