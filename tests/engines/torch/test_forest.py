"""Trees hold their promises whatever the head says, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engines.torch import forest
from batchgen.engines.torch.forest import Candidates, RowTree, Shape


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


@given(candidates())
def test_a_tree_is_connected_ordered_and_the_likeliest_of_its_size(made):
    pool, caps, nodes = made
    for b, tree in enumerate(forest.trees(pool, forest.likeliest(pool, caps, nodes), [7] * len(caps))):
        usable = [i for i in range(pool.score.shape[1]) if pool.depth[b, i] <= caps[b]]
        assert len(tree.tokens) - 1 == min(nodes, len(usable))
        picked = [token - 100 for token in tree.tokens[1:]]
        assert tree.candidates == picked
        for node, candidate in enumerate(picked, 1):
            parent = int(pool.parent[b, candidate])
            assert tree.parents[node] == (0 if parent < 0 else picked.index(parent) + 1)
            assert tree.parents[node] < node, "a parent comes before its children"
            assert tree.depths[node] == tree.depths[tree.parents[node]] + 1 <= caps[b]
            assert tree.bits[node] == tree.bits[tree.parents[node]] | 1 << node, "sees its ancestors and itself only"
        best = sorted((float(pool.score[b, i]) for i in usable), reverse=True)[:nodes]
        assert sorted((float(pool.score[b, i]) for i in picked), reverse=True) == best


def test_a_plain_step_is_a_tree_of_its_root():
    assert forest.root_only([5]) == [RowTree([5], [0], [0], [1])]


@pytest.mark.parametrize("shape", [(2, 4, 64), (17, 4, 20)])
def test_a_tree_that_no_tile_holds_is_refused(shape):
    with pytest.raises(ValueError, match="64"):
        Shape(*shape)
