"""Trees by budget change no token, whatever they decide and whenever: real weights, float32."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from batchgen.engines.torch.engine import TorchEngine
from batchgen.engines.torch.forest import Candidates, Shape
from batchgen.engines.torch.linear import FEW_NUMBERS
from batchgen.engines.torch.width import AutoTree, Drafted, FixedTree, Step, _Offer
from batchgen.record import Request, Sampling, Stretch
from batchgen.speculation.calibration import Calibration
from batchgen.speculation.costs import Costs, Table
from batchgen.speculation.lookup import LIKELY, OTHER, PRIOR, Found, Kept
from batchgen.speculation.schedule import WARM_STEPS, Ahead

from .conftest import GREEDY, SAMPLED

if TYPE_CHECKING:
    from collections.abc import Sequence


def costs(a_node: float, a_level: float = 0.001) -> Costs:
    """A pass takes 30 ms and `a_node` more for each node."""
    verify = Table([1, 1001], [0.03, 0.03 + 1000 * a_node])
    return Costs(verify, Table([1, 1001], [a_level, 1000 * a_level]), Table([1, 1001], [0.001, 0.1]), even=0.9)


class Moody(FixedTree):
    """Drafts in some steps only, and then for every other row."""

    def __init__(self, shape: Shape, steps: set[int]) -> None:
        super().__init__(shape)
        self.steps, self.step = steps, 0

    def plan(self, ahead):
        self.step += 1
        plan = super().plan(ahead) if self.step in self.steps else None
        return plan and (plan[0], plan[1][self.step % 2 :: 2] or plan[1])


class Idle(FixedTree):
    """Drafts in every step and verifies none of it, so that every place is passed."""

    def keep(self, drafted, caps, ahead):
        return torch.zeros_like(drafted.candidates.token, dtype=torch.bool)


class Watched(TorchEngine):
    """Remembers the head's log-probabilities, and those of whole paths, by what stood before them."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.logp: dict[tuple[int, ...], list[float]] = {}
        self.score: dict[tuple[int, ...], list[float]] = {}

    def _grow(self, slots):
        before = [tuple(self._rows[slot].tokens) for slot in slots]
        drafted, trees = super()._grow(slots)
        if drafted is not None:
            places = [before[r] for r in drafted.rows]
            self.logp |= dict(zip(places, drafted.candidates.logp.tolist(), strict=True))
            self.score |= dict(zip(places, drafted.candidates.score.tolist(), strict=True))
        return drafted, trees


def test_rows_that_are_unlikely_to_go_on_are_drafted_no_deeper(bench, prompts):
    """Whatever is drafted is what would be without a floor, and nothing else is missing than what lies below one."""
    shape, floor = Shape(4, 2, 20, children=3), 0.3
    every, stopped = (
        bench.engine(width, 4, kind=Watched) for width in (Idle(shape), Idle(dataclasses.replace(shape, floor=floor)))
    )
    for engine in (every, stopped):
        bench.run(engine, prompts[:4], GREEDY)
    assert every.logp.keys() == stopped.logp.keys()
    deepest = set()
    for before, logp in every.logp.items():
        score, depth, stop = every.score[before], 1, 3
        likeliest = max(score[:3])
        while stop < len(score) and likeliest >= np.log(floor):
            likeliest = max(score[stop : stop + 6])
            depth, stop = depth + 1, stop + 6
        deepest.add(depth)
        drafted = [each for each in stopped.logp[before] if each > float("-inf")]
        assert drafted == pytest.approx(logp[:stop], abs=1e-3)
    assert deepest == {1, 2, 3, 4}


