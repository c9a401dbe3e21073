"""Corrections to bfloat16 in Triton's interpreter, which runs kernels on CPUs for tests; GPUs never see this.

The interpreter (triton/runtime/interpreter.py, 3.6 to 3.9) keeps bfloat16 as its bit pattern in uint16. Its float32 to
bfloat16 cuts the low bits off where hardware rounds to nearest even, and its dot product multiplies the bit patterns as
integers. Elementwise arithmetic on them is wrong too: our kernels do theirs in float32.
"""
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float  # noqa: SLF001
_create_dot = interpreter.InterpreterBuilder.create_dot


def _convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if not (source == tl.float32 and target == tl.bfloat16):
        return np.asarray(_convert_float(values, source, target, rounding))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a, b = (
            interpreter.TensorHandle(_convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
            for x in (a, b)
        )
    return _create_dot(self, a, b, acc, *options)


def repair() -> None:
    """Put the corrections in place, for the rest of the process."""
    interpreter._convert_float = _convert  # noqa: SLF001
    interpreter.InterpreterBuilder.create_dot = _dot
