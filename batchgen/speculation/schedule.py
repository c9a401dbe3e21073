"""How deep and wide to draft in the next step, before anything of it is known: by what recent drafts would have given.

Now and then a step *explores*: it drafts with the largest shape, and what it found tells what every smaller one would
have (`hindsight`). For the rows of the next step the recorded rows stand as a sample, which gives the tokens expected
of any number of verified nodes; the costs of passes give the seconds.

Shapes are compared by tokens per second, as if they went on forever: the head then catches up on what a step of that
shape keeps, and on the prompts of rows that arrive. After plain steps far more may be pending, and a step that looked
only at itself would never draft again. That debt is paid once, so a shape bears a share of it, as if it were repaid
over `REPAY_STEPS` steps, or over fewer where the rows that owe it end before.

Where each level is seen before the next is drafted, there are shapes that stop by themselves: `hindsight` tells how
many rows would have gone on.

What a shape promises is taken for as much as promises proved worth (`outcomes`), and must still be more than a plain
step. While drafting pays little, a plain step is taken now and then to compare with.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from batchgen.speculation.costs import power_of_two
from batchgen.speculation.hindsight import Explored, Hindsight
from batchgen.speculation.outcomes import Outcomes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from batchgen.speculation.costs import Costs

REPAY_STEPS = 64
# Over how many steps the prompt tokens that arrive, by running row, are averaged.
ARRIVAL_STEPS = 128
# Seconds of catching up on what is paid once, as a share of a step's, beyond which it tells little about its shape.
MAX_DEBT = 0.1
# As how many plain steps a pass without a draft may be priced, with what was looked up, to tell how long one lasts.
MAX_PLAIN = 1.25
# What the plain steps may cost that are taken beside drafting ones, and the least number of steps between two. At first
# no more are left between them, and after each twice as many.
PLAIN_SHARE, PLAIN_EVERY = 0.003, 8
# How many times as fast as foretold a plain step is a surprise, and followed by another.
SURPRISE = 1.5
EXPLORE_SHARE = 0.005
# Steps between two explorations, and for which forecasts stand.
EXPLORE_STEPS, FORECAST_STEPS = 32, 64
# Before exploring has to be paid for: the first row of a small batch may be nothing like the next, and the first step
# of a large one is judged by a calibration that has seen nothing.
FIRST_ROWS, FIRST_STEPS = 48, 4
# Steps between those of few rows, whose first tokens are unlike what follows.
FIRST_PAUSE = 4
# Rows that explore where the others go on plainly: those with the least to catch up on.
EXPLORE_ROWS = 16
# Over how many steps the seconds of deciding are averaged.
DECIDING_STEPS = 32
# In how many steps without a lookup it is forgotten how long one takes, so that it is tried again.
LOOKING_STEPS = 256
# Steps that make a throughput, and steps that it remembers.
WARM_STEPS, MEMORY_STEPS = 4, 64


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """How deep to draft and how many nodes of each level to expand; `Draft(0, 0)` is a step without a draft.

    Of each expanded node the `CHILDREN` likeliest next tokens are candidates: they cost no pass. Rows whose likeliest
    path to a level is less likely than `floor`, by the head's own word, are drafted no deeper.
    """

    depth: int
    width: int
    floor: float = 0.0

    def level_tokens(self, rows: int) -> list[int]:
        """Tokens of each pass of the head after the catch-up, whose own output already gives the first level."""
        return [rows * self.width] * (self.depth - 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Ahead:
    """What the next step of B rows starts from.

    context: tokens that stand before the roots of all rows
    pending: [B] tokens of each row that the head must catch up on before it drafts
    caps: [B] levels below the root that are of use to each row: the tokens that it may still give, less one
    arrived: of all that is pending, the tokens of rows that never decoded before
    """

    context: int
    pending: Sequence[int]
    caps: Sequence[int]
    arrived: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.pending)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The shape of a step, the rows that draft (all but where only some explore), and whether it explores.

    `looks_up` says whether it is worth while to look tokens up for it.
    """

    draft: Draft
    rows: Sequence[int]
    explores: bool
    looks_up: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Promise:
    """What is foretold of steps of a shape.

    worth: tokens, as a multiple of what plain steps give in the same seconds, while what is pending is paid back
    gain: the same of steps with nothing else pending
    seconds: of one of these
    fed: tokens that the head catches up on in it
    """

    draft: Draft
    worth: float
    gain: float = 1.0
    seconds: float = 0.0
    fed: float = 0.0


