"""The kernel of `compaction.compact`; the reference is the function itself."""
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001 -- what a kernel takes and returns has no Python type; each argument is commented instead

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch


@triton.jit
def compact_kernel(
    k,  # in and out [layers, S, num_kv, L, HEAD_DIM], strides below, head columns contiguous
    v,  # in and out, likewise, the same strides
    slot,  # in [M], negative for no move
    source,  # in [M]
    destination,  # in [M]
    num_moves,
    num_lines,  # layers * num_kv
    num_kv,
    stride_layer,
    stride_slot,
    stride_kv,
    stride_position,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """Programs: (M, lines / LINES), a line being one head of one layer. The first move of a slot makes all of them.

    The moves of a slot must not run side by side: a destination may be an earlier move's source. One after the other
    they are safe, even where the compiler hoists loads: as destination <= source < any later source, no move reads
    what an earlier one wrote, and a move's loads precede its stores, hence those of later moves.
    """
    first = tl.program_id(0)
    mine = tl.load(slot + first)
    if mine < 0:
        return
    move = tl.arange(0, BLOCK_M)
    same = tl.load(slot + move, mask=move < num_moves, other=-1) == mine
    if tl.min(tl.where(same, move, BLOCK_M)) < first:
        return
    last = tl.max(tl.where(same, move, -1))

    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, BLOCK_D)
    inside = (line < num_lines)[:, None] & (column < HEAD_DIM)[None, :]
    base = (line // num_kv).to(tl.int64) * stride_layer + (line % num_kv).to(tl.int64) * stride_kv
    at = (base + mine.to(tl.int64) * stride_slot)[:, None] + column[None, :]
    for m in range(first, last + 1):
        start = tl.load(source + m).to(tl.int64)
        stop = tl.load(destination + m).to(tl.int64)
        if (tl.load(slot + m) == mine) & (start != stop):
            key = tl.load(k + at + start * stride_position, mask=inside)
            value = tl.load(v + at + start * stride_position, mask=inside)
            tl.store(k + at + stop * stride_position, key, mask=inside)
            tl.store(v + at + stop * stride_position, value, mask=inside)


def compact(
    k: torch.Tensor, v: torch.Tensor, slot: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> None:
    """`compaction.compact`."""
    num_layers, _, num_kv, _, head_dim = k.shape
    num_moves = slot.shape[0]
    if num_moves == 0:
        return
    assert k.shape == v.shape
    assert k.stride() == v.stride()
    assert k.stride(4) == 1
    assert all(x.is_contiguous() for x in (slot, source, destination))
    block = triton.next_power_of_2(head_dim)
    lines = max(1, 2048 // block)
    compact_kernel[(num_moves, triton.cdiv(num_layers * num_kv, lines))](
        k,
        v,
        slot,
        source,
        destination,
        num_moves,
        num_layers * num_kv,
        num_kv,
        k.stride(0),
        k.stride(1),
        k.stride(2),
        k.stride(3),
        HEAD_DIM=head_dim,
        BLOCK_D=block,
        BLOCK_M=triton.next_power_of_2(num_moves),
        LINES=lines,
        num_warps=4,
    )
