"""Attention of tree tiles to their KV prefix and to their own nodes, for ragged rows described on the device.

A row's tile is up to 64 packed tokens. Each sees the whole prefix of its slot, and of the 64 pool columns behind it
those that its bitmask names; their keys and values were written to the pool beforehand. Every count lives in a device
tensor, so that one CUDA graph serves all trees that fit `max_count`. Plain decoding is a tile of one token.

Causal chunks of prompt are not covered: they are large and regular, and torch's SDPA or flash-attention has them.

Shape legend: N packed tokens, R rows of the pass, S slots, L pool length, H query heads, K key/value heads, D head
size.
"""

from __future__ import annotations

import torch

from batchgen_kernels.dispatch import on_triton, wide

MAX_COUNTS = (1, 4, 8, 16, 32, 64)
_TILE = 64  # columns that a bitmask names


def num_splits(num_rows: int, num_kv_heads: int, num_sms: int) -> int:
    """Into how many parts `tree_attend` should cut each row's columns, on a GPU of `num_sms` multiprocessors.

    One where there are programs for one and a half waves, else as many as make two. Sums are ordered by split, so
    outputs of different `splits` differ by rounding: fix it for each size of batch, never for each step.
    """
    programs = num_rows * num_kv_heads
    return 1 if 2 * programs >= 3 * num_sms else -(-2 * num_sms // programs)


def tree_attend_reference(
    q_NHD: torch.Tensor,
    k_SKLD: torch.Tensor,
    v_SKLD: torch.Tensor,
    slot_R: torch.Tensor,
    start_R: torch.Tensor,
    count_R: torch.Tensor,
    prefix_R: torch.Tensor,
    bits_N: torch.Tensor,
    scale: float,
    window: int | None,
    position_N: torch.Tensor,
    out_NHD: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `tree_attend` computes, row by row with a dense mask, in float32 or float64."""
    out_NHD = torch.empty_like(q_NHD) if out_NHD is None else out_NHD
    group = q_NHD.shape[1] // k_SKLD.shape[1]
    rows = zip(slot_R.tolist(), start_R.tolist(), count_R.tolist(), prefix_R.tolist(), strict=True)
    for slot, start, count, prefix in rows:
        if count == 0:
            continue
        tokens = slice(start, start + count)
        column = torch.arange(min(prefix + _TILE, k_SKLD.shape[2]), device=q_NHD.device)
        # int64 shifts drag the sign bit along, which is bit 63, and "& 1" looks at the lowest bit only.
        visible = (bits_N[tokens, None] >> (column - prefix).clamp(0, _TILE - 1)) & 1 == 1
        visible[:, :prefix] = True
        if window is not None:
            visible[:, :prefix] = position_N[tokens, None] - column[:prefix] < window
        # Columns that nobody sees may hold anything, NaN included: they are left out, not multiplied by zero.
        seen = visible.any(0).nonzero()[:, 0]
        k = wide(k_SKLD[slot, :, seen]).repeat_interleave(group, 0)
        v = wide(v_SKLD[slot, :, seen]).repeat_interleave(group, 0)
        scores = scale * torch.einsum("thd,hcd->htc", wide(q_NHD[tokens]), k)
        p = scores.masked_fill(~visible[:, seen], float("-inf")).softmax(-1)
        out_NHD[tokens] = torch.einsum("htc,hcd->thd", p, v).to(q_NHD.dtype)
    return out_NHD


def tree_attend(
    q_NHD: torch.Tensor,
    k_SKLD: torch.Tensor,
    v_SKLD: torch.Tensor,
    slot_R: torch.Tensor,
    start_R: torch.Tensor,
    count_R: torch.Tensor,
    prefix_R: torch.Tensor,
    bits_N: torch.Tensor,
    scale: float,
    max_count: int,
    splits: int,
    window: int | None,
    position_N: torch.Tensor,
    out_NHD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output [N, H, D] of all tiles, in `out_NHD` where given; tokens of no tile are left as they are there.

    slot_R, start_R, count_R, prefix_R: integers; row r's tile is packed tokens [start, start + count), all of which
        see pool columns [0, prefix) of `slot`. A row of count 0 is padding and reads nothing else.
    bits_N: int64; bit c set when the token sees pool column prefix + c. Each token sees one column at least.
    max_count: one of MAX_COUNTS, at least every count (not checked: counts are on the device)
    splits: from `num_splits`
    window: prefix columns are seen only less than this many positions back from the token's own position, an int64 of
        `position_N`; column c stands at position c, and a tile is assumed to be narrower than any window
    """
    if not on_triton(q_NHD):
        return tree_attend_reference(
            q_NHD, k_SKLD, v_SKLD, slot_R, start_R, count_R, prefix_R, bits_N, scale, window, position_N, out_NHD
        )
    from batchgen_kernels.triton_attend import tree_attend as launch

    assert max_count in MAX_COUNTS
    out_NHD = torch.empty_like(q_NHD) if out_NHD is None else out_NHD
    launch(
        q_NHD,
        k_SKLD,
        v_SKLD,
        slot_R,
        start_R,
        count_R,
        prefix_R,
        bits_N,
        scale,
        max_count,
        splits,
        window,
        position_N,
        out_NHD,
    )
    return out_NHD
