from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen_kernels.compaction import compact


@st.composite
def moves(draw, slots=4, length=24):
    """Moves as the contract has them: ascending within a slot, slots in any interleaving, padding in between."""
    queues = []
    for slot in draw(st.lists(st.integers(0, slots - 1), unique=True, max_size=slots)):
        source = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=9)))
        destination, floor = [], -1
        for at in source:
            floor = draw(st.integers(floor + 1, at))
            destination.append(floor)
        queues.append([(slot, s, d) for s, d in zip(source, destination, strict=True)])
    queues.append([(-1, draw(st.integers(0, 99)), draw(st.integers(0, 99)))] * draw(st.integers(0, 4)))
    order = draw(st.permutations([i for i, queue in enumerate(queues) for _ in queue]))
    return [queues[i].pop(0) for i in order]


def one_by_one(pool, todo):
    for slot, source, destination in todo:
        if slot >= 0:
            pool[:, slot, :, destination] = pool[:, slot, :, source]


@given(moves(), st.sampled_from([(1, 1, 16), (2, 3, 48), (5, 2, 128)]))
@settings(max_examples=25)
def test_kernel_and_reference_move_one_by_one(device, todo, shape):
    layers, num_kv, head_dim = shape
    size = (2, layers, 4, num_kv, 24, head_dim)
    whole = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    expected, plain = whole.clone(), whole.clone()
    for pool in expected:
        one_by_one(pool, todo)
    columns = torch.tensor(todo, dtype=torch.int64, device=device).view(-1, 3).unbind(1)
    columns = [c.contiguous() for c in columns]
    compact.__wrapped__(*plain, *columns)
    assert torch.equal(plain, expected)
    compact(*whole, *columns)
    assert torch.equal(whole, expected)


def test_a_shift_by_one_overlaps_all_the_way(device):
    pool = torch.arange(24.0, device=device).view(1, 1, 1, 24, 1).repeat(3, 2, 2, 1, 16)
    keys, values = pool.clone(), pool.clone() + 100
    source = torch.arange(3, 24, device=device)
    compact(keys, values, torch.ones_like(source), source, source - 1)
    assert keys[0, 1, 0, :, 0].tolist() == [0, 1, *range(3, 24), 23]
    assert torch.equal(values[:, 1], keys[:, 1] + 100)
    assert torch.equal(keys[:, 0], pool[:, 0])
