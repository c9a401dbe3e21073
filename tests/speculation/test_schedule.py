"""The shape that is drafted is the one that exhaustive evaluation picks, off and on again as it pays."""

from __future__ import annotations

import dataclasses
import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.speculation.budget import MOST_EVEN
from batchgen.speculation.costs import Costs, Table
from batchgen.speculation.hindsight import Explored, Hindsight
from batchgen.speculation.schedule import (
    ARRIVAL_STEPS,
    EXPLORE_ROWS,
    EXPLORE_SHARE,
    EXPLORE_STEPS,
    FIRST_PAUSE,
    FIRST_ROWS,
    FIRST_STEPS,
    FORECAST_STEPS,
    PLAIN,
    REPAY_STEPS,
    STOPPING_ROWS,
    Ahead,
    Draft,
    Plan,
    Schedule,
    Throughput,
)

from .conftest import CHEAP, DEAR, ahead, flat, pools, taken_at_their_word

SMALL = (PLAIN, Draft(1, 1), Draft(2, 1), Draft(3, 1), Draft(2, 2), Draft(3, 2))
STOPS = (Draft(3, 1, 0.4), Draft(3, 2, 0.25))


@st.composite
def costs(draw):
    grid = [1, 4, 8, 16, 64]
    tables = (
        Table(grid, draw(st.lists(st.floats(1e-3, scale), min_size=5, max_size=5)), 1e-6) for scale in (0.1, 0.02, 0.02)
    )
    return Costs(*tables, draw(st.just(1.0) | st.floats(0.5, 1.0)))


def exhaustive(shape, rows, per_token, draft, context, pending, left):
    """The best of every number of nodes, and of as many of each row, by drafting that shape and no more."""
    plain = per_token.verify(rows, context)
    if shape == PLAIN:
        return rows / plain
    value, score, _, level = draft(shape)
    path, levels_s = value(), 0.0
    for depth in range(1, shape.depth):
        going = np.where((level == depth) & (path > 0), np.exp(score), 0).max(1) >= shape.floor
        path[~going] *= level[~going] <= depth
        share = going.mean()  # of the rows that are to come, each by itself
        levels_s += sum(
            comb(rows, num) * share**num * (1 - share) ** (rows - num) * per_token.level(num * shape.width, context)
            for num in range(rows + 1)
        )
    best = -np.inf
    falling = sorted(path[path > 0].tolist(), reverse=True)
    choices = [(num, sum(falling[:num]), 1.0) for num in range(len(falling) + 1)]
    if rows > 1:
        likeliest = -np.sort(-path, axis=1)
        choices += [(rows * num, likeliest[:, :num].sum(), per_token.even) for num in range(1, MOST_EVEN + 1)]
    for num, kept, share in choices:
        tokens = rows + kept
        seconds = share * per_token.verify(rows + num, context) + per_token.extend(tokens, context)
        seconds += levels_s
        debt = per_token.extend(pending, context) - per_token.extend(tokens, context)
        seconds += max(debt, 0) / min(REPAY_STEPS, max(1, left * rows / tokens))
        best = max(best, tokens / seconds)
    return best


@taken_at_their_word
@settings(max_examples=60)
@given(
    st.integers(0, 1000),
    st.integers(1, 5),
    costs(),
    st.integers(0, 4) | st.integers(60, 100),
    st.integers(0, 300),
)
def test_the_choice_is_that_of_exhaustive_evaluation(seed, rows, per_token, max_depth, pending):
    schedule = Schedule(per_token, SMALL + STOPS)
    schedule.record(Explored(*pools(seed, rows, 2, 3)))
    chosen = schedule.choose(ahead(rows, pending, max_depth, 1000)).draft
    allowed = [shape for shape in SMALL if shape.depth <= max_depth]
    if max_depth > 1 and rows <= STOPPING_ROWS:
        allowed += [dataclasses.replace(shape, depth=min(shape.depth, max_depth)) for shape in STOPS]
    assert chosen in allowed
    values = {
        shape: exhaustive(
            shape, rows, per_token, lambda s: pools(seed, rows, s.width, s.depth), 1000, pending, max_depth + 1
        )
        for shape in allowed
    }
    assert values[chosen] == pytest.approx(max(values.values()), rel=1e-6, abs=1e-9)


def test_while_nothing_is_known_some_rows_explore_as_deep_as_is_of_use():
    for rows, cap, deepest in ((4, 9, 6), (4, 3, 3), (64, 9, 6)):
        plan = Schedule(CHEAP).next(ahead(rows, 2 * rows, cap))
        assert (plan.draft, plan.explores) == (Draft(deepest, 4), True)
        assert len(plan.rows) == min(rows, EXPLORE_ROWS)
    assert Schedule(CHEAP).next(ahead(4, 4, 0)).draft == PLAIN


def test_rows_with_little_to_catch_up_on_explore():
    pending = [(7 * i) % 64 for i in range(64)]
    plan = Schedule(CHEAP).next(Ahead(0, pending, [9] * 63 + [2], 0))
    assert sorted(pending[row] for row in plan.rows) == list(range(EXPLORE_ROWS))


