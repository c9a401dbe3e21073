"""What a row repeats is found where it stands, joined to what the head drafts, and believed as far as it comes true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.speculation.lookup import (
    ALONE,
    BACKED,
    FROM,
    LIKELY,
    LONGEST,
    OTHER,
    PRIOR,
    SURE,
    Found,
    History,
    Kept,
    Merged,
)

FEW_TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def matching(tokens: list[int], place: int) -> int:
    """How many tokens that end at `place` are those at the end, as far as they are counted."""
    longest = min(LONGEST, place + 1)
    return next((n for n in range(longest) if tokens[place - n] != tokens[-1 - n]), longest)


@given(FEW_TOKENS, st.lists(FEW_TOKENS, max_size=4), st.integers(1, 12))
def test_what_followed_the_longest_match_is_found_as_a_row_grows(first, more, most):
    tokens = list(first)
    history = History(tokens)
    for grown in ([], *more):
        tokens += grown
        match, followed = history.follow(most)
        places = [place for place in range(1, len(tokens) - 1) if matching(tokens, place) >= 2][::-1][:8]
        if not places:
            assert (match, followed) == (0, [])
            continue
        best = max(places, key=lambda place: matching(tokens, place))  # of equals the latest
        assert match == matching(tokens, best)
        repeated = list(tokens)
        for i in range(most):  # what follows in a text that goes on as it did there
            repeated.append(repeated[best + 1 + i])
        assert followed == repeated[len(tokens) :]


def of(*rows: tuple[int, list[int]]) -> Found:
    """What was looked up: the tokens that matched, and what followed."""
    return Found(np.array([tokens for _, tokens in rows]), np.array([match for match, _ in rows]))


def says(kind: np.ndarray) -> list[int | None]:
    """What the head said of each, None of what was not looked up or has a twin."""
    return [int(each - 1) % PRIOR.shape[1] if each else None for each in kind]


def test_tokens_that_the_head_drafted_too_are_one_with_these():
    # Below each root 7 and 8, below 7 then 5 and 6; the head is sure of 7, not of 5.
    token, parent = np.array([[7, 8, 5, 6]] * 4), np.array([[-1, -1, 0, 0]] * 4)
    rank, logp = np.array([[0, 1, 0, 1]] * 4), np.log(np.float32([[0.8, 0.1, 0.4, 0.3]] * 4))
    logp[3] = -np.inf  # it did not draft this row
    found = of((2, [7, 5, 1, 1]), (3, [8, 7, 5, 1]), (4, [1, 7, 5, 1]), (5, [7, 5, 1, 1]))
    merged = Merged.of(found, token, parent, rank, logp)
    assert merged.twin.tolist() == [[0, 2, -1, -1], [1, -1, -1, -1], [-1] * 4, [-1] * 4]
    assert says(merged.kind[0]) == [SURE, None, LIKELY, None, None, None, BACKED, BACKED]
    assert says(merged.kind[1]) == [None, OTHER, None, None, None, ALONE, ALONE, ALONE]
    assert says(merged.kind[2]) == [None] * 4 + [OTHER, ALONE, ALONE, ALONE]
    assert says(merged.kind[3]) == [None] * 4 + [ALONE] * 4
    assert merged.rival.tolist() == [[0, 1, 0, 2], [1, 0, 0, 0], [1, 1, 0, 0], [0] * 4]
    assert (merged.alone[3] == merged.kind[3, 4:]).all()
    lengths = [FROM[(each - 1) // PRIOR.shape[1]] for each in merged.kind[3, 4:]]
    assert lengths == [5, 6, 6, 8], "each token ends a match that is one longer"


def test_without_a_head_all_of_it_stands_alone():
    none, number = np.empty((2, 0), np.int64), np.empty((2, 0), np.float32)
    merged = Merged.of(of((2, [7, 5]), (0, [-1, -1])), none, none, none, number)
    assert merged.twin.tolist() == [[-1, -1]] * 2
    assert says(merged.kind[0]) == [ALONE, ALONE]
    assert merged.kind[1].tolist() == [0, 0]


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_a_kind_is_believed_as_far_as_it_came_true(rate):
    kept, kinds = Kept(), np.array([3, 8])
    before = kept.share(kinds)
    for _ in range(200):
        kept.learn(np.array([3, 0]), np.array([rate, 1.0]))
    assert kept.share(kinds)[0] == pytest.approx(rate, abs=0.05)
    assert kept.share(kinds)[1] == before[1]
    assert kept.share(np.array([0]))[0] == 0