CHILDREN = 4
PLAIN = Draft(0, 0)
_NOTHING = Promise(PLAIN, 1.0)
# Of equals the first is taken, so cheap ones stand first. At depth 1 nothing is expanded.
SHAPES = (PLAIN, Draft(1, 1), *(Draft(depth, width) for width in (1, 2, 4) for depth in range(2, 7)))
# Further ones, for where each level is seen before the next is drafted, and how many rows they are for. Of more
# rows one nearly always goes on, and the head takes about as long for it as for them all.
STOPPING = tuple(Draft(6, width, floor) for width in (1, 2) for floor in (0.2, 0.35, 0.5, 0.7))
STOPPING_ROWS = 2


class Schedule:
    """Chooses the shape of each step, and which steps explore.

    A step is `next`, then `record` if it explores, then `spent` and, if it was a usual one, `timed`.
    """

    def __init__(self, costs: Costs, shapes: Sequence[Draft] = SHAPES) -> None:
        self._costs, self._shapes = costs, tuple(shapes)
        self._largest = Draft(max(s.depth for s in shapes), max(s.width for s in shapes))
        self._useful: dict[tuple[bool, int], list[Draft]] = {}
        self._seen = Hindsight([s.width for s in shapes if s != PLAIN])
        self._outcomes = Outcomes()
        # What the last step started from, what it was promised, and drafting steps since a plain one.
        self._ahead, self._promised, self._drafted = Ahead(0, [], [], 0), _NOTHING, 0
        # What a step without a draft promised, and whether the last step looked tokens up.
        self._bare, self._looks_up = _NOTHING, True
        self._until_plain = PLAIN_EVERY  # as many as it takes to be sure of the costs
        self._forecasts: dict[tuple[object, ...], tuple[dict[Draft, Promise], int]] = {}
        self._choices = self._num_recorded = 0
        self._allowance_s, self._since, self._arriving = 0.0, EXPLORE_STEPS, 0.0
        self._deciding_s = self._looking_s = 0.0  # of a step with and without a draft, beside all passes

    def next(self, ahead: Ahead) -> Plan:
        """What this step drafts, and whether it explores: if so, `record` wants what it drafts.

        The first `FIRST_STEPS` explore, and every `FIRST_PAUSE`th one until `FIRST_ROWS` rows are on record. From then
        on one may lose at most `EXPLORE_SHARE` of all time since the last one. Where the step that was chosen drafts,
        too, that is by what both promise; beside plain steps it is what drafting takes, the head's catch-up included,
        so with much pending it waits.
        """
        self._arriving += (ahead.arrived / ahead.rows - self._arriving) / ARRIVAL_STEPS
        self._ahead, self._promised = ahead, self.choose(ahead)
        self._since += 1
        exploration = self._exploration(ahead, self._promised)
        if exploration is not None:
            # Nothing is carried over: savings of an hour must not buy a minute of exploring.
            self._allowance_s, self._since = 0.0, 0
            return exploration
        chosen = self._promised.draft
        # A plain step among drafting ones loses what those gain.
        least = max(1.0, self._bare.worth)
        affordable = max(PLAIN_EVERY, (1 - least / max(self._promised.worth, least)) / PLAIN_SHARE)
        if self._drafted >= min(affordable, self._until_plain):
            chosen, self._until_plain = PLAIN, max(PLAIN_EVERY, 2 * self._until_plain)
        self._drafted = 0 if chosen == PLAIN else self._drafted + 1
        self._looks_up = chosen != PLAIN or self._bare.worth >= 1.0
        return Plan(chosen, range(ahead.rows), explores=False, looks_up=self._looks_up)

    def _exploration(self, ahead: Ahead, promise: Promise) -> Plan | None:
        """A step that explores in place of the one promised, if it is due and can be afforded."""
        largest = self._largest_within(max(ahead.caps))
        if largest == PLAIN:
            return None
        known, warm = self._num_recorded >= FIRST_STEPS, self._warm
        near_end = max(ahead.caps) < self._seen.depth  # all rows are: nothing to learn for those that follow
        if (warm and near_end) or (known and self._since < (EXPLORE_STEPS if warm else FIRST_PAUSE)):
            return None
        rows: Sequence[int] = range(ahead.rows)
        if promise.draft == PLAIN:
            of_use = (row for row in rows if ahead.caps[row] >= largest.depth)
            rows = sorted(sorted(of_use, key=lambda row: ahead.pending[row])[:EXPLORE_ROWS])
        if warm:
            if promise.draft == PLAIN:
                loss_s = self._drafting_s(largest, rows, ahead)
            else:
                wide = self._foretold([largest], ahead)[0]
                loss_s = wide.seconds * (1 - wide.gain / promise.gain)
            if loss_s > self._allowance_s:
                return None
        return Plan(largest, rows, explores=True)

    @property
    def _warm(self) -> bool:
        """Whether enough is known that exploring has to be paid for, and forecasts may stand for a while."""
        return self._num_recorded >= FIRST_STEPS and self._seen.num_rows >= FIRST_ROWS

    def spent(self, seconds: float) -> None:
        """A step took `seconds`; exploring lives on a share of them."""
        self._allowance_s += EXPLORE_SHARE * seconds

    def timed(self, draft: Draft, tokens: int, seconds: float, verify_s: float, deciding_s: float = 0.0) -> None:
        """The step that was planned last, if it neither explored nor read prompts: what it drafted, gave and took.

        `verify_s` is what the costs say of its pass of the target; `deciding_s` of the `seconds` went into what to
        draft and verify.
        """
        ahead, promise, extend = self._ahead, self._promised, self._costs.extend
        plain_s = self._plain_s(ahead)
        if draft == PLAIN:
            seconds -= deciding_s
            if SURPRISE * seconds < verify_s * self._outcomes.slower(ahead.rows):
                self._until_plain = 0
            if verify_s < MAX_PLAIN * plain_s:
                self._outcomes.plain(ahead.rows, seconds, verify_s)
            else:
                self._outcomes.fade(ahead.rows)
            if not self._looks_up:
                self._looking_s *= 1 - 1 / LOOKING_STEPS
            elif self._seen.looks_up:
                self._looking_s += (deciding_s - self._looking_s) / DECIDING_STEPS
                taken = (verify_s + self._looking_s) * self._outcomes.slower(ahead.rows)
                self._outcomes.drafted(ahead.rows, PLAIN, self._bare.gain, tokens, taken, plain_s)
            return
        self._deciding_s += (deciding_s - self._deciding_s) / DECIDING_STEPS
        debt = extend(sum(ahead.pending), ahead.context) - extend(promise.fed, ahead.context)  # which is paid once
        if debt <= MAX_DEBT * seconds:
            self._outcomes.drafted(ahead.rows, draft, promise.gain, tokens, seconds - debt, plain_s)

    def record(self, explored: Explored) -> None:
        """Remember what an explored step had to verify."""
        if not self._warm:
            self._forecasts.clear()
        self._seen.record(explored)
        self._num_recorded += 1

    def revalue(self) -> None:
        """The calibration has changed: value what is recorded anew when the next question comes up."""
        self._seen.revalue()
        if not self._warm:
            self._forecasts.clear()

    def choose(self, ahead: Ahead) -> Promise:
        """What is worth most, as far as promises were kept; not to draft where nothing is worth more.

        That as well while nothing is recorded. Where tokens are looked up, they are worth something without a draft.
        """
        self._bare = _NOTHING
        if not self._seen.num_rows:
            return _NOTHING
        self._choices += 1
        kept = self._outcomes.kept(ahead.rows)
        if self._seen.looks_up:
            [bare] = self._foretold([PLAIN], ahead)
            self._bare = dataclasses.replace(bare, worth=bare.worth * kept(PLAIN))
        least = max(1.0, self._bare.worth)

        def worth(promise: Promise) -> float:
            return promise.worth * kept(promise.draft)

        best = max(self._foretold(self._of_use(ahead.rows, max(ahead.caps)), ahead), key=worth, default=_NOTHING)
        return dataclasses.replace(best, worth=worth(best)) if worth(best) > least else _NOTHING

    def _foretold(self, shapes: Sequence[Draft], ahead: Ahead) -> list[Promise]:
        """What each shape promises; stands for `FORECAST_STEPS` choices, or until something is learned at first."""
        pending = sum(ahead.pending) // ahead.rows
        # What a step or two gave is no debt, and then it does not matter how long a row would have to repay it.
        debt = (pending.bit_length(), int(min(_left(ahead), REPAY_STEPS)).bit_length()) if pending > 8 else None
        key = power_of_two(ahead.rows), debt
        promises, until = self._forecasts.get(key, ({}, 0))
        if self._choices >= until:
            promises = {}
            self._forecasts[key] = promises, self._choices + FORECAST_STEPS
        for shape in shapes:
            if shape not in promises:
                promises[shape] = self._promise(shape, ahead)
        return [promises[shape] for shape in shapes]

    def _of_use(self, rows: int, max_depth: int) -> list[Draft]:
        """The shapes of use where rows give `max_depth` tokens more; what stops by itself is as deep as they allow."""
        stops = power_of_two(rows) <= power_of_two(STOPPING_ROWS)
        key = stops, min(max_depth, self._largest.depth)
        if key not in self._useful:
            shapes = [shape for shape in self._shapes if not shape.floor and 0 < shape.depth <= max_depth]
            if stops and max_depth > 1:
                stopping = (shape for shape in self._shapes if shape.floor)
                shapes += [dataclasses.replace(shape, depth=min(shape.depth, max_depth)) for shape in stopping]
            self._useful[key] = shapes
        return self._useful[key]

    def _promise(self, shape: Draft, ahead: Ahead) -> Promise:
        """What `shape` promises with the best number of verified nodes, in uneven trees or in even ones."""
        rows, context, extend = ahead.rows, ahead.context, self._costs.extend
        if shape == PLAIN:
            nodes, tokens = self._seen.tokens(0, 0, rows)
            gains = tokens / rows * self._plain_s(ahead) / (self._costs.verify(nodes, context) + self._looking_s)
            return Promise(PLAIN, float(gains.max()), float(gains.max()))
        nodes, tokens = self._seen.tokens(shape.depth, shape.width, rows, shape.floor)
        verify = self._costs.verify(nodes, context)
        if rows > 1 and self._costs.even < 1.0:
            nodes, alike = self._seen.even_tokens(shape.depth, shape.width, rows, shape.floor)
            tokens = np.concatenate([tokens, alike])
            verify = np.concatenate([verify, self._costs.even * self._costs.verify(nodes, context)])
        fed = tokens + rows * self._arriving
        feeding = extend(fed, context)
        step = verify + feeding + self._levels_s(shape, rows, context) + self._deciding_s
        debt = np.maximum(extend(sum(ahead.pending), context) - feeding, 0.0)
        each = debt / np.clip(_left(ahead) * rows / tokens, 1, REPAY_STEPS)
        # Prompts that came all at once are among what arrives on average, and paid for with it.
        repaying = step + np.maximum(each - (feeding - extend(tokens, context)), 0.0)
        plain_steps = tokens / rows * self._plain_s(ahead) * self._outcomes.slower(rows)
        best = int((plain_steps / repaying).argmax())
        found = (plain_steps / repaying, plain_steps / step, step, fed)
        return Promise(shape, *(float(each[best]) for each in found))

    def _plain_s(self, ahead: Ahead) -> float:
        return float(self._costs.verify(ahead.rows, ahead.context))

    def _levels_s(self, shape: Draft, rows: int, context: int) -> float:
        """Seconds of all levels after the first; with a floor those expected, if rows go on independently."""
        if not shape.floor:
            return float(self._costs.level(np.array(shape.level_tokens(rows)), context).sum())
        seconds = self._costs.level(shape.width * np.arange(rows + 1), context)
        going_on = self._seen.going_on(shape.depth, shape.width, shape.floor)
        return sum(float(_binomial(rows, share) @ seconds) for share in going_on)

    def _drafting_s(self, shape: Draft, rows: Sequence[int], ahead: Ahead) -> float:
        catch_up = self._costs.extend(sum(ahead.pending[row] for row in rows), ahead.context)
        return catch_up + self._levels_s(shape, len(rows), ahead.context)

    def _largest_within(self, max_depth: int) -> Draft:
        depth = min(max_depth, self._largest.depth)
        return Draft(depth, self._largest.width) if depth > 0 else PLAIN


