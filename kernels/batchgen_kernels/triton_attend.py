"""The kernels of `attend.tree_attend`; their reference is `attend.tree_attend_reference`.

Query heads that share a key/value head are packed into the row dimension of the products, M = tokens * group, so that
a program reads each key and value once for all nodes of a tree and all heads of a group. The softmax is online (Milakov
and Gimelshein, arXiv 1805.02867) and goes through two phases: tiles of the prefix without a mask, then one tile of 64
columns with ancestor bitmasks. With few rows the columns are cut into splits that a second kernel merges (Dao et al.,
"Flash-Decoding", 2023). Scores are float32 in units of log2, so that exp2 serves. Products of bfloat16 accumulate in
float32; those of float32 run as three TF32 products on tensor cores, which keeps about float32's precision.
"""
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 -- what a kernel takes and returns has no Python type; each argument is commented instead

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634


@triton.jit
def _online(scores, v, acc, top, total):
    """Take one tile of scores and values into (acc, top, total)."""
    higher = tl.maximum(top, tl.max(scores, axis=1))
    # A query that has seen nothing yet has a maximum of -inf, and -inf - -inf is NaN.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="tf32x3")
    return acc, higher, total


@triton.jit
def _prefix_tile(
    q,
    acc,
    top,
    total,
    k,
    v,
    begin,
    end,
    oldest,
    scale,
    stride_position,
    depth,
    real_depth,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take pool columns [begin, begin + BLOCK_N) into (acc, top, total), of which those from `end` on are not seen."""
    column = begin + tl.arange(0, BLOCK_N)
    k_at = k + column[None, :] * stride_position + depth[:, None]
    v_at = v + column[:, None] * stride_position + depth[None, :]
    if MASKED:
        inside = column < end
        k_tile = tl.load(k_at, mask=inside[None, :] & real_depth[:, None], other=0.0)
        v_tile = tl.load(v_at, mask=inside[:, None] & real_depth[None, :], other=0.0)
    else:
        k_tile = tl.load(k_at, mask=real_depth[:, None], other=0.0)
        v_tile = tl.load(v_at, mask=real_depth[None, :], other=0.0)
    scores = tl.dot(q, k_tile, input_precision="tf32x3") * scale
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    if WINDOWED:
        scores = tl.where(column[None, :] >= oldest[:, None], scores, float("-inf"))
    return _online(scores, v_tile, acc, top, total)


@triton.jit
def _tree_tile(q, acc, top, total, k, v, begin, mask, scale, stride_position, depth, real_depth):
    """Take those of pool columns [begin, begin + 64) into (acc, top, total) that the bits of `mask` name, by query.

    Columns that no query sees are never read: they may lie beyond the pool's end, or hold what would spoil the product
    even with a weight of zero.
    """
    column = tl.arange(0, 64)
    # The shift drags bit 63, the sign, along; "& 1" looks at the lowest bit only.
    visible = ((mask[:, None] >> column.to(tl.int64)[None, :]) & 1) != 0
    seen = tl.max(visible.to(tl.int32), axis=0) != 0
    place = (begin + column) * stride_position
    k_tile = tl.load(k + place[None, :] + depth[:, None], mask=seen[None, :] & real_depth[:, None], other=0.0)
    v_tile = tl.load(v + place[:, None] + depth[None, :], mask=seen[:, None] & real_depth[None, :], other=0.0)
    scores = tl.dot(q, k_tile, input_precision="tf32x3") * scale
    scores = tl.where(visible, scores, float("-inf"))
    return _online(scores, v_tile, acc, top, total)


@triton.jit
def tree_attend_kernel(
    q,  # in [N, H, HEAD_DIM], head columns contiguous
    k,  # in: one layer's pool [S, num_kv, L, HEAD_DIM], head columns contiguous
    v,  # in, likewise, the same strides
    slot,  # in [R]
    start,  # in [R], first packed token of the row's tile
    count,  # in [R], tokens of the tile, 0 for padding
    prefix,  # in [R], pool columns that all of them see
    bits,  # in [N] int64, bit c for pool column prefix + c
    position,  # in [N], read with a WINDOW only
    out,  # out: [N, H, HEAD_DIM] of q's dtype, or with splits [SPLITS, N, H, HEAD_DIM] float32
    weight,  # out with splits: [SPLITS, N, H] float32, log2 of the sum of exponentials
    scale,  # times log2(e)
    num_tokens,  # N
    num_heads,  # H
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_slot,
    stride_kv,
    stride_position,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    """Programs: (R, key/value heads * NUM_BLOCKS, SPLITS). A block is BLOCK_M rows of (token, head of the group)."""
    row = tl.program_id(0)
    kv = tl.program_id(1) // NUM_BLOCKS
    split = tl.program_id(2)
    num_packed = tl.load(count + row).to(tl.int32) * GROUP
    first_packed = (tl.program_id(1) % NUM_BLOCKS) * BLOCK_M
    if first_packed >= num_packed:
        return
    packed = first_packed + tl.arange(0, BLOCK_M)
    real = packed < num_packed
    token = tl.load(start + row).to(tl.int64) + packed // GROUP
    head = kv * GROUP + packed % GROUP
    depth = tl.arange(0, BLOCK_D)
    real_depth = depth < HEAD_DIM
    q_at = (token * stride_q_token + head * stride_q_head)[:, None] + depth[None, :]
    q_tile = tl.load(q + q_at, mask=real[:, None] & real_depth[None, :], other=0.0)
    base = tl.load(slot + row).to(tl.int64) * stride_slot + kv.to(tl.int64) * stride_kv
    k += base
    v += base

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    # Phase 1: this split's share of the prefix. The tree's own tile counts as one, and is the last split's.
    length = tl.load(prefix + row).to(tl.int32)
    begin = 0
    oldest = tl.zeros([BLOCK_M], tl.int32)
    if WINDOW > 0:
        oldest = tl.load(position + token, mask=real, other=2147483647).to(tl.int32) - (WINDOW - 1)
        begin = tl.minimum(tl.maximum(tl.min(oldest, axis=0), 0), length) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - begin, BLOCK_N) + 1, SPLITS) * BLOCK_N
    begin += split * share
    end = tl.maximum(tl.minimum(begin + share, length), begin)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    for at in range(begin, whole, BLOCK_N):
        acc, top, total = _prefix_tile(
            q_tile, acc, top, total, k, v, at, end, oldest, scale, stride_position, depth, real_depth,
            MASKED=False, WINDOWED=WINDOW > 0, BLOCK_N=BLOCK_N,
        )  # fmt: skip
    if whole < end:
        acc, top, total = _prefix_tile(
            q_tile, acc, top, total, k, v, whole, end, oldest, scale, stride_position, depth, real_depth,
            MASKED=True, WINDOWED=WINDOW > 0, BLOCK_N=BLOCK_N,
        )  # fmt: skip

    # Phase 2: the tree's own columns.
    if split == SPLITS - 1:
        mask = tl.load(bits + token, mask=real, other=0)
        acc, top, total = _tree_tile(
            q_tile, acc, top, total, k, v, length, mask, scale, stride_position, depth, real_depth
        )

    divisor = tl.where(total > 0.0, total, 1.0)
    acc = acc / divisor[:, None]
    out_at = (token * stride_out_token + head * stride_out_head)[:, None] + depth[None, :]
    if SPLITS > 1:
        weight_at = (split * num_tokens + token) * num_heads + head
        out_at = weight_at[:, None] * HEAD_DIM + depth[None, :]
        tl.store(weight + weight_at, tl.where(total > 0.0, top + tl.log2(divisor), float("-inf")), mask=real)
    tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=real[:, None] & real_depth[None, :])


@triton.jit
def merge_splits_kernel(
    partial,  # in [SPLITS, N, H, HEAD_DIM] float32 contiguous
    weight,  # in [SPLITS, N, H] float32 contiguous, log2
    start,  # in [R]
    count,  # in [R]
    out,  # out [N, H, HEAD_DIM], head columns contiguous
    num_tokens,  # N
    num_heads,  # H
    stride_out_token,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Programs: (R, max_count, H / HEADS). Splits are added in their order, whatever their number of programs."""
    row = tl.program_id(0)
    if tl.program_id(1) >= tl.load(count + row):
        return
    token = tl.load(start + row).to(tl.int64) + tl.program_id(1)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    depth = tl.arange(0, BLOCK_D)
    real = head < num_heads
    inside = real[:, None] & (depth < HEAD_DIM)[None, :]
    top = tl.full([HEADS], float("-inf"), tl.float32)
    for split in range(SPLITS):
        at = (split * num_tokens + token) * num_heads + head
        top = tl.maximum(top, tl.load(weight + at, mask=real, other=0.0))
    acc = tl.zeros([HEADS, BLOCK_D], tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for split in range(SPLITS):
        at = (split * num_tokens + token) * num_heads + head
        w = tl.exp2(tl.load(weight + at, mask=real, other=0.0) - top)
        acc += w[:, None] * tl.load(partial + at[:, None] * HEAD_DIM + depth[None, :], mask=inside, other=0.0)
        total += w
    out_at = token * stride_out_token + head[:, None] * stride_out_head + depth[None, :]
    tl.store(out + out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def tree_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    prefix: torch.Tensor,
    bits: torch.Tensor,
    scale: float,
    max_count: int,
    splits: int,
    window: int | None,
    position: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`attend.tree_attend`, into `out`."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows, num_kv = slot.shape[0], k.shape[1]
    group = num_heads // num_kv
    assert k.stride() == v.stride()
    assert q.stride(2) == k.stride(3) == out.stride(2) == 1
    assert all(x.is_contiguous() for x in (slot, start, count, prefix, bits, position))
    assert bits.dtype is torch.int64
    block_d = max(16, triton.next_power_of_2(head_dim))
    # 128 rows of 128 float32 sums are what eight warps hold without spilling; wider tiles take several programs, whose
    # second reading of a key hits the L2 cache.
    row_bytes = block_d * q.element_size()
    block_m = min(max(16, triton.next_power_of_2(max_count * group)), 128 if row_bytes <= 256 else 32)
    num_blocks = triton.cdiv(max_count * group, block_m)
    block_n = 128 if row_bytes <= 128 else 64 if row_bytes <= 256 else 32
    partial, weight = out, out
    if splits > 1:
        partial = torch.empty((splits, num_tokens, num_heads, head_dim), dtype=torch.float32, device=q.device)
        weight = torch.empty((splits, num_tokens, num_heads), dtype=torch.float32, device=q.device)
    tree_attend_kernel[(num_rows, num_kv * num_blocks, splits)](
        q,
        k,
        v,
        slot,
        start,
        count,
        prefix,
        bits,
        position,
        partial,
        weight,
        scale * _LOG2_E,
        num_tokens,
        num_heads,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        k.stride(0),
        k.stride(1),
        k.stride(2),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        NUM_BLOCKS=num_blocks,
        SPLITS=splits,
        WINDOW=window or 0,
        num_warps=4 if block_m <= 64 and row_bytes <= 256 else 8,
        num_stages=3,
    )
    if splits > 1:
        heads = min(triton.next_power_of_2(num_heads), max(1, 1024 // block_d))
        merge_splits_kernel[(num_rows, max_count, triton.cdiv(num_heads, heads))](
            partial,
            weight,
            start,
            count,
            out,
            num_tokens,
            num_heads,
            out.stride(0),
            out.stride(1),
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            HEADS=heads,
            SPLITS=splits,
            num_warps=4,
        )
