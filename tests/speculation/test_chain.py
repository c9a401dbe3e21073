"""The length of chains that pays is found by trying, at every number of rows, and found again when it changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.speculation.chain import LONGEST, STARTS_WITHOUT, ChainLengths


class World:
    """An engine whose steps take a base, a price for each verified token and one for each drafted one, with noise."""

    def __init__(self, rate: float, a_token: float, a_draft: float, noise: float = 0.02) -> None:
        self.rate, self.a_token, self.a_draft, self.noise = rate, a_token, a_draft, noise
        self.dice = np.random.default_rng(0)

    def seconds(self, rows: int, length: int) -> float:
        return 1.0 + rows * ((1 + length) * self.a_token + length * self.a_draft)

    def speed(self, rows: int, length: int) -> float:
        return rows * sum(self.rate**d for d in range(length + 1)) / self.seconds(rows, length)

    def best(self, rows: int) -> int:
        return max(range(LONGEST + 1), key=lambda length: self.speed(rows, length))

    def run(self, lengths: ChainLengths, rows: int, steps: int, prompt_tokens: int = 0) -> list[int]:
        """The lengths of the steps; what is drafted in one is verified in the next.

        Up to `prompt_tokens` of prompts are read in each, at the price of other tokens.
        """
        verified, chosen = 0, []
        for _ in range(steps):
            drafting = lengths.next(rows)
            for _ in range(rows if verified else 0):
                hits = self.dice.random(verified) < self.rate
                lengths.judged(verified, int(hits.cumprod().sum()))
            if verified == drafting:
                prompt = int(self.dice.integers(prompt_tokens + 1))
                seconds = self.seconds(rows, drafting) + prompt * self.a_token
                lengths.seen(rows, drafting, seconds * self.dice.normal(1, self.noise), prompt)
            verified = drafting
            chosen.append(drafting)
        return chosen


@settings(max_examples=40)
@given(st.floats(0.1, 0.9), st.floats(0, 0.05), st.floats(0, 0.02), st.sampled_from([1, 8, 64]))
def test_what_is_at_work_is_as_good_as_the_best(rate, a_token, a_draft, rows):
    world, lengths = World(rate, a_token, a_draft), ChainLengths(LONGEST)
    world.run(lengths, rows, 400 if rows == 1 else 100)  # of one row hardly anything is accepted in a hundred steps
    at_work = np.bincount(world.run(lengths, rows, 100)).argmax()
    assert world.speed(rows, at_work) >= 0.93 * world.speed(rows, world.best(rows))


def test_probing_costs_little_once_the_length_is_found():
    world, lengths = World(0.6, 0.01, 0.002), ChainLengths(LONGEST)
    world.run(lengths, 64, 1000)
    chosen = world.run(lengths, 64, 1000)
    spent = sum(world.seconds(64, length) for length in chosen)
    got = sum(world.speed(64, length) * world.seconds(64, length) for length in chosen)
    assert got / spent >= 0.985 * world.speed(64, world.best(64))


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8])
def test_prompts_in_every_step_hide_nothing(rows, rate):
    """As many tokens of prompts as of rows, up to four times that."""
    world, lengths = World(rate, 0.01, 0.002), ChainLengths(LONGEST)
    world.run(lengths, rows, 1500, prompt_tokens=4 * rows)
    at_work = np.bincount(world.run(lengths, rows, 300, prompt_tokens=4 * rows)).argmax()
    assert world.speed(rows, at_work) >= 0.93 * world.speed(rows, world.best(rows))


def test_a_draining_batch_goes_on_from_its_neighbour_and_lengthens():
    world, lengths = World(0.8, 0.02, 0.001), ChainLengths(LONGEST)
    for rows in (64, 32, 16, 8, 4, 2, 1):
        world.run(lengths, rows, 300)
    by_rows = [length for _, _, length in lengths.schedule()]
    assert by_rows == sorted(by_rows, reverse=True)
    assert by_rows[0] >= 4
    assert by_rows[-1] <= 2


@pytest.mark.parametrize(
    ("a_token", "without_s", "better"),
    [(0.05, 9.0, True), (0.015, 1.8, True), (0.015, 2.0, False), (0.0005, 1.0, False)],
)
def test_an_engine_that_cannot_draft_is_tried_where_drafts_hardly_pay_and_kept_where_it_is_better(
    a_token, without_s, better
):
    world, lengths = World(0.6, a_token, 0.001), ChainLengths(LONGEST)
    assert not lengths.without_pays(64), "nothing was tried"
    world.run(lengths, 64, 6)
    assert not lengths.without_pays(64), "nothing but length 0 was"
    world.run(lengths, 64, 100)
    assert lengths.without_pays(64) == (world.speed(64, 0) > 0.9 * world.speed(64, world.best(64)))
    assert not lengths.without_pays(1), "of other numbers of rows nothing is known"
    for _ in range(10):
        lengths.seen_without(64, without_s)
    again = ChainLengths.of_json(lengths.as_json())
    assert again.without_pays(64) == better
    for _ in range(STARTS_WITHOUT):
        assert again.without_pays(64) == better
        again.started(drafts=False)
    assert not ChainLengths.of_json(again.as_json()).without_pays(64), "other prompts may be drafted better"
    again.started(drafts=True)
    assert again.without_pays(64) == better


def test_a_change_is_followed():
    lengths = ChainLengths(LONGEST)
    World(0.9, 0.0001, 0.0001).run(lengths, 8, 400)
    assert lengths.schedule()[-1][2] >= 4
    World(0.05, 0.05, 0.02).run(lengths, 8, 3000)
    assert lengths.schedule()[-1][2] == 0


@given(st.sets(st.integers(1, 200), min_size=1, max_size=6))
def test_the_schedule_covers_every_size_from_one_row_on(sizes):
    lengths = ChainLengths(LONGEST)
    for rows in sizes:
        lengths.next(rows)
    schedule = lengths.schedule()
    assert schedule[0][0] == 1
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(schedule))
    assert schedule[-1][1] >= max(sizes)


def test_what_was_learned_survives_the_process():
    world, lengths = World(0.7, 0.01, 0.002), ChainLengths(LONGEST)
    world.run(lengths, 16, 300)
    again = ChainLengths.of_json(lengths.as_json())
    assert again.schedule() == lengths.schedule()
    assert again.tokens(3) == pytest.approx(lengths.tokens(3))
    assert again.as_json() == lengths.as_json()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"longest": 5}', '{"longest": 2, "sizes": {}, "drafted": [1], "accepted": []}']
)
def test_a_damaged_file_is_refused(text):
    with pytest.raises((ValueError, TypeError, KeyError)):
        ChainLengths.of_json(text)
