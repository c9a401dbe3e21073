"""The kernel of `swiglu.swiglu`; the reference is the function itself."""
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001 -- what a kernel takes and returns has no Python type; each argument is commented instead

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(
    gate_up,  # in [N, 2 * width] contiguous
    out,  # out [N, width] contiguous
    width,
    BLOCK: tl.constexpr,
) -> None:
    """Programs: (N, width / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * width + column, (activated * up).to(dtype), mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu.swiglu`."""
    assert gate_up.is_contiguous()
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    swiglu_kernel[(num_rows, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block, num_warps=4)
    return out
