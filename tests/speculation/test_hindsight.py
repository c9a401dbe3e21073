"""What a wide draft says of narrow ones is what drafting narrow says, on heads that are random but always the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.speculation.hindsight import KEPT_ROWS, Explored, Hindsight, truncate


class Beam:
    """One row drafted as `engines/torch/forest.py` does, from a head whose answer hangs on the path alone.

    `names` are the candidates' tokens from the root; `left` those candidates that were not expanded.
    """

    def __init__(self, seed: int, width: int, levels: int, peak: float = 1.0) -> None:
        self.names: list[tuple[int, ...]] = []
        self.score: list[float] = []
        self.parent: list[int] = []
        beam, self.expanded = [-1], {()}
        for level in range(levels):
            first = len(self.names)
            for node in beam:
                above, score = (self.names[node], self.score[node]) if level else ((), 0.0)
                rng = np.random.default_rng([seed, *above])
                logits = rng.normal(0, peak, 8).round(1)  # rounded, for ties
                logp = np.log(np.exp(logits) / np.exp(logits).sum())
                for token in np.argsort(-logp, kind="stable")[:4].tolist():
                    self.names.append((*above, token))
                    self.score.append(score + float(logp[token]))
                    self.parent.append(node)
            made = np.argsort(-np.array(self.score[first:]), kind="stable")[:width]
            beam = (first + made).tolist()
            if level + 1 < levels:
                self.expanded |= {self.names[node] for node in beam}


def stacked(beams: list[Beam]):
    """`score`, `parent`, `depth` [B, P] of rows drafted alike."""
    score, parent = (np.array([getattr(beam, name) for beam in beams]) for name in ("score", "parent"))
    return score, parent, np.array([[len(name) for name in beam.names] for beam in beams])


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5))
def test_a_wide_draft_tells_what_a_narrow_one_would_have_found(seed, width, levels):
    seeds = range(seed, seed + 3)
    wide = [Beam(s, 4, levels) for s in seeds]
    for row, beam, s in zip(truncate(*stacked(wide), width), wide, seeds, strict=True):
        narrow = Beam(s, width, levels)
        drafted = dict(zip(narrow.names, narrow.score, strict=True))
        found = {beam.names[i]: beam.score[i] for i in np.flatnonzero(row)}
        lost = narrow.expanded - beam.expanded
        # Nothing is made up; only what lies below nodes that the wide beam did not expand is missing.
        assert found == {
            name: score for name, score in drafted.items() if not any(name[: len(p)] == p for p in lost - {name})
        }
        if not lost:
            assert found == drafted


def test_little_is_lost_in_hindsight():
    """With a head about as sure of itself as trained ones, 3 % of the probability below the root."""
    known = drafted = 0.0
    for seed in range(60):
        wide = Beam(seed, 4, 5, peak=3.0)
        for width in (1, 2):
            known += np.exp(wide.score)[truncate(*stacked([wide]), width)[0]].sum()
            drafted += np.exp(Beam(seed, width, 5, peak=3.0).score).sum()
    assert 0.97 * drafted < known <= drafted * (1 + 1e-9)


def recorded(seeds, levels=3):
    hindsight = Hindsight([1, 2, 4])
    beams = [Beam(s, 4, levels) for s in seeds]
    score, parent, depth = stacked(beams)
    hindsight.record(Explored(lambda: np.exp(score), score, parent, depth))
    return hindsight, np.exp(score), (score, parent, depth)


@pytest.mark.parametrize(("depth", "width"), [(1, 1), (3, 1), (2, 2), (3, 4)])
def test_the_likeliest_nodes_of_all_rows_come_first(depth, width):
    hindsight, path, draft = recorded(range(5))
    falling = np.sort(path[truncate(*draft, width) & (draft[2] <= depth)])[::-1]
    nodes, tokens = hindsight.tokens(depth, width, 5)
    assert nodes.tolist() == list(range(5, 5 + len(falling) + 1))
    assert tokens == pytest.approx(5 + np.cumsum([0, *falling]))


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.just(0.0) | st.floats(0.01, 0.9))
def test_even_trees_have_each_rows_likeliest_nodes(seed, width, depth, floor):
    hindsight, path, draft = recorded(range(seed, seed + 5))
    expected = np.zeros(3)
    for row in range(5):
        own = np.where(truncate(*draft, width)[row], path[row], 0)
        for level in range(1, depth):
            if own[draft[2][row] == level].max() < floor:
                own[draft[2][row] > level] = 0
        expected += np.sort(own[draft[2][row] <= depth])[::-1][:3].cumsum()
    nodes, tokens = hindsight.even_tokens(depth, width, 10, floor)
    assert nodes.tolist() == [20, 30, 40]
    assert tokens == pytest.approx(10 + 2 * expected)


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.floats(0.01, 0.9))
def test_unlikely_rows_are_drafted_no_deeper(seed, width, depth, floor):
    hindsight, path, draft = recorded(range(seed, seed + 5), levels=4)
    found = truncate(*draft, width)
    tokens, going = [], [0] * (depth - 1)
    for row in range(5):
        for level in range(1, depth + 1):
            here = path[row][found[row] & (draft[2][row] == level)]
            tokens += here.tolist()
            if here.max() < floor or level == depth:
                break
            going[level - 1] += 1
    expected = 5 + np.cumsum([0, *sorted(tokens, reverse=True)])
    assert hindsight.tokens(depth, width, 5, floor)[1] == pytest.approx(expected)
    assert hindsight.going_on(depth, width, floor) == [num / 5 for num in going]


def test_rows_scale():
    hindsight, _, _ = recorded(range(4))
    nodes, tokens = hindsight.tokens(3, 4, 4)
    for rows in (1, 12):
        others, scaled = hindsight.tokens(3, 4, rows)
        assert scaled / rows == pytest.approx(np.interp(others / rows, nodes / 4, tokens / 4))
        assert scaled[-1] / rows == pytest.approx(tokens[-1] / 4)


def test_many_nodes_are_looked_at_in_strides():
    hindsight, _, _ = recorded(range(4))
    few, exact = hindsight.tokens(3, 4, 4)
    many, tokens = hindsight.tokens(3, 4, 400)
    assert len(many) <= 513
    assert (np.diff(many) >= 1).all()
    assert tokens == pytest.approx(100 * np.interp(many / 100, few, exact))


def test_candidates_of_no_use_are_none():
    hindsight, path, (score, parent, depth) = recorded(range(2))
    other = Hindsight([4])
    other.record(Explored(lambda: np.where(depth > 1, 0, path), score, parent, depth))
    assert len(other.tokens(3, 4, 2)[0]) == len(hindsight.tokens(1, 4, 2)[0])


def test_the_newest_rows_are_kept():
    hindsight = Hindsight([1])
    draft = np.zeros((100, 1)), np.full((100, 1), -1), np.ones((100, 1), int)
    for p in (0.1, 0.2, 0.4, 0.8):
        hindsight.record(Explored(lambda p=p: np.full((100, 1), p), *draft))
    assert KEPT_ROWS <= hindsight.num_rows == 200
    assert hindsight.tokens(1, 1, 200)[1][-1] == pytest.approx(200 + 100 * (0.4 + 0.8))
    assert hindsight.depth == 1


def test_drafts_are_valued_by_what_is_known_now():
    hindsight, known = Hindsight([1]), 0.5
    hindsight.record(
        Explored(lambda: np.full((4, 1), known), np.zeros((4, 1)), np.full((4, 1), -1), np.ones((4, 1), int))
    )
    assert hindsight.tokens(1, 1, 4)[1][-1] == pytest.approx(4 + 4 * 0.5)
    known = 0.25
    hindsight.revalue()
    assert hindsight.tokens(1, 1, 4)[1][-1] == pytest.approx(4 + 4 * 0.25)


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_what_was_looked_up_counts_once_beside_every_shape(seed, width, depth):
    """As what the head drafted where the shape has it, and else for itself."""
    rng, hindsight = np.random.default_rng(seed), Hindsight([1, 2, 4])
    beams = [Beam(s, 4, 3) for s in range(seed, seed + 5)]
    score, parent, level = stacked(beams)
    twin = np.full((5, 3), -1)
    for row, beam in enumerate(beams):  # a path of the draft, or the first part of one
        node = int(rng.integers(len(beam.names)))
        names = [beam.names[node][: i + 1] for i in range(len(beam.names[node]) - int(rng.integers(2)))]
        twin[row, : len(names)] = [beam.names.index(name) for name in names]
    looked_up = np.where(twin >= 0, np.take_along_axis(np.exp(score), twin, 1), 0.01)
    alone = rng.uniform(0.01, 1, looked_up.shape)
    value = np.concatenate([np.exp(score), looked_up, alone], 1)
    hindsight.record(Explored(lambda: value, score, parent, level, twin))
    assert hindsight.looks_up
    had = truncate(score, parent, level, width) & (level <= depth)
    tokens = np.exp(score)[had].tolist()
    for row in range(5):
        beside = [i for i in range(3) if twin[row, i] < 0 or not had[row, twin[row, i]]]
        tokens += (looked_up if depth else alone)[row, beside].tolist()
    expected = 5 + np.cumsum([0, *sorted(tokens, reverse=True)])
    assert hindsight.tokens(depth, width, 5)[1] == pytest.approx(expected)
