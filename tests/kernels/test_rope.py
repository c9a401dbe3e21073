from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from batchgen_kernels.rope import rope_and_store, signed

NAN = float("nan")


def pools(slots, num_kv, length, head_dim, dtype, device):
    """Key and value pools of one layer, full of NaN, cut from longer ones of several layers."""
    whole = torch.full((2, 3, slots, num_kv, length + 5, head_dim), NAN, dtype=dtype, device=device)
    return whole[0, 1, :, :, :length], whole[1, 1, :, :, :length], whole


def rotary(num_tokens, head_dim, g):
    """Cosines and sines of random positions, both halves of a head alike."""
    angle = torch.randint(0, 4000, (num_tokens, 1), generator=g) * 10000.0 ** (-torch.arange(head_dim // 2) / head_dim)
    return torch.cat((angle, angle), 1).cos(), torch.cat((angle, angle), 1).sin()


def places(num_tokens, slots, length, g):
    """Distinct (slot, position) pairs, some of them padding."""
    cell = torch.randperm(slots * length, generator=g)[:num_tokens]
    padding = torch.rand(num_tokens, generator=g) < 0.2
    return torch.where(padding, -1, cell // length), cell % length


@given(
    st.integers(1, 12),
    st.sampled_from([(32, 8, 128), (9, 3, 64), (4, 1, 96), (2, 2, 16)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
@settings(max_examples=20)
def test_the_kernel_computes_the_reference(device, num_tokens, heads, dtype, seed):
    num_heads, num_kv, head_dim = heads
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv) * head_dim, generator=g).to(device, dtype)
    cos, sin = (t.to(device, dtype) for t in rotary(num_tokens, head_dim, g))
    signed(sin)
    slot, position = (t.to(device) for t in places(num_tokens, 3, 20, g))
    k, v, _ = pools(3, num_kv, 20, head_dim, dtype, device)
    k2, v2, _ = pools(3, num_kv, 20, head_dim, dtype, device)
    q = rope_and_store(qkv, cos, sin, k, v, slot, position, num_heads)
    q2 = rope_and_store.__wrapped__(qkv, cos, sin, k2, v2, slot, position, num_heads)
    # The same roundings in the same order; a GPU may fuse a float32 product into the sum, which spares one of them.
    close = {"rtol": 0, "atol": 0 if dtype is torch.bfloat16 else 1e-6}
    torch.testing.assert_close(q, q2, **close)
    torch.testing.assert_close(k, k2, equal_nan=True, **close)
    torch.testing.assert_close(v, v2, equal_nan=True, rtol=0, atol=0)


def test_padding_and_neighbours_are_left_alone(device):
    g = torch.Generator().manual_seed(0)
    k, v, whole = pools(3, 2, 20, 32, torch.float32, device)
    cos, sin = (t.to(device) for t in rotary(4, 32, g))
    qkv = torch.randn(4, (4 + 4) * 32, generator=g).to(device)
    slot, position = torch.tensor([2, -1, 0, -7], device=device), torch.tensor([19, 3, 0, 4], device=device)
    q = rope_and_store(qkv, cos, sin, k, v, slot, position, 4)
    assert not q.isnan().any()
    for pool in (k, v):
        assert not pool[2, :, 19].isnan().any()
        assert not pool[0, :, 0].isnan().any()
    assert int((~whole.isnan()).sum()) == 2 * 2 * 2 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_transformers(dtype):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(6, n, 64, generator=g).to(dtype) for n in (8, 2, 2))
    cos, sin = (t.to(dtype) for t in rotary(6, 64, g))
    k_pool, v_pool, _ = pools(6, 2, 1, 64, dtype, torch.device("cpu"))
    slot, position = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    qkv = torch.cat((q, k, v), 1).view(6, -1)
    ours = rope_and_store.__wrapped__(qkv, cos, signed(sin.clone()), k_pool, v_pool, slot, position, 8)
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    assert torch.equal(ours, theirs[0])
    assert torch.equal(k_pool[:, :, 0], theirs[1])
    assert torch.equal(v_pool[:, :, 0], v)
