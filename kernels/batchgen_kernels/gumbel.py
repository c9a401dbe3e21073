"""Gumbel noise that depends on (key, output position, token) and on nothing else.

Adding it to log-probabilities and taking the argmax draws from the distribution (Gumbel-max). Because the noise is a
pure function of its key, a row's tokens are the same with and without speculation, in any batch, on any worker and
after a resume. Counter-based like Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with two
rounds of the 32-bit finaliser of MurmurHash3 instead of Philox: no state, no order of draws, few integer operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

W = TypeVar("W", int, "NDArray[np.uint64]")

_M32 = 0xFFFFFFFF
_M64 = 0xFFFFFFFFFFFFFFFF
_GOLDEN32 = 0x9E3779B1
_GOLDEN64 = 0x9E3779B97F4A7C15


def position_words(key: W, position: W) -> tuple[W, W]:
    """Two 32-bit words for a (64-bit key, output position): splitmix64 of their sum (Steele et al., OOPSLA 2014).

    Of arrays of both, uint64, an array of each word.
    """
    z: Any = (key + (position + 1) * _GOLDEN64) & _M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _M64
    z ^= z >> 31
    return z & _M32, z >> 32


def _int32(x: torch.Tensor | int) -> torch.Tensor | int:
    """The 32-bit word `x` as int32, whose products wrap like a word's and take half the memory of an int64's."""
    return x.to(torch.int32) if isinstance(x, torch.Tensor) else x - ((x >> 31) << 32)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    # A shift of int32 copies the sign, so what it shifts in is masked.
    x = (x ^ ((x >> 16) & 0xFFFF)) * _int32(0x85EBCA6B)
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _int32(0xC2B2AE35)
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel_noise(key: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for `token_ids` (int64, any shape), float32 of the same shape and device."""
    return noise_of_words(*position_words(key, position), token_ids)


def noise_of_words(first: torch.Tensor | int, second: torch.Tensor | int, token_ids: torch.Tensor) -> torch.Tensor:
    """`gumbel_noise` where the two `position_words` are given, as numbers or as int64 that broadcast.

    The uniform is built so that its small end, where float32 is fine-grained, becomes the large noise that decides an
    argmax: -log(-log1p(-v)) with v in (0, 1) reaches 22.9 without rounding to infinity.
    """
    bits = _mix32(_mix32(token_ids.to(torch.int32) * _int32(_GOLDEN32) + _int32(first)) ^ _int32(second))
    v = (bits.view(torch.uint32).to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v.clamp(max=1.0 - 2.0**-24)))
