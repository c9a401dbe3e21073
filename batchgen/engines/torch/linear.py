"""Matrix products with a weight, by the fastest exact way that the machine has.

A CPU without bfloat16 instructions computes bfloat16 in scalar code. There a bfloat16 model keeps its weights rounded
to it, and activations, keys and values are float32. Weights are still read as two bytes: FBGEMM packs them as float16
(pytorch/FBGEMM, FbgemmFP16.h), and since a bfloat16 number has fewer digits, packing is exact from 2^-14 to 65504 in
magnitude, and off by at most 2^-25 below. On an AVX2 machine the products of a small model took a third of float32's
time with 1 row, and about three quarters of it with 64, where oneDNN's packed float32 took as long.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from batchgen.engines import native_bfloat16

FLOAT16_MAX = 65504.0


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What activations, keys and values of a model with weights of `dtype` are computed in on `device`."""
    slow = dtype is torch.bfloat16 and device.type == "cpu" and not native_bfloat16()
    return torch.float32 if slow else dtype


class Weight:
    """A weight matrix [out, in] with its optional bias; call it with activations [..., in] of the same dtype.

    `two_bytes` says that the weight holds numbers of a two-byte dtype, whatever its own: float32 is then packed.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, two_bytes: bool = False) -> None:
        self._bias = bias
        self._packed: torch.ScriptObject | None = None
        self._weight: torch.Tensor | None = weight
        if (
            two_bytes
            and weight.dtype is torch.float32
            and "fbgemm" in torch.backends.quantized.supported_engines
            and float(weight.abs().max()) <= FLOAT16_MAX
        ):
            self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
            self._weight = None  # one copy is enough

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product [..., out], in the dtype of `x`."""
        if self._weight is None:
            y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
            return y
        return linear(x, self._weight, self._bias)


def use_weights(model: torch.nn.Module, *, two_bytes: bool) -> None:
    """Let every linear layer of `model` compute through `Weight`, in place."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:  # a subclass has weights of its own kind
            weight = Weight(module.weight.detach(), module.bias, two_bytes=two_bytes)
            module.forward = weight.__call__  # type: ignore[method-assign, assignment]
