"""The kernel of `rope.rope_and_store`; the reference is the function itself."""
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 -- what a kernel takes and returns has no Python type; each argument is commented instead

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rotated(x, other, cos, sin, dtype: tl.constexpr):
    """The sum x * cos + other * sin of float32 values, rounded to `dtype` after each operation."""
    return ((x * cos).to(dtype).to(tl.float32) + (other * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def rope_and_store_kernel(
    qkv,  # in [N, num_heads + 2 * num_kv, 2 * HALF] contiguous
    cos,  # in [N, 2 * HALF] contiguous
    sin,  # in [N, 2 * HALF] contiguous, the first half negated
    q,  # out [N, num_heads, 2 * HALF] contiguous
    k,  # out, in place: one layer's pool, strides below, head columns contiguous
    v,  # out, in place: likewise, the same strides
    slot,  # in [N], negative for padding
    position,  # in [N]
    num_heads,
    num_kv,
    stride_slot,
    stride_kv,
    stride_position,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """Programs: (N, heads / HEADS), where heads counts those of queries, keys and values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    low = tl.arange(0, BLOCK_HALF)
    real_low = low < HALF
    inside = (head < num_heads + 2 * num_kv)[:, None] & real_low[None, :]
    dtype: tl.constexpr = q.dtype.element_ty

    row = qkv + token * (num_heads + 2 * num_kv) * (2 * HALF) + head[:, None] * (2 * HALF) + low[None, :]
    x_low = tl.load(row, mask=inside, other=0.0)
    x_high = tl.load(row + HALF, mask=inside, other=0.0)
    at = token * (2 * HALF) + low
    cos_low = tl.load(cos + at, mask=real_low, other=0.0).to(dtype).to(tl.float32)[None, :]
    cos_high = tl.load(cos + at + HALF, mask=real_low, other=0.0).to(dtype).to(tl.float32)[None, :]
    sin_low = tl.load(sin + at, mask=real_low, other=0.0).to(dtype).to(tl.float32)[None, :]
    sin_high = tl.load(sin + at + HALF, mask=real_low, other=0.0).to(dtype).to(tl.float32)[None, :]
    wide_low = x_low.to(tl.float32)
    wide_high = x_high.to(tl.float32)
    out_low = _rotated(wide_low, wide_high, cos_low, sin_low, dtype)
    out_high = _rotated(wide_high, wide_low, cos_high, sin_high, dtype)

    is_query = (head < num_heads)[:, None] & inside
    q_row = q + (token * num_heads + head)[:, None] * (2 * HALF) + low[None, :]
    tl.store(q_row, out_low, mask=is_query)
    tl.store(q_row + HALF, out_high, mask=is_query)

    slot_here = tl.load(slot + token).to(tl.int64)
    if slot_here >= 0:
        kv = head - num_heads
        place = slot_here * stride_slot + tl.load(position + token).to(tl.int64) * stride_position
        is_key = ((kv >= 0) & (kv < num_kv))[:, None] & inside
        k_row = k + place + kv.to(tl.int64)[:, None] * stride_kv + low[None, :]
        tl.store(k_row, out_low, mask=is_key)
        tl.store(k_row + HALF, out_high, mask=is_key)
        is_value = (kv >= num_kv)[:, None] & inside
        v_row = v + place + (kv - num_kv).to(tl.int64)[:, None] * stride_kv + low[None, :]
        tl.store(v_row, x_low, mask=is_value)
        tl.store(v_row + HALF, x_high, mask=is_value)


def rope_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`rope.rope_and_store`."""
    num_tokens, num_kv, head_dim = qkv.shape[0], k.shape[1], k.shape[3]
    assert all(x.is_contiguous() for x in (qkv, cos, sin, slot, position))
    assert qkv.shape[1] == (num_heads + 2 * num_kv) * head_dim
    assert k.stride() == v.stride()
    assert k.stride(3) == 1
    assert qkv.dtype == k.dtype == v.dtype
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    half = head_dim // 2
    block = triton.next_power_of_2(half)
    heads = max(1, 512 // block)
    rope_and_store_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv, heads))](
        qkv,
        cos,
        sin,
        q,
        k,
        v,
        slot,
        position,
        num_heads,
        num_kv,
        k.stride(0),
        k.stride(1),
        k.stride(2),
        HALF=half,
        BLOCK_HALF=block,
        HEADS=heads,
        num_warps=4,
    )
    return q
