"""RMSNorm, with the residual sum before it.

The rounding steps are those of transformers' LlamaRMSNorm: the sum is rounded to the model dtype, squares are averaged
in float32, and the weight is applied after rounding back. Logits then agree with transformers' to the last rounding.

Shape legend: N rows (any leading dimensions), H row width; also [N, heads, head size] for norms of queries and keys.
"""

from __future__ import annotations

import torch

from batchgen_kernels.dispatch import on_triton, wide


def rms_norm_reference(
    x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, residual_NH: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rms_norm` computes."""
    summed = x_NH if residual_NH is None else x_NH + residual_NH
    return weight_H * torch.rms_norm(wide(summed), weight_H.shape, None, eps).to(x_NH.dtype), summed


def rms_norm(
    x_NH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    residual_NH: torch.Tensor | None = None,
    *,
    out_NH: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x + residual, x + residual), or (RMSNorm of x, x itself) without a residual.

    All tensors have the dtype of `x_NH`. `x_NH` may be a view with contiguous rows, such as the query heads of a merged
    QKV row; `residual_NH` is contiguous. The norm is written to `out_NH` where given, which may be `x_NH` itself.
    """
    if not on_triton(x_NH):
        normed, summed = rms_norm_reference(x_NH, weight_H, eps, residual_NH)
        return normed if out_NH is None else out_NH.copy_(normed), summed
    from batchgen_kernels.triton_norm import rms_norm as launch

    return launch(x_NH, weight_H, eps, residual_NH, out_NH)
