"""Rotary embedding of a merged QKV row, and keys and values into their pools, in one pass over the row.

Half-rotation RoPE over the whole head, as transformers' `apply_rotary_pos_emb`, products and sum each rounded to the
model dtype. Norms of queries and keys come before: `norm.rms_norm` of a view of the row, written back to that view.
Interleaved rotations (GPT-J's) and partial ones are other functions.

Shape legend: N packed tokens, H query heads, K key/value heads, D head size, S slots, L pool length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen_kernels.dispatch import with_kernel

if TYPE_CHECKING:
    import torch


def signed(sin_ND: torch.Tensor) -> torch.Tensor:
    """Sines as `rope_and_store` takes them, once for all layers: their first half negated, in place."""
    sin_ND[..., : sin_ND.shape[-1] // 2].neg_()
    return sin_ND


@with_kernel("triton_rope")
def rope_and_store(
    qkv: torch.Tensor,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    k_SKLD: torch.Tensor,
    v_SKLD: torch.Tensor,
    slot_N: torch.Tensor,
    position_N: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Write rotated keys, and values, to [slot, :, position] of the pools in place; return rotated queries [N, H, D].

    qkv: [N, (H + 2K) * D] contiguous, in the pools' dtype: query heads, then key heads, then value heads
    cos_ND, sin_ND: contiguous, rounded to that dtype if they are wider; sines are `signed`
    slot_N: int64; a token of negative slot is padding and is stored nowhere (its query is computed all the same)
    position_N: int64 places in the pool, which need not be rotary positions; no two tokens share slot and position
    """
    num_kv, head_dim = k_SKLD.shape[1], k_SKLD.shape[3]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv, head_dim)
    qk, v = heads[:, : num_heads + num_kv], heads[:, num_heads + num_kv :]
    rotated = qk * cos_ND.to(qkv.dtype)[:, None]
    rotated += qk.roll(head_dim // 2, -1) * sin_ND.to(qkv.dtype)[:, None]
    queries, k = rotated[:, :num_heads], rotated[:, num_heads:]
    if len(slot_N) and int(slot_N.min()) < 0:
        real = slot_N >= 0
        slot_N, position_N, k, v = slot_N[real], position_N[real], k[real], v[real]
    k_SKLD[slot_N, :, position_N] = k
    v_SKLD[slot_N, :, position_N] = v
    return queries
