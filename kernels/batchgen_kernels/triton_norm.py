"""The kernel of `norm.rms_norm`; its reference is `norm.rms_norm_reference`."""
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001 -- what a kernel takes and returns has no Python type; each argument is commented instead

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x,  # in [rows, width], rows at outer and inner strides, columns contiguous
    weight,  # in [width]
    residual,  # in [rows, width] contiguous; not read without HAS_RESIDUAL
    normed,  # out [rows, width], rows at strides; may be x
    summed,  # out [rows, width] contiguous; not written without HAS_RESIDUAL
    num_rows,
    num_inner,  # row r is (r // num_inner, r % num_inner)
    width,
    x_outer,
    x_inner,
    normed_outer,
    normed_inner,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Programs: (rows / ROWS). Each holds its rows whole, and reads them before it writes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_H)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    outer = (row // num_inner).to(tl.int64)
    inner = (row % num_inner).to(tl.int64)
    dtype = normed.dtype.element_ty

    values = tl.load(x + (outer * x_outer + inner * x_inner)[:, None] + column[None, :], mask=inside, other=0.0)
    values = values.to(tl.float32)
    if HAS_RESIDUAL:
        flat = row.to(tl.int64)[:, None] * width + column[None, :]
        values += tl.load(residual + flat, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(dtype)
        tl.store(summed + flat, rounded, mask=inside)
        values = rounded.to(tl.float32)

    scale = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    values = (values * scale[:, None]).to(dtype).to(tl.float32)
    values *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    at = (outer * normed_outer + inner * normed_inner)[:, None] + column[None, :]
    tl.store(normed + at, values.to(dtype), mask=inside)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm.rms_norm`."""
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    summed = x if residual is None else torch.empty_like(residual)
    assert residual is None or (residual.shape == x.shape and residual.is_contiguous())
    assert normed.shape == x.shape
    width = x.shape[-1]
    # `view` refuses leading dimensions that two strides cannot express.
    shape_OIH = (x.shape[:-1].numel(), 1, width) if x.dim() <= 2 else (x.shape[:-2].numel(), *x.shape[-2:])
    x_OIH, normed_OIH = x.view(shape_OIH), normed.view(shape_OIH)
    assert x_OIH.stride(2) == normed_OIH.stride(2) == weight.stride(0) == 1
    num_rows = x_OIH.shape[0] * x_OIH.shape[1]
    # A program takes enough short rows (heads of queries and keys) to keep its warps in full loads.
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        weight,
        x if residual is None else residual,
        normed,
        summed,
        num_rows,
        x_OIH.shape[1],
        width,
        x_OIH.stride(0),
        x_OIH.stride(1),
        normed_OIH.stride(0),
        normed_OIH.stride(1),
        eps,
        HAS_RESIDUAL=residual is not None,
        ROWS=rows,
        BLOCK_H=block,
        num_warps=min(16, max(4, rows * block // 512)),
    )
    return normed, summed