def test_rows_that_stop_are_drafted_no_deeper_than_they_may_still_write(bench, prompts):
    shape, limits = Shape(4, 2, 20, floor=1e-9, children=3), (5, 12)
    engine = bench.engine(Idle(shape), 2, kind=Watched)
    for i, limit in enumerate(limits):
        engine.submit(Request((0, i, 0), str(i), 0, prompts[i], dataclasses.replace(GREEDY, max_tokens=limit)))
    while engine.unfinished:
        engine.step()
    for prompt, limit in zip(prompts, limits, strict=False):
        own = {before: logp for before, logp in engine.logp.items() if before[: len(prompt)] == tuple(prompt)}
        assert len(own) >= limit - 2
        for before, logp in own.items():
            left = limit - (len(before) - len(prompt)) - 1
            assert 1 + (sum(np.isfinite(logp)) - 3) // 6 == max(1, min(4, left))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "num_prompts", "a_node"), [(64, 64, 0.0002), (7, 24, 0.00001)], ids=["64 rows", "7 rows"]
)
def test_tokens_do_not_depend_on_what_the_budget_decides(bench, prompts, plain, batch_size, num_prompts, a_node):
    width = AutoTree(costs(a_node), stops_early=True)
    engine = bench.engine(width, batch_size)
    for s, sampling in enumerate((GREEDY, SAMPLED)):
        for i, prompt in enumerate(prompts[:num_prompts]):
            if i % 2 == s:
                engine.submit(Request((s, i, 0), str(i), 0, prompt, sampling))
    done = []
    while engine.unfinished:
        done += engine.step()
    assert len(done) == num_prompts
    expected = {c.key: c.token_ids for c in plain}
    assert not [c.key for c in done if c.token_ids != expected[c.key]]
    assert sum(c.acceptance.accepted_tokens for c in done) > num_prompts
    report = width.report()
    assert report["calibration"]["nodes"] > num_prompts
    assert report["expected_tokens_per_step"] == pytest.approx(report["tokens_per_step"], rel=0.3)


def test_what_rows_repeat_is_verified_and_changes_no_token(bench, prompts):
    """Prompts that hold what the target will answer: nearly all of it is copied, with a head or where it never pays."""
    prompts = prompts[:5]
    answers = bench.run(bench.engine(None, 8), prompts, Sampling(max_tokens=48))
    texts = [[*prompt, *done.token_ids, *prompt] for prompt, done in zip(prompts, answers, strict=True)]
    expected = bench.run(bench.engine(None, 8), texts, GREEDY, SAMPLED)
    for a_level in (0.0001, 1.0):
        done = bench.run(bench.engine(AutoTree(costs(0.0002, a_level)), 8), texts, GREEDY, SAMPLED)
        assert [c.token_ids for c in done] == [c.token_ids for c in expected]
        looked_up, kept = (
            sum(getattr(c.acceptance, name) for c in done) for name in ("lookup_tokens", "accepted_lookup_tokens")
        )
        assert 0.3 * looked_up < kept < looked_up
        assert kept > 60
        for a in [c.acceptance for c in done]:
            kept_in_all = a.accepted_tokens + a.accepted_lookup_tokens
            stretched = sum(a.by_position, Stretch())
            assert stretched.accepted_tokens + stretched.accepted_lookup_tokens == kept_in_all
            assert sum(a.drafted_per_depth) <= a.draft_tokens
            assert a.draft_steps <= a.target_steps
        for c in done:
            a = c.acceptance
            kept_in_all = a.accepted_tokens + a.accepted_lookup_tokens
            assert len(c.token_ids) - 1 - kept_in_all in (a.target_steps, a.target_steps - 1)


def test_what_the_head_leaves_to_others_than_the_looked_up_token_is_shared_by_them():
    """One row: below the root 7 and 8, below 7 then 5 and 6; looked up 7, then 9, which the head has not."""
    logp = torch.tensor([[0.4, 0.3, 0.6, 0.2]]).log()
    rank, depth, parent = (torch.tensor([each]) for each in ([0, 1, 0, 1], [1, 1, 2, 2], [-1, -1, 0, 0]))
    candidates = Candidates(logp, logp, rank, torch.tensor([[7, 8, 5, 6]]), parent, depth)
    both, merged = candidates.beside(Found(np.array([[7, 9]]), np.array([4])))
    calibration, kept = Calibration(), Kept()
    columns = [each.numpy() for each in (both.logp, both.rank, both.parent, both.depth)]
    offer = _Offer(*columns, np.array([9]), merged, Shape(2, 1, 4, children=2))
    own = calibration.acceptance(*columns[:2], columns[3])[0]
    same, other = PRIOR[2, LIKELY], PRIOR[3, OTHER]
    below = own[2:4] * (1 - other)
    expected = [same, own[1] * (1 - same) / (1 - own[0]), *(same * below), same, same * other]
    assert offer.value(calibration, kept)[0] == pytest.approx(expected, rel=1e-4)
    near_its_end = dataclasses.replace(offer, cap=np.array([1]))
    assert near_its_end.value(calibration, kept)[0] == pytest.approx([*expected[:2], 0, 0, expected[4], 0], rel=1e-4)