@taken_at_their_word
def test_free_drafts_are_large_and_dear_ones_none():
    for per_token, expected in ((CHEAP, 6), (DEAR, 0)):
        schedule = Schedule(per_token)
        schedule.record(Explored(*pools(0, 8, 4, 6, kept=0.95)))
        assert schedule.choose(ahead(8, 8, 100)).draft.depth == expected


@taken_at_their_word
def test_decisions_are_kept_until_something_changes():
    schedule = Schedule(CHEAP)
    schedule.record(Explored(*pools(0, 8, 4, 6)))
    before = schedule.choose(ahead(8, 8, 100)).draft
    schedule._costs = DEAR
    assert {schedule.choose(ahead(8, 8, 100)).draft for _ in range(FORECAST_STEPS - 1)} == {before}
    assert schedule.choose(ahead(8, 8, 100)).draft == PLAIN
    schedule._costs = CHEAP
    schedule.record(Explored(*pools(0, 8, 4, 6)))
    assert schedule.choose(ahead(8, 8, 100)).draft == before
    for _ in range(FIRST_ROWS):
        schedule.record(Explored(*pools(0, 8, 4, 6)))
    schedule.choose(ahead(8, 8, 100))
    schedule._costs = DEAR
    schedule.record(Explored(*pools(0, 8, 4, 6)))
    schedule.revalue()
    assert schedule.choose(ahead(8, 8, 100)).draft == before, "what is learned later waits"


def test_drafting_resumes_when_it_repays_the_catch_up_in_time():
    schedule = Schedule(CHEAP)
    schedule.record(Explored(*pools(0, 8, 4, 6)))
    nodes, tokens = schedule._seen.tokens(6, 4, 8)
    levels = CHEAP.level(np.array(Draft(6, 4).level_tokens(8)), 100).sum()
    step = CHEAP.verify(nodes, 100) + levels + CHEAP.extend(tokens, 100)
    plain_s = CHEAP.verify(8, 100)
    # Seconds of catching up that the largest shape may bear at each of its next steps, and tokens at 1 us each.
    spare_s = (tokens * plain_s / 8 - step).max()
    repaid = int(REPAY_STEPS * spare_s / 1e-6)
    assert spare_s > 0
    assert schedule.choose(ahead(8, int(0.8 * repaid), 1000)).draft != PLAIN
    assert schedule.choose(ahead(8, 4 * repaid, 1000)).draft == PLAIN


@taken_at_their_word
def test_rows_near_their_end_repay_less():
    schedule = Schedule(CHEAP)
    schedule.record(Explored(*pools(0, 8, 4, 6)))
    owed = 40_000
    assert schedule.choose(ahead(8, owed, 1000)).draft != PLAIN
    assert schedule.choose(ahead(8, owed, 7)).draft == PLAIN


@taken_at_their_word
def test_prompts_that_keep_arriving_are_paid_for_whole():
    """40,000 tokens, 40 ms, are worth their while once; in every other step they are not."""
    for every, drafts in ((ARRIVAL_STEPS, True), (2, False)):
        schedule = Schedule(CHEAP)
        schedule.record(Explored(*pools(0, 8, 4, 6)))
        assert schedule.choose(ahead(8, 40_000, 1000)).draft != PLAIN
        for step in range(ARRIVAL_STEPS):
            schedule.next(ahead(8, 40_000, 1000, arrived=40_000 * (step % every == 0)))
        assert (schedule.choose(ahead(8, 40_000, 1000)).draft != PLAIN) == drafts


def test_prompts_that_come_all_at_once_are_paid_for_once():
    """What arrived every 50 steps is as dear as what must be repaid in 50: with both it pays as with either."""
    per_token = dataclasses.replace(CHEAP, extend=flat(0.0, 1e-6))
    burst, every = 50_000, 50
    left = {}
    for arrives in (False, True):
        schedule = Schedule(per_token)
        schedule.record(Explored(*pools(0, 8, 4, 6)))
        for step in range(20 * ARRIVAL_STEPS if arrives else 0):
            schedule.next(ahead(8, 8, 1000, arrived=burst * (step % every == 0)))
        left[arrives] = schedule.choose(ahead(8, burst, every)).worth
    assert left[True] == pytest.approx(left[False], rel=0.05)


