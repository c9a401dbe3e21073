"""Matrix products with a weight, by the fastest way that the machine has.

What bfloat16 is worth differs between CPUs without a unit for products of its matrices (AMX). oneDNN's is scalar code
on AVX2; on two Intel cores with AVX-512 and bfloat16 dot products its packed weights took 7.7, 30.8 and 114 ms for the
products of the demo model with 1, 16 and 64 rows, where FBGEMM's took 6.9, 20.7 and 79.9 ms; on two AMD ones (Zen 4)
12.8, 19.9 and 56 ms, where FBGEMM's took 7.6, 28.7 and 100 ms. So a CPU that has such instructions is tried.

Where FBGEMM wins, activations, keys and values of a bfloat16 model are float32, its weights still numbers of bfloat16.
They are packed as float16 (pytorch/FBGEMM, FbgemmFP16.h), and since a bfloat16 number has fewer digits, packing is
exact from 2^-14 to 65504 in magnitude, and off by at most 2^-25 below.

Weights of other float32 numbers are packed by oneDNN: with those of the demo model two Zen 3 cores decoded 1.17, 1.67
and 1.26 times as many tokens with 1, 8 and 64 rows as with torch's own product, which is MKL's.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from batchgen.engines import native_bfloat16, tiled_bfloat16

if TYPE_CHECKING:
    from collections.abc import Callable

    Product = Callable[[torch.Tensor], torch.Tensor]

FLOAT16_MAX = 65504.0
# Numbers of tokens that products in bfloat16 on a CPU had better be of, where there is a choice. For each new number
# oneDNN compiles each weight's product anew, 0.5 ms on two Zen 4 cores, where a pass of 16 tokens takes 25.
FEW_NUMBERS = (*range(1, 16), *range(16, 4097, 4))
# FBGEMM adds up the inputs 512 at a time, going over all outputs for each 512: these had better stay in the cache. For
# 49,152 outputs of 576 inputs, two Zen 3 cores took 45 ms with 64 tokens in one piece and 27 in six (4.0 and 4.2 with
# one).
_MOST_OUTPUTS = 8192
# Of the product that is timed: rows of a full batch, inputs and outputs; how often at least, and for how long. Another
# process that has a core makes products of 0.6 ms take 8, nine in a row, so a few of them would not do.
_TIMED, _TIMES, _TIMED_S = (64, 1024, 4096), 7, 0.15


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What activations, keys and values of a model with weights of `dtype` are computed in on `device`."""
    slow = dtype is torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16()
    return torch.float32 if slow else dtype


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU is faster with oneDNN's products of bfloat16 matrices than with FBGEMM's; measured once."""
    if not native_bfloat16() or tiled_bfloat16() or not _has_fbgemm():
        return native_bfloat16()
    rows, inputs, outputs = _TIMED
    x, weight = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    ways = ((_onednn(weight.bfloat16(), None), x.bfloat16()), (_fbgemm(weight, None), x))
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        until = time.perf_counter() + _TIMED_S
        while len(seconds[0]) < _TIMES or time.perf_counter() < until:  # in turn: the machine's speed drifts
            for (product, activations), taken in zip(ways, seconds, strict=True):
                began = time.perf_counter()
                product(activations)
                taken.append(time.perf_counter() - began)
    onednn_s, fbgemm_s = map(min, seconds)
    return onednn_s < fbgemm_s


class Weight:
    """A weight matrix [out, in] with its optional bias; call it with activations [..., in] of the same dtype.

    `two_bytes` says that the weight holds numbers of a two-byte dtype, whatever its own: float32 is then packed.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, two_bytes: bool = False) -> None:
        packed = _packed(weight, bias, two_bytes=two_bytes)
        self._product = packed or functools.partial(linear, weight=weight, bias=bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product [..., out], in the dtype of `x`."""
        return self._product(x)


def _packed(weight: torch.Tensor, bias: torch.Tensor | None, *, two_bytes: bool) -> Product | None:
    if weight.device.type != "cpu":
        return None
    if two_bytes and weight.dtype is torch.float32 and _has_fbgemm() and float(weight.abs().max()) <= FLOAT16_MAX:
        return _fbgemm(weight, bias)
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    packs = has_onednn and weight.dtype in (torch.bfloat16, torch.float32)
    return _onednn(weight, bias) if packs else None


def _onednn(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    # The operators that torch.compile calls on frozen weights: `linear` would rearrange a weight in every call.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001
    multiply = _bare(torch.ops.mkldnn._linear_pointwise.default)  # noqa: SLF001

    def product(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = multiply(x, packed, bias, "none", [], "")
        return y

    return product


def _fbgemm(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    multiply = _bare(torch.ops.quantized.linear_dynamic_fp16.default)
    num = -(-len(weight) // _MOST_OUTPUTS)
    biases = bias.tensor_split(num) if bias is not None else [None] * num
    parts = [
        torch.ops.quantized.linear_prepack_fp16(part, b)
        for part, b in zip(weight.tensor_split(num), biases, strict=True)
    ]

    def product(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = multiply(x, parts[0]) if num == 1 else torch.cat([multiply(x, part) for part in parts], -1)
        return y

    return product


def _bare(operator: Any) -> Callable[..., torch.Tensor]:
    """The operator without what looks at its arguments first, 12 us of 47 for the smallest product on a Zen 3 core."""
    found: Callable[..., torch.Tensor] = operator._op  # noqa: SLF001
    return found


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def use_weights(model: torch.nn.Module, *, two_bytes: bool) -> None:
    """Let every linear layer of `model` compute through `Weight`, in place."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:  # a subclass has weights of its own kind
            weight = Weight(module.weight.detach(), module.bias, two_bytes=two_bytes)
            module.forward = weight.__call__  # type: ignore[method-assign, assignment]
