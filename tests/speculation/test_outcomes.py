"""Promises of drafting are held against what became of them, and against plain steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.speculation import outcomes
from batchgen.speculation.costs import Costs, Table
from batchgen.speculation.hindsight import Explored
from batchgen.speculation.schedule import FIRST_ROWS, PLAIN, PLAIN_EVERY, Draft, Schedule

from .conftest import CHEAP, ahead, flat, pools, taken_at_their_word

CHAINS = (PLAIN, Draft(1, 1), Draft(2, 1))


def promising(rows=8):
    """A schedule that is promised 1.5 and 1.7 times as many tokens a second by chains of one and two."""
    schedule = Schedule(CHEAP, CHAINS)
    path, depth = np.tile([0.5, 0.25], (rows, 1)), np.tile([1, 2], (rows, 1))
    for _ in range(FIRST_ROWS):
        schedule.record(Explored(lambda: path, np.log(path), np.tile([-1, 0], (rows, 1)), depth))
    return schedule


def live(schedule, gains, steps, rows=8, wide=1.0):
    """How often each shape was used where its steps really give so many times as many tokens, and the gain of all.

    Steps without a draft verify and give `wide` times as many tokens as bare ones.
    """
    plain_s, tokens, seconds = 0.01, 0.0, 0.0
    used = dict.fromkeys(CHAINS, 0)
    for _ in range(steps):
        due = ahead(rows, rows, 500, 1000)
        draft = schedule.next(due).draft
        width = 1.0 if draft.depth else wide
        gave = rows * width * (1 + draft.depth)
        took = plain_s * gave / rows / ({PLAIN: 1.0} | gains)[draft]
        schedule.timed(draft, gave, took, width * CHEAP.verify(rows, 1000))
        used[draft] += 1
        tokens, seconds = tokens + gave, seconds + took
    return used, tokens / seconds / (rows / plain_s)


@settings(max_examples=10)
@given(st.sampled_from([1, 8, 64]), st.floats(0.5, 1.0), st.lists(st.floats(0.85, 1.0), min_size=2, max_size=2))
def test_promises_that_are_not_kept_cost_little(rows, kept, apart):
    """A job is hardly slower than plain decoding, and than with the better shape, however wrong the forecasts."""
    schedule = promising(rows)
    gains = {Draft(1, 1): 1.5 * kept * apart[0], Draft(2, 1): 1.7 * kept * apart[1]}
    live(schedule, gains, 300, rows)
    _, gain = live(schedule, gains, 1000, rows)
    assert gain > 0.96
    assert gain > 0.9 * max(gains.values())


@pytest.mark.parametrize("wide", [1.0, 2.0], ids=["beside bare steps", "beside looked up tokens"])
def test_a_shape_that_was_given_up_comes_back_when_it_pays(wide):
    schedule = promising()
    used, _ = live(schedule, {Draft(1, 1): 0.8, Draft(2, 1): 0.9}, 1000, wide=wide)
    assert used[PLAIN] > 900
    _, gain = live(schedule, {Draft(1, 1): 0.8, Draft(2, 1): 1.5}, 1000, wide=wide)
    assert gain > 1.3


def test_steps_that_catch_up_on_much_judge_no_shape():
    """Their catch-up takes five times what the costs say, the rest what was promised."""
    schedule = promising()
    before = schedule.choose(ahead(8, 8, 500, 1000)).worth
    for _ in range(50):
        due = ahead(8, 100_000, 500, 1000)
        draft = schedule.next(due).draft
        debt = 5 * CHEAP.extend(100_000, 1000)
        schedule.timed(draft, 8 * (1 + draft.depth), 0.01 * (1 + draft.depth) / 1.6 + debt, 0.01)
    assert schedule.choose(ahead(8, 8, 500, 1000)).worth == pytest.approx(before, rel=0.05)


def test_costs_measured_in_a_bad_moment_do_not_keep_a_job_from_plain_steps():
    """Of costs measured beside a busy process: all counts of nodes at one price, so every tree is as good as free."""
    rows, true_s = 64, flat(0.02, 1e-3)
    per_token = Costs(Table([1, 256], [0.02, 0.02], 8e-5), flat(1e-3), flat(1e-3, 1e-6))
    schedule = Schedule(per_token)
    drafted = []
    for step in range(400):
        plan = schedule.next(ahead(rows, rows, 500, 10_000))
        if plan.explores:
            schedule.record(Explored(*pools(step, rows, 4, 6)))
        nodes, tokens = (rows, rows) if plan.draft == PLAIN else (30 * rows, 2.5 * rows)
        seconds = true_s(nodes)
        if not plan.explores:
            schedule.timed(plan.draft, tokens, seconds, per_token.verify(nodes, 10_000))
            drafted.append(plan.draft != PLAIN)
        per_token.refine_verify(nodes, 10_000, seconds)
    assert sum(drafted[50:]) < 0.2 * len(drafted[50:])


def test_deciding_is_a_part_of_what_drafting_costs():
    """What it takes, or a step's passes would be held to last longer."""
    taken = []
    for deciding_s in (0.0, 0.004):
        schedule = promising()
        for _ in range(200):
            draft = schedule.next(ahead(8, 8, 500, 1000)).draft
            schedule.timed(draft, 8 * (1 + draft.depth), 0.02, 0.01, deciding_s)
        taken.append(schedule.choose(ahead(8, 8, 500, 1000)).seconds)
    assert taken[1] - taken[0] == pytest.approx(0.004, rel=0.1)


