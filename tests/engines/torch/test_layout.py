"""However unlike the tiles of a pass are, each token's attention is that of a dense mask."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engines.torch.layout import Heads, Layout, Tile
from batchgen_kernels.attend import tree_attend_reference
from batchgen_kernels.tree_attention import tree_attention

HEADS = Heads(6, 2, torch.float32, torch.device("cpu"))
SLOTS, LENGTH, HEAD_SIZE = 40, 160, 8


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3) | st.integers(0, 64), min_size=1, max_size=SLOTS).filter(any), st.randoms())
def test_tiles_of_any_widths_are_dense_attention(counts, dice):
    """Counts of 0 are slots without a tile; a wide tile among narrow ones is computed in two parts."""
    tiles, num = [], 0
    for slot, count in enumerate(counts):
        if count:
            bits = [1]
            for node in range(1, count):
                bits.append(bits[dice.randrange(node)] | 1 << node)
            prefix = dice.randrange(LENGTH - 64)
            tiles.append(Tile(num, slot, prefix, bits, list(range(count)), [prefix] * count))
            num += count
    torch.manual_seed(0)
    q, k, v = torch.randn(num, 6, HEAD_SIZE), *torch.randn(2, SLOTS, 2, LENGTH, HEAD_SIZE)
    layout = Layout.of(tiles, [], HEADS)
    rows = torch.tensor([(t.slot, t.start, len(t.bits), t.prefix) for t in tiles]).T
    bits = torch.tensor([b - (b >> 63 << 64) for tile in tiles for b in tile.bits])
    dense = tree_attend_reference(q, k, v, *rows, bits, 0.3, None, layout.position_N)
    torch.testing.assert_close(tree_attention(q, k, v, layout.tiles, layout.spans, 0.3), dense)