class Counting(AutoTree):
    """Remembers the rows and nodes of steps that drafted and did not explore; they take what they should."""

    def __init__(self, costs: Costs, sizes: Sequence[int] = ()) -> None:
        super().__init__(costs, sizes, lookup=False)
        self.sizes: list[tuple[int, int]] = []

    def spent(self, step, reached):
        if step.drafted is not None and step.drafted.shape.width < 4:
            self.sizes.append((step.rows, step.nodes))
        super().spent(dataclasses.replace(step, verify_s=self.costs.verify(step.nodes, step.context)), reached)


def test_rows_verify_as_many_nodes_each_where_that_makes_the_faster_pass(bench, prompts):
    shares = []
    for even in (1.0, 0.5):
        width = Counting(dataclasses.replace(costs(a_node=0.002), even=even))
        bench.run(bench.engine(width, 8), prompts[:24], Sampling(max_tokens=24))
        alike = [nodes > rows and nodes % rows == 0 for rows, nodes in width.sizes if rows > 4]
        shares.append(sum(alike) / len(alike))
    few, most = shares
    assert few < 0.45
    assert most > 0.7


def test_passes_in_bfloat16_have_few_sizes(bench, prompts):
    """oneDNN compiles code for each new one; where candidates run out it has to."""
    few = []
    for sizes in ((), FEW_NUMBERS):
        width = Counting(dataclasses.replace(costs(a_node=0.002), even=1.0), sizes)
        bench.run(bench.engine(width, 20), prompts[:20], Sampling(max_tokens=40))
        few.append([nodes % 4 == 0 for rows, nodes in width.sizes if 16 < rows < nodes])
    any_size, multiples_of_four = (sum(each) / len(each) for each in few)
    assert any_size < 0.6
    assert multiples_of_four > 0.8
    target = bench.target(torch.bfloat16)  # which computes in float32 where the CPU is slow in bfloat16
    assert target.pass_sizes == (FEW_NUMBERS if target.dtype is torch.bfloat16 else ())
    assert bench.target(torch.float32).pass_sizes == ()


def chains(last: list[float]) -> Candidates:
    """A chain of three in each row, whose last token has these probabilities."""
    logp = torch.tensor([[0.95, 0.9, each] for each in last]).log()
    depth = torch.arange(1, 4).expand(len(last), -1)
    return Candidates(logp.cumsum(1), logp, torch.zeros_like(depth), depth, depth - 2, depth)


def kept_of_chains(even: float, last: list[float]) -> list[list[bool]]:
    """What is verified of `chains`."""
    rows = len(last)
    width = AutoTree(dataclasses.replace(costs(a_node=0.005), even=even))
    ahead = Ahead(100 * rows, [1] * rows, [0] * rows, 0)  # near their ends, so that no step explores
    for _ in range(WARM_STEPS):
        width.plan(ahead)
        width.spent(Step(rows, 100 * rows, rows, rows, 0.0, 0.03 + 0.005 * rows, False, False, None), None)
    width.plan(ahead)
    drafted = Drafted(Shape(3, 1, 3), range(rows), rows, chains(last))
    return width.keep(drafted, torch.full((rows,), 9), ahead).tolist()


@pytest.mark.parametrize("captures", [False, True])
def test_a_step_that_captures_graphs_teaches_nothing_of_what_passes_cost(captures):
    width = AutoTree(costs(a_node=0.005))
    before = width.costs.verify(4)
    width.plan(Ahead(400, [1] * 4, [0] * 4, 0))
    width.spent(Step(4, 400, 4, 4, 0.0, 3 * before, False, captures, None), None)
    assert (width.costs.verify(4) == before) == captures


def test_steps_that_explore_tell_how_fast_the_machine_is():
    """A job begins with some of these, and whether drafting pays is judged by the clock they set."""
    width = AutoTree(costs(a_node=0.005))
    before = width.costs.verify(8)
    shape, rows = width.plan(Ahead(400, [1] * 4, [9] * 4, 0))
    assert shape.depth > 1, "it explores"
    drafted = Drafted(shape, rows, 4, chains([0.5] * 4))
    width.spent(Step(4, 400, 8, 6, 0.1, 2 * before, False, False, drafted), None)
    assert 1.05 * before < width.costs.verify(8) < 2 * before


