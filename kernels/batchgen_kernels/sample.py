"""One token per row of logits: the argmax, or a draw by Gumbel-max with the noise of `gumbel.gumbel_noise`.

Top-k and top-p arrive as a threshold on logits / temperature, so that nothing here is sorted and the set of survivors
does not depend on the order of equal logits. The integer part of the noise is the same everywhere, bit for bit. Its
logarithms differ by rounding between devices: a draw is the same on two of them unless two tokens tie to within that.

Shape legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch

from batchgen_kernels.dispatch import with_kernel
from batchgen_kernels.gumbel import noise_of_words


@with_kernel("triton_sample")
def gumbel_argmax(
    logits_NV: torch.Tensor,
    temperature_N: torch.Tensor,
    threshold_N: torch.Tensor,
    first_N: torch.Tensor,
    second_N: torch.Tensor,
) -> torch.Tensor:
    """Token ids, int64 [N]; of equal maxima the first, as torch.argmax on CPU.

    logits_NV: contiguous rows, any float dtype, no NaN
    temperature_N: float32; 0 is the argmax of the logits, whatever the other arguments
    threshold_N: float32, the least logits / temperature that may be drawn, -inf for all, at most the row's maximum. It
        must come from `logits.float() / temperature_tensor`: torch on CUDA divides by a Python number through its
        reciprocal, whose rounding may put the last survivor below its own threshold.
    first_N, second_N: int64, the two words of `gumbel.position_words`
    """
    drawn = temperature_N > 0
    tokens = torch.empty(len(logits_NV), dtype=torch.int64, device=logits_NV.device)
    if not drawn.all():
        tokens[~drawn] = logits_NV[~drawn].argmax(-1)
    if drawn.any():
        scaled = logits_NV[drawn].float() / temperature_N[drawn, None]
        threshold, first, second = (each[drawn, None] for each in (threshold_N, first_N, second_N))
        survives = scaled >= threshold
        if threshold.isfinite().all():  # then few do, and noise takes longer than finding them
            row, token = survives.nonzero(as_tuple=True)
            noisy = torch.full_like(scaled, float("-inf"))
            noisy[row, token] = scaled[row, token] + noise_of_words(first[row, 0], second[row, 0], token)
        else:
            noise = noise_of_words(first, second, torch.arange(scaled.shape[1], device=scaled.device))
            noisy = torch.where(survives, scaled + noise, float("-inf"))
        tokens[drawn] = noisy.argmax(-1)
    return tokens
