"""Trees hold their promises whatever the head says, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engines.torch import forest
from batchgen.engines.torch.forest import Candidates, Forest, Shape


@st.composite
def candidates(draw):
    """Candidates as `grow` makes them: level by level, children of the best, log-probabilities from a coarse grid."""
    width, levels, rows = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    steps = st.sampled_from([0.0, 0.0, -0.5, -1.0])  # zeros: a child that ties with its parent
    columns: dict[str, list] = {"score": [], "token": [], "parent": [], "depth": []}
    for _ in range(rows):
        score, parent, depth = (
            [sorted((draw(steps) for _ in range(width)), reverse=True)],
            [[-1] * width],
            [[1] * width],
        )
        beam, offset = list(range(width)), 0
        for level in range(2, levels + 1):
            flat = [s for part in score for s in part]
            offset = len(flat)
            made = [(flat[b] + d, b) for b in beam for d in sorted((draw(steps) for _ in range(width)), reverse=True)]
            score.append([s for s, _ in made])
            parent.append([b for _, b in made])
            depth.append([level] * len(made))
            order = sorted(range(len(made)), key=lambda i: -made[i][0])[:width]
            beam = [offset + i for i in order]
        columns["score"].append([s for part in score for s in part])
        columns["parent"].append([p for part in parent for p in part])
        columns["depth"].append([d for part in depth for d in part])
        columns["token"].append(list(range(100, 100 + len(columns["score"][-1]))))
    caps = draw(st.lists(st.integers(0, levels), min_size=rows, max_size=rows))
    score, token, parent, depth = (torch.tensor(columns[name]) for name in ("score", "token", "parent", "depth"))
    unused = torch.zeros_like(token)
    made = Candidates(score, logp=score, rank=unused, token=token, parent=parent, depth=depth)
    return made, torch.tensor(caps), draw(st.integers(1, 20))


@given(candidates(), st.integers(0, 2))
def test_a_tree_is_connected_ordered_and_the_likeliest_of_its_size(made, plain):
    """Every row that drafts stands behind `plain` rows that do not."""
    pool, caps, nodes = made
    rows = range(plain, len(caps) * (plain + 1), plain + 1)
    planted = Forest.of(pool, forest.likeliest(pool, caps, nodes), rows, list(range(7, 7 + rows.stop)))
    assert planted.token_N[planted.start_R].tolist() == list(range(7, 7 + rows.stop))
    assert planted.row_N.tolist() == np.repeat(range(rows.stop), planted.counts()).tolist()
    assert (np.delete(planted.counts(), rows) == 1).all()
    for b, row in enumerate(rows):
        usable = [i for i in range(pool.score.shape[1]) if pool.depth[b, i] <= caps[b]]
        start, count = int(planted.start_R[row]), int(planted.counts()[row])
        assert count - 1 == min(nodes, len(usable))
        here = slice(start, start + count)
        parents, depths, bits = (each[here].tolist() for each in (planted.parent_N, planted.depth_N, planted.bits_N))
        assert (parents[0], depths[0], bits[0], planted.candidate_N[start]) == (-1, 0, 1, -1)
        picked = (planted.token_N[here][1:] - 100).tolist()
        assert planted.candidate_N[here][1:].tolist() == picked
        for node, candidate in enumerate(picked, 1):
            parent = int(pool.parent[b, candidate])
            above = parents[node] - start
            assert above == (0 if parent < 0 else picked.index(parent) + 1)
            assert above < node, "a parent comes before its children"
            assert depths[node] == depths[above] + 1 <= caps[b]
            assert bits[node] == bits[above] | 1 << node, "sees its ancestors and itself only"
        best = sorted((float(pool.score[b, i]) for i in usable), reverse=True)[:nodes]
        assert sorted((float(pool.score[b, i]) for i in picked), reverse=True) == best


def test_a_plain_step_is_trees_of_their_roots():
    roots = Forest.of_roots([5, 6])
    assert roots.token_N.tolist() == [5, 6]
    assert roots.counts().tolist() == roots.bits_N.tolist() == [1, 1]
    assert roots.parent_N.tolist() == roots.candidate_N.tolist() == [-1, -1]
    assert roots.row_N.tolist() == [0, 1]
    assert roots.depth_N.tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(2, 4, 64), (17, 4, 20)])
def test_a_tree_that_no_tile_holds_is_refused(shape):
    with pytest.raises(ValueError, match="64"):
        Shape(*shape)