class World:
    """A job whose costs are as measured and whose drafts are kept with one probability; counts what exploring added."""

    def __init__(self, schedule, per_token, rows):
        self.schedule, self.costs, self.rows = schedule, per_token, rows
        self.pending = [1] * rows
        self.seconds = self.extra_s = self.first_s = 0.0

    def steps(self, num, kept, cap=500):
        """The shape and whether it explored, of each step."""
        truth = Hindsight([1, 2, 4])
        truth.record(Explored(*pools(0, 64, 4, 6, kept)))
        for step in range(num):
            due = Ahead(1000, self.pending, [cap] * self.rows, 0)
            usual = self.schedule.choose(due).draft
            plan = self.schedule.next(due)
            if plan.explores:
                self.schedule.record(Explored(*pools(step, len(plan.rows), 4, 6, kept)))
                tokens, seconds = self._step(plan, truth)
                usual_tokens, usual_s = self._step(Plan(usual, range(self.rows), explores=False), truth)
                self.extra_s += seconds - usual_s * (1.0 if usual == PLAIN else tokens / usual_tokens)
            self.first_s = self.first_s if step >= FIRST_STEPS else self.extra_s
            tokens, seconds = self._step(plan, truth)
            self.pending = [num + 1 for num in self.pending]
            if plan.draft != PLAIN:
                drafted = (tokens - self.rows) / len(plan.rows) + 1
                self.pending = [round(drafted) if row in plan.rows else num for row, num in enumerate(self.pending)]
            self.seconds += seconds
            self.schedule.spent(seconds)
            yield plan.draft, plan.explores

    def _drafting_s(self, shape, rows):
        levels = sum(self.costs.level(num, 1000) for num in shape.level_tokens(len(rows)))
        return levels + self.costs.extend(sum(self.pending[row] for row in rows), 1000) if shape.depth else 0.0

    def _step(self, plan, truth):
        drafting = list(plan.rows) if plan.draft != PLAIN else []
        others = self.rows - len(drafting)
        nodes, tokens = np.array([0]), np.array([0.0])
        if drafting:
            nodes, tokens = truth.tokens(plan.draft.depth, plan.draft.width, len(drafting))
        seconds = self.costs.verify(nodes + others, 1000) + self._drafting_s(plan.draft, drafting)
        best = np.argmax((tokens + others) / seconds)
        return float((tokens + others)[best]), float(seconds[best])


@taken_at_their_word
def test_exploring_costs_its_share_and_finds_when_drafting_pays_again():
    per_token = Costs(flat(0.01, 1e-5), flat(1e-3), flat(1e-3, 1e-6))
    world = World(Schedule(per_token), per_token, rows=64)
    dull = list(world.steps(1200, kept=0.1))
    explored = [i for i, (_, explored) in enumerate(dull) if explored]
    assert {shape for shape, explored in dull if not explored} == {PLAIN}
    assert explored[:FIRST_STEPS] == list(range(FIRST_STEPS))
    assert len(explored) > FIRST_STEPS + 4
    assert world.extra_s - world.first_s <= EXPLORE_SHARE * world.seconds
    assert min(b - a for a, b in itertools.pairwise(explored[FIRST_STEPS - 1 :])) >= EXPLORE_STEPS
    before = world.extra_s
    bright = [shape for shape, explored in world.steps(1200, kept=0.98) if not explored]
    resumed = next(i for i, shape in enumerate(bright) if shape != PLAIN)
    assert 0 < resumed < 600
    assert bright[resumed:].count(PLAIN) <= (len(bright) - resumed) / 50  # to compare with
    assert world.extra_s - before <= EXPLORE_SHARE * world.seconds


def test_the_first_rows_of_a_small_batch_are_all_explored():
    schedule = Schedule(CHEAP)
    num = FIRST_ROWS * FIRST_PAUSE
    steps = World(schedule, CHEAP, rows=1).steps(num, kept=0.9)
    explored = [i for i, (_, explored) in enumerate(steps) if explored]
    assert explored == [*range(FIRST_STEPS), *range(FIRST_STEPS - 1 + FIRST_PAUSE, num, FIRST_PAUSE)][:FIRST_ROWS]


def test_rows_near_their_end_are_not_explored():
    schedule = Schedule(CHEAP)
    for seed in range(FIRST_STEPS):
        schedule.record(Explored(*pools(seed, 16, 4, 6)))
    schedule.spent(1e6)
    assert not any(schedule.next(ahead(16, 16, 3)).explores for _ in range(100))
    assert schedule.next(ahead(16, 16, 0)) == Plan(PLAIN, range(16), explores=False)
    assert schedule.next(ahead(16, 16, 6)).explores


def test_savings_are_not_carried_over():
    schedule = Schedule(CHEAP)
    for seed in range(FIRST_STEPS):
        schedule.record(Explored(*pools(seed, 16, 4, 6)))
    schedule.spent(1e6)
    due = ahead(16, 10**6, 6, 0)
    assert [schedule.next(due).explores for _ in range(100)].count(True) == 1


def test_throughput_is_tokens_over_seconds_of_like_batches():
    throughput = Throughput()
    for _ in range(3):
        throughput.seen(64, 100, 2.0)
        assert throughput.value(64, 0.1) is None
    throughput.seen(63, 200, 2.0)
    assert 50 < 0.1 * throughput.value(40, 0.1) < 65
    assert throughput.value(32, 0.1) is None
    for _ in range(1000):
        throughput.seen(64, 10, 1.0)
    assert throughput.value(64, 0.5) == pytest.approx(20, rel=1e-3)