def test_what_is_tried_is_verified_whatever_is_believed_of_it():
    """Else a head that was right never would be believed so for ever."""
    width, rows = AutoTree(costs(a_node=100.0)), 4
    shape, of = width.plan(ahead := Ahead(400, [1] * rows, [9] * rows, 0))
    assert shape.depth > 1, "it explores"
    kept = width.keep(Drafted(shape, of, rows, chains([0.5] * rows)), torch.tensor([9, 9, 9, 0]), ahead)
    assert kept.tolist() == [[True, False, False]] * 3 + [[False] * 3], "the last row may write no more"


class Mixed(AutoTree):
    """Remembers which passes read prompts beside decoding rows."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.mixed: list[bool] = []

    def spent(self, step, reached):
        self.mixed.append(step.mixed)
        super().spent(step, reached)


def test_now_and_then_a_pass_reads_no_prompt(bench, prompts, monkeypatch):
    """What drafting takes is told by such passes alone, and where prompts are long there might be none."""
    monkeypatch.setattr("batchgen.engines.torch.engine.MOST_MIXED", 3)
    long, width = bench.prompts("eagle_gsm8k", 2), Mixed(costs(a_node=0.0002))
    done = bench.run(bench.engine(width, 3, prefill_tokens=16), [prompts[0], *long], Sampling(max_tokens=40))
    # Later on the first row has ended, and prompts are read beside none.
    apart = [len(list(passes)) for mixed, passes in itertools.groupby(width.mixed[:12]) if mixed]
    assert sum(apart) > 6
    assert max(apart) == 3
    expected = bench.run(bench.engine(None, 3), [prompts[0], *long], Sampling(max_tokens=40))
    assert [c.token_ids for c in done] == [c.token_ids for c in expected]


def test_one_row_is_not_one_of_even_rows():
    """Its passes are priced as they are; even rows, at half the price, verify more."""
    chances = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5]
    assert all(kept_of_chains(0.5, [each]) == kept_of_chains(1.0, [each]) for each in chances)
    assert any(kept_of_chains(0.5, [each] * 2) != kept_of_chains(1.0, [each] * 2) for each in chances)


def test_nothing_is_drafted_where_a_node_costs_more_than_it_brings(bench, prompts):
    engine = bench.engine(AutoTree(costs(a_node=0.1)), 8)
    done = bench.run(engine, prompts[:24], Sampling(max_tokens=24))
    drafting, all_steps = sum(c.acceptance.draft_steps for c in done), sum(c.acceptance.target_steps for c in done)
    assert drafting < 0.3 * all_steps, "but for the first steps, which explore"


def test_a_head_that_paused_drafts_as_if_it_had_not(bench):
    """After 5 and after 75 plain steps (more than a tile) the head has caught up on true features."""
    [asked] = sorted(bench.prompts("mt_bench", 20), key=len)[-1:]
    shape = Shape(1, 2, 2)
    widths = (Idle(shape), Moody(shape, {6, 82, 83, 84}))
    # Passes of 40 tokens: catching up takes several.
    always, paused = (bench.engine(width, 1, kind=Watched, prefill_tokens=40) for width in widths)
    for engine in (always, paused):
        bench.run(engine, [asked], Sampling(max_tokens=95))
    assert len(paused.logp) >= 3
    for before in paused.logp:
        assert paused.logp[before] == pytest.approx(always.logp[before], abs=1e-3)


def test_features_held_back_are_bounded(bench, prompts, monkeypatch):
    monkeypatch.setattr("batchgen.engines.torch.engine.PENDING_BYTES", 300 * 3 * 576 * 4)
    engine = bench.engine(Moody(Shape(2, 1, 2), {40}), 4)
    for i, prompt in enumerate(prompts[:4]):
        engine.submit(Request(i, str(i), 0, prompt, Sampling(max_tokens=60)))
    done, most = [], 0
    while engine.unfinished:
        done += engine.step()
        most = max(most, sum(row.seen - row.draft_len for row in engine._rows))
    assert most <= 300 + 4 + max(map(len, prompts[:4])) * 4
    plain = bench.run(bench.engine(None), prompts[:4], Sampling(max_tokens=60))
    assert [c.token_ids for c in sorted(done, key=lambda c: c.key)] == [c.token_ids for c in plain]
    assert sum(c.acceptance.accepted_tokens for c in done) > 0