def test_plain_steps_stand_among_drafting_ones_the_more_the_less_these_gain():
    few, _ = live(promising(), {Draft(1, 1): 1.0, Draft(2, 1): 3.0}, 1000)
    many, _ = live(promising(), {Draft(1, 1): 1.0, Draft(2, 1): 1.15}, 1000)
    assert 0 < 2 * few[PLAIN] < many[PLAIN] < 1000 / PLAIN_EVERY


@taken_at_their_word
def test_what_promises_less_than_plain_steps_is_left():
    for gain, expected in ((0.995, PLAIN), (1.2, Draft(1, 1))):
        assert of_a_node(gain).choose(ahead(8, 8, 1, 0)).draft == expected


def of_a_node(gain):
    """Half of all first tokens are kept; a node costs what makes drafting them all worth `gain` of plain steps."""
    per_row = 0.02 / 8 * (1.5 / gain - 1)
    schedule = Schedule(Costs(flat(0.02 - 8 * per_row, per_row), flat(1.0), flat(0.0)), [PLAIN, Draft(1, 1)])
    path, parent = np.full((8, 1), 0.5), np.full((8, 1), -1)
    for _ in range(FIRST_ROWS):
        schedule.record(Explored(lambda: path, np.log(path), parent, np.ones((8, 1), int)))
    return schedule


@pytest.mark.parametrize(("gives", "share"), [(1.08, 0.7), (0.96, 0.15)])
def test_what_promises_a_little_less_than_plain_steps_is_tried_and_then_known(gives, share):
    """A measurement in a bad moment would keep drafting from ever being corrected."""
    schedule, drafted, seconds = of_a_node(0.88), 0, 0.0
    for _ in range(1000):
        draft = schedule.next(ahead(8, 8, 500, 0)).draft
        gave = 12 if draft != PLAIN else 8
        took = 0.02 * gave / 8 / (gives if draft != PLAIN else 1.0)
        schedule.timed(draft, gave, took, 0.02)
        drafted, seconds = drafted + (draft != PLAIN), seconds + took / gave
    assert (drafted / 1000 > share) == (gives > 1)
    assert seconds / 1000 < 1.01 * 0.02 / 8, "to find out costs little"


@pytest.mark.parametrize("rows", [1, 64])
def test_hope_is_for_drafting_and_not_for_each_shape_in_turn(rows):
    """A shape that kept its promises is not left for one that promises less and was never tried."""
    seen = outcomes.Outcomes()
    assert seen.kept(rows)(Draft(1, 1)) == outcomes.HOPED
    for _ in range(100):
        seen.drafted(rows, Draft(1, 1), 1.1, rows, 1 / 1.1, 1.0)
        kept = seen.kept(rows)
        assert kept(Draft(1, 1)) == pytest.approx(kept(Draft(2, 1)))
    assert 1.0 < kept(Draft(1, 1)) < 1.1


