"""Matrix products with a weight, by the fastest exact way that the machine has.

Where a CPU has no unit for products of bfloat16 matrices (AMX), oneDNN's bfloat16 is slower than float32 arithmetic: it
is scalar code on AVX2, and on AVX-512 with bfloat16 dot products 1.4 to 1.7 times as slow from 8 rows on. There a
bfloat16 model keeps its weights rounded to it, and activations, keys and values are float32. Weights are still read as
two bytes: FBGEMM packs them as float16 (pytorch/FBGEMM, FbgemmFP16.h), and since a bfloat16 number has
fewer digits, packing is exact from 2^-14 to 65504 in magnitude, and off by at most 2^-25 below. The products of the
demo model then take 6.9, 20.7 and 79.9 ms with 1, 16 and 64 rows on two AVX-512 cores, where oneDNN's packed weights
take 7.7, 30.8 and 114 ms in bfloat16 and 13.9, 26.2 and 77.8 ms in float32.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from batchgen.engines import tiled_bfloat16

FLOAT16_MAX = 65504.0


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What activations, keys and values of a model with weights of `dtype` are computed in on `device`."""
    slow = dtype is torch.bfloat16 and device.type == "cpu" and not tiled_bfloat16()
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
