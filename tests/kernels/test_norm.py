from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from batchgen_kernels.norm import rms_norm, rms_norm_reference

# A sum of squares in another order moves the scale by some 2^-24 * log2(width); in bfloat16 that may tip one rounding
# before the weight and one after it, each of which is worth 2^-8 at most, relative.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}

shapes = st.tuples(st.integers(1, 20), st.sampled_from([1, 64, 128, 576, 1000]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def draw(rows, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, rows, width, generator=g).to(dtype)
    return x, torch.randn(width, generator=g).to(dtype), residual


@given(shapes, dtypes, st.booleans(), st.integers(0, 99))
@settings(max_examples=20)
def test_the_kernel_computes_the_reference(device, shape, dtype, has_residual, seed):
    x, weight, residual = (t.to(device) for t in draw(*shape, dtype, seed))
    residual = residual if has_residual else None
    out = torch.full_like(x, float("nan"))
    normed, summed = rms_norm(x, weight, 1e-5, residual, out_NH=out)
    expected, expected_sum = rms_norm_reference(x, weight, 1e-5, residual)
    assert normed is out
    torch.testing.assert_close(normed, expected, rtol=CLOSE[dtype], atol=1e-7)
    assert torch.equal(summed, expected_sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_transformers(dtype):
    x, weight, residual = draw(7, 576, dtype, 0)
    theirs = LlamaRMSNorm(576, eps=1e-5)
    theirs.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        assert torch.equal(rms_norm_reference(x, weight, 1e-5)[0], theirs(x))
        assert torch.equal(rms_norm_reference(x, weight, 1e-5, residual)[0], theirs(x + residual))


def test_the_reference_is_the_formula_in_float64():
    x, weight, _ = (t.double() for t in draw(5, 100, torch.float32, 1))
    expected = weight * x / ((x**2).mean(-1, keepdim=True) + 1e-5) ** 0.5
    torch.testing.assert_close(rms_norm_reference(x, weight, 1e-5)[0], expected, rtol=1e-12, atol=0)
    single = rms_norm_reference(x.float(), weight.float(), 1e-5)[0]
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_heads_of_a_merged_row_are_normed_in_place(device, head_dim):
    # What Qwen3 needs between its QKV projection and RoPE: norms of query and key heads, values left alone.
    qkv = torch.randn(5, (6 + 2 + 2) * head_dim, generator=torch.Generator().manual_seed(2)).to(device)
    before, weight = qkv.clone(), torch.rand(head_dim, device=device)
    heads, old = qkv.view(5, 10, head_dim), before.view(5, 10, head_dim)
    for at in (slice(0, 6), slice(6, 8)):
        rms_norm(heads[:, at], weight, 1e-6, out_NH=heads[:, at])
        expected = rms_norm_reference(old[:, at], weight, 1e-6)[0]
        torch.testing.assert_close(heads[:, at], expected, rtol=2e-6, atol=1e-7)
    assert torch.equal(heads[:, 8:], old[:, 8:])


def test_no_rows(device):
    empty = torch.empty(0, 64, device=device)
    assert rms_norm(empty, torch.ones(64, device=device), 1e-5, empty)[0].shape == (0, 64)
