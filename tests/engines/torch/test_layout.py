"""However unlike the tiles of a pass are, each token's attention is that of a dense mask."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from batchgen.engines.torch.layout import Heads, Layout, Tiles
from batchgen_kernels.attend import tree_attend_reference
from batchgen_kernels.tree_attention import Span, span_mask, tree_attention

HEADS = Heads(6, 2, torch.float32, torch.device("cpu"))
# In bfloat16 scores of up to 4 are rounded by 2^-7, and so is what they weigh.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-5}
SLOTS, LENGTH, HEAD_SIZE = 40, 160, 8


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 3) | st.integers(0, 64), min_size=1, max_size=SLOTS).filter(any),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.randoms(),
)
@example([1] * SLOTS, torch.bfloat16, random.Random(0))
def test_tiles_of_any_widths_are_dense_attention(counts, dtype, dice):
    """Counts of 0 are slots without a tile; a wide tile among narrow ones is computed in two parts."""
    slots = np.flatnonzero(counts)
    bits = []
    for slot in slots:
        own = [1]
        for node in range(1, counts[slot]):
            own.append(own[dice.randrange(node)] | 1 << node)
        bits += own
    prefix = np.array([dice.randrange(LENGTH - 64) for _ in slots])
    num, count = len(bits), np.array(counts)[slots]
    tiles = Tiles(slots, prefix, count, np.array(bits, np.uint64), np.zeros(num, np.int64))
    torch.manual_seed(0)
    q, k, v = (
        each.to(dtype) for each in (torch.randn(num, 6, HEAD_SIZE), *torch.randn(2, SLOTS, 2, LENGTH, HEAD_SIZE))
    )
    layout = Layout.of(tiles, [], dataclasses.replace(HEADS, dtype=dtype))
    rows = (torch.from_numpy(each) for each in (slots, np.cumsum(count) - count, count, prefix))
    seen = torch.tensor([b - (b >> 63 << 64) for b in bits])
    dense = tree_attend_reference(q.float(), k.float(), v.float(), *rows, seen, 0.3, None, layout.position_N)
    found = tree_attention(q, k, v, layout.tiles, layout.spans, 0.3)
    torch.testing.assert_close(found.float(), dense, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def test_rows_that_grow_make_products_of_few_shapes():
    """oneDNN compiles code for each new one."""
    heads = dataclasses.replace(HEADS, dtype=torch.bfloat16)
    passes = [Layout.of(Tiles.chains(range(8), [seen] * 8, [1] * 8), [], heads) for seen in range(64, 96)]
    assert len({block.mask.shape for each in passes for block in each.tiles.blocks}) == 2


@pytest.mark.parametrize(("prefix", "num"), [(0, 5), (7, 5), (3, 1)])
def test_a_mask_that_is_only_named_is_the_same_mask(prefix, num):
    q, k, v = torch.randn(1, 6, num, 8), *torch.randn(2, 1, 2, prefix + num, 8)
    span = Span(0, num, 0, prefix)
    named = span_mask(span, torch.bfloat16, torch.device("cuda"))
    spelled = span_mask(span, torch.float32, torch.device("cpu"))
    found, expected = (
        scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True) for mask in (named, spelled)
    )
    torch.testing.assert_close(found, expected)


def test_chains_see_all_that_stands_before_them():
    tiles = Tiles.chains([3, 0], [7, 5], [64, 2])
    assert tiles.bits_N.tolist() == [*((2 << t) - 1 for t in range(64)), 1, 3]
    layout = Layout.of(tiles, [Span(66, 68, 1, 9)], HEADS)
    assert layout.slot_N.tolist() == [*[3] * 64, 0, 0, 1, 1]
    assert layout.position_N.tolist() == layout.pool_position_N.tolist() == [*range(7, 71), 5, 6, 9, 10]
