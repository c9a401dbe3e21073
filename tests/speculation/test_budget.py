"""The chosen nodes are trees, within every bound, and no other choice is expected to yield more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.speculation.budget import MOST_EVEN, best_ratio, even, select

# Acceptances from a coarse grid, for ties; 1 is the tie of a child with its parent, 0 what may not be used.
ACCEPTANCE = st.sampled_from([0.0, 0.25, 0.5, 0.5, 1.0, 1.0])


@st.composite
def forests(draw, rows=4, candidates=8):
    """`path` [B, P] and `parent` [B, P] of trees in level order: parents never fall from one column to the next."""
    num_rows, num = draw(st.integers(1, rows)), draw(st.integers(0, candidates))
    parent = np.array([draw(st.lists(st.integers(-1, 6), min_size=num, max_size=num)) for _ in range(num_rows)])
    parent = np.sort(parent.reshape(num_rows, num).astype(int), 1)
    parent = np.minimum(parent, np.arange(num) - 1)
    path = np.zeros((num_rows, num + 1), np.float32)
    path[:, -1] = 1  # the root, at parent -1
    for row, column in np.ndindex(num_rows, num):
        path[row, column] = path[row, parent[row, column]] * draw(ACCEPTANCE)
    return path[:, :-1], parent


class Stairs:
    """Seconds that rise by any steps, as passes over padded batches do."""

    def __init__(self, rises: list[float]) -> None:
        self._seconds = np.cumsum([0.5, *rises])

    def __call__(self, num: np.ndarray) -> np.ndarray:
        assert num.dtype == np.int64
        return self._seconds[num]


# More steps than any forest here has nodes.
stairs = st.lists(st.sampled_from([0.0, 0.1, 0.3]), min_size=60, max_size=60).map(Stairs)
throughputs = st.floats(0.1, 20)


def run(path, cost, throughput, *, cap=99, sizes=(), num_roots=None):
    roots = len(path) if num_roots is None else num_roots
    return select(path, num_roots=roots, row_cap=cap, sizes=sizes, cost=cost, throughput=throughput)


def closed(chosen, parent) -> bool:
    with_root = np.column_stack([chosen, np.ones(len(chosen), bool)])
    return bool((np.take_along_axis(with_root, parent, 1) | ~chosen).all())


@given(forests(), stairs, throughputs, st.data())
def test_parents_come_with_their_children_and_every_bound_holds(forest, cost, throughput, data):
    path, parent = forest
    num_rows, num = path.shape
    cap = data.draw(st.integers(0, num + 1))
    sizes = sorted(data.draw(st.sets(st.integers(1, 50), max_size=4)))
    chosen = run(path, cost, throughput, cap=cap, sizes=sizes)
    assert chosen.shape == path.shape
    assert chosen.dtype == bool
    assert closed(chosen, parent)
    assert (path[chosen] > 0).all()
    packed = num_rows + chosen.sum()
    assert (chosen.sum(1) <= cap).all()
    if sizes and max(sizes) >= num_rows:
        assert packed <= max(sizes)
    elif sizes:
        assert packed == num_rows


@given(forests())
def test_even_trees_are_of_each_rows_likeliest_nodes(forest):
    path, parent = forest
    for num_nodes in range(1, MOST_EVEN + 1):
        chosen = even(path, num_nodes)
        assert closed(chosen, parent)
        assert (chosen.sum(1) == np.minimum(np.count_nonzero(path, axis=1), num_nodes)).all()
        likeliest = -np.sort(-path, axis=1)[:, :num_nodes]
        assert np.where(chosen, path, 0).sum(1) == pytest.approx(likeliest.sum(1))


@given(forests(), stairs, throughputs)
def test_no_prefix_is_worth_more(forest, cost, throughput):
    path, _ = forest
    num_rows = len(path)
    chosen = run(path, cost, throughput)
    falling = sorted(path[path > 0].tolist(), reverse=True)
    values = [
        num_rows + sum(falling[:n]) - throughput * cost(np.array([num_rows + n]))[0] for n in range(len(falling) + 1)
    ]
    num = int(chosen.sum())
    assert values[num] == pytest.approx(max(values), abs=1e-6)
    assert path[chosen].sum() == pytest.approx(sum(falling[:num]))


@given(forests(), st.integers(0, 9), stairs, throughputs)
def test_rows_without_a_draft_only_make_the_pass_larger(forest, others, cost, throughput):
    path, _ = forest
    drafted = run(path, lambda num: cost(num + others), throughput)
    assert (run(path, cost, throughput, num_roots=len(path) + others) == drafted).all()


@given(forests(rows=2, candidates=4), stairs, throughputs, st.data())
def test_no_set_of_trees_is_worth_more(forest, cost, throughput, data):
    path, parent = forest
    num_rows, num = path.shape
    cap = data.draw(st.integers(0, num))

    def value(chosen) -> float:
        return num_rows + path[chosen].sum() - throughput * cost(np.array([num_rows + chosen.sum()]))[0]

    sets = (np.array(bits, bool).reshape(path.shape) for bits in itertools.product((0, 1), repeat=path.size))
    allowed = (s for s in sets if closed(s, parent) and (s.sum(1) <= cap).all())
    assert value(run(path, cost, throughput, cap=cap)) == pytest.approx(max(map(value, allowed)), abs=1e-6)


@given(forests(), stairs, throughputs, st.sets(st.integers(1, 40), min_size=1, max_size=5))
def test_a_padded_pass_is_filled_and_paid_for_whole(forest, cost, throughput, sizes):
    path, _ = forest
    num_rows, num_useful = len(path), int((path > 0).sum())
    chosen = run(path, cost, throughput, sizes=sorted(sizes))
    falling = sorted(path[path > 0].tolist(), reverse=True)
    values = {
        size: num_rows + sum(falling[: size - num_rows]) - throughput * cost(np.array([size]))[0]
        for size in sizes
        if size >= num_rows
    }
    filled = {size for size, value in values.items() if value >= max(values.values()) - 1e-6}
    assert int(chosen.sum()) in {min(size - num_rows, num_useful) for size in filled} or (
        not values and chosen.sum() == 0
    )


@given(forests(), stairs)
def test_without_a_throughput_the_best_ratio_of_the_step_is_taken(forest, cost):
    path, _ = forest
    num_rows = len(path)
    chosen = run(path, cost, None)
    gains = num_rows + np.cumsum([0.0, *sorted(path[path > 0].tolist(), reverse=True)])
    ratios = gains / cost(np.arange(num_rows, num_rows + len(gains)))
    assert ratios[chosen.sum()] == pytest.approx(ratios.max())


def test_certain_children_wait_for_their_parents():
    """Everything ties: the three nodes that fit must be the first level of the three rows."""
    path = np.ones((3, 4), np.float32)
    chosen = run(path, lambda num: np.zeros(len(num)), 1.0, sizes=[6])
    assert chosen.tolist() == [[True, False, False, False]] * 3


def test_a_row_cap_keeps_certain_parents_too():
    """More candidates than a sort keeps in place by luck."""
    chosen = run(np.ones((2, 500), np.float32), lambda num: np.zeros(len(num)), 1.0, cap=7)
    assert [np.flatnonzero(row).tolist() for row in chosen] == [list(range(7))] * 2


def test_rows_share_one_budget_unevenly():
    path = np.array([[0.9, 0.8, 0.7, 0.6], [0.3, 0.2, 0.1, 0.05]], np.float32)
    chosen = run(path, lambda num: 0.01 * num, 50.0)  # half a token a node
    assert chosen.sum(1).tolist() == [4, 0]


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.01, 10)), min_size=1, max_size=30))
def test_the_best_ratio_is_dinkelbachs_fixed_point(choices):
    gains, seconds = np.array(choices).T
    throughput = 0.0
    for _ in range(len(choices) + 1):
        best = np.argmax(gains - throughput * seconds)
        throughput = gains[best] / seconds[best]
    assert best_ratio(gains, seconds) == pytest.approx(throughput)
    assert max(gains - best_ratio(gains, seconds) * seconds) == pytest.approx(0, abs=1e-6)