@taken_at_their_word
@pytest.mark.parametrize("looked_up", [0.1, 0.9])
def test_nothing_is_drafted_where_a_lookup_alone_gives_more(looked_up):
    """A chain of one promises 1.45 of plain steps beside a lookup worth 1.1; to one worth 1.9 it adds nothing."""
    schedule = Schedule(Costs(flat(0.01, 1e-6), flat(0.0), flat(0.001)), [PLAIN, Draft(1, 1)])
    path = np.tile([0.5, looked_up, looked_up], (8, 1))
    first, none = np.ones((8, 1), int), np.full((8, 1), -1)
    for _ in range(FIRST_ROWS):
        # Where the lookup is right there is nothing for the head to add.
        value = path * ([1.0, 1.0, 1.0] if looked_up < 0.5 else [0.01, 1.0, 1.0])
        schedule.record(Explored(lambda value=value: value, np.log(path[:, :1]), none, first, none))
    promise = schedule.choose(ahead(8, 8, 500, 1000))
    assert promise.draft == (Draft(1, 1) if looked_up < 0.5 else PLAIN)
    worth = 1 + looked_up
    for _ in range(300):
        draft = schedule.next(ahead(8, 8, 500, 1000)).draft
        seconds = 0.01 if draft == PLAIN else 0.011
        gave = worth if draft == PLAIN else worth + (0.5 if looked_up < 0.5 else 0.0)
        schedule.timed(draft, 8 * gave, seconds, 0.01)
    assert schedule.choose(ahead(8, 8, 500, 1000)).draft == promise.draft, "kept promises change nothing"


@taken_at_their_word
def test_a_lookup_that_disappoints_is_believed_less():
    schedule = Schedule(Costs(flat(0.01, 1e-6), flat(0.0), flat(0.001)), [PLAIN, Draft(1, 1)])
    value, first, none = np.tile([0.4, 0.9, 0.9], (8, 1)), np.ones((8, 1), int), np.full((8, 1), -1)
    for _ in range(FIRST_ROWS):
        schedule.record(Explored(lambda: value * [0.3, 1.0, 1.0], np.log(value[:, :1]), none, first, none))
    assert schedule.choose(ahead(8, 8, 500, 1000)).draft == PLAIN, "1.9 against 1.84"
    for _ in range(200):
        draft = schedule.next(ahead(8, 8, 500, 1000)).draft
        gave, seconds = (8 * 1.3, 0.01) if draft == PLAIN else (8 * 2.02, 0.011)
        schedule.timed(draft, gave, seconds, 0.01)
    assert schedule.choose(ahead(8, 8, 500, 1000)).draft == Draft(1, 1)


@taken_at_their_word
def test_where_looking_up_takes_longer_than_it_saves_it_is_left_and_tried_again():
    schedule = Schedule(Costs(flat(0.01, 1e-3), flat(0.0), flat(1.0)), [PLAIN, Draft(1, 1)])
    value, first, none = np.tile([0.1, 0.9, 0.9], (8, 1)), np.ones((8, 1), int), np.full((8, 1), -1)
    for _ in range(FIRST_ROWS):
        schedule.record(Explored(lambda: value, np.log(value[:, :1]), none, first, none))
    looked_up = []
    for _ in range(2000):
        plan = schedule.next(ahead(8, 8, 500, 1000))
        assert plan.draft == PLAIN
        looked_up.append(plan.looks_up)
        deciding_s = 0.02 if plan.looks_up else 0.0
        tokens, verify_s = (8 * 1.9, 0.026) if plan.looks_up else (8, 0.018)
        schedule.timed(PLAIN, tokens, verify_s + deciding_s, verify_s, deciding_s)
    assert looked_up[0]
    assert 0 < sum(looked_up) < 400
