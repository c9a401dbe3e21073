"""The kernels of `sample.gumbel_argmax`; the reference is the function itself."""
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 -- what a kernel takes and returns has no Python type; each argument is commented instead

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_V = 2048
# About eight programs for each of an H100's 132 multiprocessors; an argmax is the same however it is split.
_PROGRAMS = 1056


@triton.jit
def _mix32(x):
    """`gumbel._mix32` of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _noise(first, second, token):
    """`gumbel.gumbel_noise`, float32, of uint32 words and int32 token ids."""
    bits = _mix32(_mix32(token.to(tl.uint32) * 0x9E3779B1 + first) ^ second)
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
    # Triton has no portable log1p. The rounding of u = 1 - v is undone by the factor v / (1 - u), which is exact enough
    # because both see the same u (W. Kahan; Goldberg, "What every computer scientist should know", theorem 4).
    u = 1.0 - v
    log1p = tl.where(u == 1.0, -v, tl.log(u) * (v / tl.where(u == 1.0, 1.0, 1.0 - u)))
    return -tl.log(-log1p)


@triton.jit
def sample_tiles_kernel(
    logits,  # in [N, vocab], rows at stride_row
    temperature,  # in [N] float32
    threshold,  # in [N] float32
    first,  # in [N] 32-bit words in int64
    second,  # in [N]
    values,  # out [N, splits] float32, best of each stretch
    tokens,  # out [N, splits] int32, its first token
    vocab,
    stride_row,
    tiles,  # of BLOCK_V tokens in each stretch
    BLOCK_V: tl.constexpr,
) -> None:
    """Programs: (N, splits). Each lane keeps its own best, the lanes are compared once at the end."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tiles * BLOCK_V
    end = tl.minimum(begin + tiles * BLOCK_V, vocab)
    lane = tl.arange(0, BLOCK_V)
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK_V], tl.int32)
    heat = tl.load(temperature + row)
    if heat > 0:
        least = tl.load(threshold + row)
        first_word = tl.load(first + row).to(tl.uint32)
        second_word = tl.load(second + row).to(tl.uint32)
        for start in range(begin, end, BLOCK_V):
            token = start + lane
            logit = tl.load(logits + row * stride_row + token, mask=token < end, other=float("-inf")).to(tl.float32)
            # Rounded as torch does; Triton's own division may miss the threshold by an ulp.
            scaled = tl.div_rn(logit, heat)
            # -inf >= -inf: lanes beyond the end pass, and lose with their logit.
            noisy = tl.where(scaled >= least, scaled + _noise(first_word, second_word, token), float("-inf"))
            better = noisy > best
            best = tl.where(better, noisy, best)
            chosen = tl.where(better, token, chosen)
    else:
        for start in range(begin, end, BLOCK_V):
            token = start + lane
            logit = tl.load(logits + row * stride_row + token, mask=token < end, other=float("-inf")).to(tl.float32)
            better = logit > best
            best = tl.where(better, logit, best)
            chosen = tl.where(better, token, chosen)
    value = tl.max(best, axis=0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(values + at, value)
    tl.store(tokens + at, tl.min(tl.where(best == value, chosen, vocab - 1), axis=0))


@triton.jit
def sample_merge_kernel(
    values,  # in [N, splits] float32
    tokens,  # in [N, splits] int32
    out,  # out [N] int64
    splits,
    BLOCK: tl.constexpr,
) -> None:
    """Programs: (N). The first token of the best stretch."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK)
    value = tl.load(values + row * splits + split, mask=split < splits, other=float("-inf"))
    token = tl.load(tokens + row * splits + split, mask=split < splits, other=2147483647)
    best = tl.max(value, axis=0)
    tl.store(out + row, tl.min(tl.where(value == best, token, 2147483647), axis=0).to(tl.int64))


def gumbel_argmax(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    threshold: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
) -> torch.Tensor:
    """`sample.gumbel_argmax`."""
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1
    assert temperature.dtype is torch.float32
    assert threshold.dtype is torch.float32
    assert all(x.is_contiguous() for x in (temperature, threshold, first, second))
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    num_tiles = triton.cdiv(vocab, _BLOCK_V)
    tiles = triton.cdiv(num_tiles, min(num_tiles, triton.cdiv(_PROGRAMS, num_rows)))
    splits = triton.cdiv(num_tiles, tiles)
    values = torch.empty((num_rows, splits), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((num_rows, splits), dtype=torch.int32, device=logits.device)
    sample_tiles_kernel[(num_rows, splits)](
        logits,
        temperature,
        threshold,
        first,
        second,
        values,
        tokens,
        vocab,
        logits.stride(0),
        tiles,
        BLOCK_V=_BLOCK_V,
        num_warps=8,
    )
    sample_merge_kernel[(num_rows,)](values, tokens, out, splits, BLOCK=triton.next_power_of_2(splits), num_warps=1)
    return out
