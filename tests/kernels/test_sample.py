from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen_kernels import triton_sample
from batchgen_kernels.gumbel import gumbel_noise, position_words
from batchgen_kernels.sample import gumbel_argmax

INF = float("inf")
M32 = 0xFFFFFFFF


def words(keys, device):
    """First and second words of (key, position) pairs."""
    first, second = zip(*(position_words(*pair) for pair in keys), strict=True)
    return torch.tensor(first, device=device), torch.tensor(second, device=device)


def scores(logits, temperature, threshold, keys):
    """One row's noisy scores, from gumbel_noise itself."""
    scaled = logits.float() / temperature
    noisy = scaled + gumbel_noise(*keys, torch.arange(len(logits)))
    return torch.where(scaled >= threshold, noisy, -INF)


@st.composite
def batches(draw):
    rows, vocab = draw(st.integers(1, 4)), draw(st.sampled_from([1, 7, 2048, 2049, 9000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = (3 * torch.randn(rows, vocab, generator=g)).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    temperature = torch.tensor([draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5])) for _ in range(rows)])
    kept = [draw(st.sampled_from([1, 5, vocab])) for _ in range(rows)]
    scaled = logits.float() / temperature.clamp(min=0.1)[:, None]
    threshold = [-INF if k >= vocab else float(s.topk(k).values[-1]) for s, k in zip(scaled, kept, strict=True)]
    keys = [(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 5000))) for _ in range(rows)]
    return logits, temperature, torch.tensor(threshold), keys


@given(batches(), st.sampled_from([1, 9, 1056]))
@settings(max_examples=40)
def test_kernel_and_reference_draw_by_gumbel_noise(device, batch, programs):
    logits, temperature, threshold, keys = batch
    expected = gumbel_argmax.__wrapped__(logits, temperature, threshold, *words(keys, "cpu"))
    on_device = (t.to(device) for t in (logits, temperature, threshold))
    with pytest.MonkeyPatch.context() as patch:
        # From one stretch that is the whole vocabulary to one for each tile.
        patch.setattr(triton_sample, "_PROGRAMS", programs)
        tokens = gumbel_argmax(*on_device, *words(keys, device)).cpu()
    for r in range(len(logits)):
        if temperature[r] == 0:
            assert tokens[r] == expected[r] == logits[r].argmax()
            continue
        row = scores(logits[r], temperature[r], threshold[r], keys[r])
        assert expected[r] == row.argmax()
        # Logarithms differ by an ulp or two of scores up to 30: another token only where the two tie to within that.
        assert row[tokens[r]] >= row.max() - 1e-5


@pytest.mark.parametrize("programs", [1, 1056], ids=["one stretch", "a stretch a tile"])
def test_of_equal_maxima_the_first(device, monkeypatch, programs):
    monkeypatch.setattr(triton_sample, "_PROGRAMS", programs)
    # Ties within a lane, across lanes, across tiles, and a maximum in the last partial tile.
    logits = torch.zeros(4, 5000, device=device, dtype=torch.bfloat16)
    for row, places in enumerate([(3, 2051), (100, 101, 4999), (2047, 2048), (4999,)]):
        logits[row, list(places)] = 2.0
    zeros = torch.zeros(4, dtype=torch.int64, device=device)
    cold = torch.zeros(4, device=device)
    assert gumbel_argmax(logits, cold, cold, zeros, zeros).tolist() == [3, 100, 2047, 4999]
    # A temperature of 0 heeds nothing else.
    assert gumbel_argmax(logits, cold, cold + INF, zeros + 7, zeros + 9).tolist() == [3, 100, 2047, 4999]


def test_the_last_survivor_is_not_lost_to_rounding(device):
    # 0.7 is where logits / t and logits * (1 / t) differ most often; each row keeps its maximum only.
    logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(5)).to(device)
    heat = torch.full((16,), 0.7, device=device)
    threshold = (logits / heat[:, None]).amax(1)
    first, second = words([(r, r) for r in range(16)], device)
    assert torch.equal(gumbel_argmax(logits, heat, threshold, first, second), logits.argmax(1))


def unmixed(x):
    """What gumbel._mix32 maps to `x`."""
    x ^= x >> 16
    x = x * pow(0xC2B2AE35, -1, 2**32) & M32
    x ^= x >> 13 ^ x >> 26
    x = x * pow(0x85EBCA6B, -1, 2**32) & M32
    return x ^ x >> 16


def noise(device, tokens, first, second, vocab):
    """The kernel's noise for one token a row: the score of the row's only token that is not -inf."""
    rows = len(tokens)
    logits = torch.full((rows, vocab), -INF, device=device)
    logits[torch.arange(rows), tokens] = 0.0
    one, none = torch.ones(rows, device=device), torch.full((rows,), -INF, device=device)
    values = torch.full((rows, 1), float("nan"), device=device)
    chosen = torch.full((rows, 1), -1, dtype=torch.int32, device=device)
    tiles = -(-vocab // 512)
    triton_sample.sample_tiles_kernel[(rows, 1)](
        logits, one, none, first, second, values, chosen, vocab, logits.stride(0), tiles, BLOCK_V=512
    )
    assert chosen[:, 0].tolist() == tokens.tolist()
    return values[:, 0].cpu()


def test_the_kernel_s_noise_is_gumbel_noise(device):
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 1500, (64,), generator=g)
    keys = [(int(torch.randint(0, 2**62, (1,), generator=g)), p) for p in range(64)]
    expected = torch.cat([gumbel_noise(*pair, tokens[i : i + 1]) for i, pair in enumerate(keys)])
    found = noise(device, tokens, *words(keys, device), 1500)
    # One wrong bit of the hash would show as a different number altogether.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_noise_is_exact_at_both_ends(device):
    bits = [0, 1, 2, 255, 2**16, 2**23 + 1, 2**31, M32 - 2**16, M32 - 1, M32]
    first = torch.tensor([unmixed(unmixed(b)) for b in bits], device=device)
    zeros = torch.zeros(len(bits), dtype=torch.int64)
    found = noise(device, zeros, first, zeros.to(device), 8)
    # As gumbel_noise rounds it: the sum to float32, and at most 1 - 2^-24.
    v = [min(float(np.float32(np.float32(b) + np.float32(0.5))) * 2.0**-32, 1 - 2.0**-24) for b in bits]
    expected = torch.tensor([-math.log(-math.log1p(-x)) for x in v])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_draws_follow_the_softmax():
    # The reference only, for time: the kernel draws the same tokens.
    p = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02])
    n = 20000
    heat = torch.full((n,), 0.7)
    first, second = torch.randint(0, 2**32, (2, n), generator=torch.Generator().manual_seed(0))
    tokens = gumbel_argmax.__wrapped__((0.7 * p.log()).expand(n, 5), heat, heat - INF, first, second)
    found = tokens.bincount(minlength=5) / n
    assert ((found - p).abs() < 4.5 * (p * (1 - p) / n) ** 0.5).all()


def test_no_rows(device):
    none, words_N = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    assert gumbel_argmax(torch.zeros(0, 9, device=device), none, none, words_N, words_N).shape == (0,)