class Throughput:
    """Tokens of recent steps in the time of a plain one, for each power of two of running rows apart."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, float, float]] = {}

    def seen(self, rows: int, tokens: int, plain_steps: float) -> None:
        """A step of `rows` rows gave `tokens` and took as long as so many plain steps."""
        steps, all_tokens, all_taken = self._sums.get(power_of_two(rows), (0, 0.0, 0.0))
        fade = 1 - 1 / MEMORY_STEPS
        self._sums[power_of_two(rows)] = steps + 1, fade * all_tokens + tokens, fade * all_taken + plain_steps

    def value(self, rows: int, plain_s: float) -> float | None:
        """Tokens per second at about `rows` running rows, where a plain step takes `plain_s`; after a few steps."""
        steps, tokens, taken = self._sums.get(power_of_two(rows), (0, 0.0, 0.0))
        return tokens / taken / plain_s if steps >= WARM_STEPS else None


def _binomial(num: int, share: float) -> NDArray[np.float64]:
    """How likely 0, 1, .. `num` of `num` happen, each of which happens with the probability `share`."""
    share, times = min(max(share, 1e-12), 1 - 1e-12), np.arange(num + 1)
    log_factorial = np.cumsum(np.log(np.maximum(times, 1)))
    ways = log_factorial[-1] - log_factorial - log_factorial[::-1]
    likely: NDArray[np.float64] = np.exp(ways + times * np.log(share) + times[::-1] * np.log1p(-share))
    return likely


def _left(ahead: Ahead) -> float:
    """Tokens that a row may still give, on average; its end may come sooner."""
    return sum(ahead.caps) / ahead.rows + 1
