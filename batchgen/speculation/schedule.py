"""How deep and wide to draft in the next step, before anything of it is known: by what recent drafts would have given.

Now and then a step *explores*: it drafts with the largest shape, and what it found tells what every smaller one would
have (`hindsight`). For the rows of the next step the recorded rows stand as a sample, which gives the tokens expected
of any number of verified nodes; the costs of passes give the seconds.

Shapes are compared by tokens per second, as if they went on forever: the head then catches up on what a step of that
shape keeps, and on the prompts of rows that arrive. After plain steps far more may be pending, and a step that looked
only at itself would never draft again. That debt is paid once, so a shape bears a share of it, as if it were repaid
over `REPAY_STEPS` steps, or over fewer where the rows that owe it end before.

What a shape promises is taken for as much as promises proved worth (`outcomes`), and must still be a little more than
a plain step. While drafting pays little, a plain step is taken now and then to compare with.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from batchgen.speculation.hindsight import Hindsight
from batchgen.speculation.outcomes import Outcomes, bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from batchgen.speculation.costs import Costs

REPAY_STEPS = 64
# Over how many steps the prompt tokens that arrive, by running row, are averaged.
ARRIVAL_STEPS = 128
# What drafting must promise, as a multiple of plain tokens per second.
MARGIN = 1.03
# What the plain steps may cost that are taken beside drafting ones, and the least number of steps between two.
PLAIN_SHARE, PLAIN_EVERY = 0.005, 8
EXPLORE_SHARE = 0.005
# Steps between two explorations, and between two looks at the same question where nothing was explored.
EXPLORE_STEPS, DECISION_STEPS = 32, 8
# Before exploring has to be paid for: the first row of a small batch may be nothing like the next, and the first step
# of a large one is judged by a calibration that has seen nothing.
FIRST_ROWS, FIRST_STEPS = 16, 4
# Steps between those of few rows, whose first tokens are unlike what follows.
FIRST_PAUSE = 4
# Rows that explore where the others go on plainly: those with the least to catch up on.
EXPLORE_ROWS = 16
# Steps that make a throughput, and steps that it remembers.
WARM_STEPS, MEMORY_STEPS = 4, 64


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """How deep and wide to draft; `Draft(0, 0)` is a plain step."""

    depth: int
    width: int

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
    """The shape of a step, the rows that draft (all but where only some explore), and whether it explores."""

    draft: Draft
    rows: Sequence[int]
    explores: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Promise:
    """What is foretold of steps of a shape.

    worth: `gain` while what is pending is paid back, and as much of it as promises proved worth
    gain: tokens, as a multiple of what plain steps give in the same seconds
    fed: tokens that the head catches up on
    """

    draft: Draft
    worth: float
    gain: float = 1.0
    seconds: float = 0.0
    fed: float = 0.0


PLAIN = Draft(0, 0)
_NOTHING = _Promise(PLAIN, MARGIN)
# Of equals the first is taken, so cheap ones stand first. Width 2 and 4 begin at depth 1, where they cost no pass.
SHAPES = (PLAIN, *(Draft(depth + 1, width) for width, depths in ((1, 6), (2, 5), (4, 6)) for depth in range(depths)))


class Schedule:
    """Chooses the shape of each step, and which steps explore.

    A step is `next`, then `record` if it explores, then `spent` and, if it was a usual one, `timed`.
    """

    def __init__(self, costs: Costs, shapes: Sequence[Draft] = SHAPES) -> None:
        self._costs, self._shapes = costs, tuple(shapes)
        self._largest = Draft(max(s.depth for s in shapes), max(s.width for s in shapes))
        self._seen = Hindsight([s.width for s in shapes if s != PLAIN])
        self._outcomes = Outcomes()
        self._promised = _NOTHING
        self._drafted = 0
        self._decided: dict[tuple[object, ...], tuple[_Promise, int]] = {}
        self._calls = self._num_recorded = 0
        self._allowance_s, self._since, self._arriving = 0.0, EXPLORE_STEPS, 0.0

    def next(self, ahead: Ahead) -> Plan:
        """What this step drafts, and whether it explores: if so, `record` wants what it drafts.

        The first `FIRST_STEPS` explore, and every `FIRST_PAUSE`th one until `FIRST_ROWS` rows are on record. From then
        on one may lose at most `EXPLORE_SHARE` of all time since the last one. Where the step that was chosen drafts,
        too, that is by what both promise; beside plain steps it is what drafting takes, the head's catch-up included,
        so with much pending it waits.
        """
        self._arriving += (ahead.arrived / ahead.rows - self._arriving) / ARRIVAL_STEPS
        self._promised = promise = self._choose(ahead)
        chosen = promise.draft
        largest = self._largest_within(max(ahead.caps))
        self._since += 1
        # A plain step among drafting ones loses what those gain.
        if self._drafted >= max(PLAIN_EVERY, (1 - 1 / promise.worth) / PLAIN_SHARE):
            chosen = PLAIN
        self._drafted = 0 if chosen == PLAIN else self._drafted + 1
        usual = Plan(chosen, range(ahead.rows), explores=False)
        if largest == PLAIN:
            return usual
        known = self._num_recorded >= FIRST_STEPS
        warm = known and self._seen.num_rows >= FIRST_ROWS
        near_end = max(ahead.caps) < self._seen.depth  # all rows are: nothing to learn for those that follow
        if (warm and near_end) or (known and self._since < (EXPLORE_STEPS if warm else FIRST_PAUSE)):
            return usual
        rows: Sequence[int] = range(ahead.rows)
        if chosen == PLAIN:
            of_use = (row for row in rows if ahead.caps[row] >= largest.depth)
            rows = sorted(sorted(of_use, key=lambda row: ahead.pending[row])[:EXPLORE_ROWS])
        if warm:
            if chosen == PLAIN:
                excess = self._drafting_s(largest, rows, ahead)
            else:
                wide = self._promise(largest, ahead)
                excess = wide.seconds * (1 - wide.gain / promise.gain)
            if excess > self._allowance_s:
                return usual
        # Nothing is carried over: savings of an hour must not buy a minute of exploring.
        self._allowance_s, self._since = 0.0, 0
        return Plan(largest, rows, explores=True)

    def spent(self, seconds: float) -> None:
        """A step took `seconds`; exploring lives on a share of them."""
        self._allowance_s += EXPLORE_SHARE * seconds

    def timed(self, draft: Draft, ahead: Ahead, tokens: int, seconds: float) -> None:
        """A step that neither explored nor read prompts took `seconds` and gave `tokens`; `draft` is its shape.

        `ahead` as in `next`.
        """
        rows, plain_s = ahead.rows, self._plain_s(ahead)
        if draft == PLAIN:
            self._outcomes.plain(rows, seconds, plain_s)
        elif draft == self._promised.draft:
            # What else was pending is paid once.
            extend = self._costs.extend
            debt = extend(sum(ahead.pending), ahead.context) - extend(self._promised.fed, ahead.context)
            self._outcomes.drafted(rows, draft, self._promised.gain, tokens, seconds - debt, plain_s)

    def record(
        self,
        value: Callable[[], NDArray[Any]],
        score: NDArray[Any],
        parent: NDArray[Any],
        depth: NDArray[Any],
        width: int,
    ) -> None:
        """Remember an explored step's candidates, [B, P] each in level order and of equal depths in every row.

        `value` returns the calibrated probability that a candidate is kept, 0 where it is of no use, by what is known
        when it is called; `score` is the cumulative draft log-probability, by which the beam of `width` was chosen;
        `parent` the parent's column, -1 at depth 1.
        """
        assert width == self._largest.width, "a narrow beam does not tell what a wider one would have found"
        self._seen.record(value, score, parent, depth)
        self._decided.clear()
        self._num_recorded += 1

    def revalue(self) -> None:
        """The calibration has changed: value what is recorded anew when the next question comes up."""
        self._seen.revalue()

    def choose(self, ahead: Ahead) -> Draft:
        """The shape to draft: the most tokens per second, plain where none promises `MARGIN` times as many.

        Plain as well while nothing is recorded. A decision stands for `DECISION_STEPS` calls.
        """
        return self._choose(ahead).draft

    def _choose(self, ahead: Ahead) -> _Promise:
        if not self._seen.num_rows:
            return _NOTHING
        pending, max_depth = sum(ahead.pending) // ahead.rows, max(ahead.caps)
        # What a step or two gave is no debt, and then it does not matter how long a row would have to repay it.
        debt = (pending.bit_length(), int(min(_left(ahead), REPAY_STEPS)).bit_length()) if pending > 8 else None
        key = bucket(ahead.rows), debt, min(max_depth, self._largest.depth)
        self._calls += 1
        promise, until = self._decided.get(key, (_NOTHING, 0))
        if self._calls >= until:
            shapes = [shape for shape in self._shapes if 0 < shape.depth <= max_depth]
            promises = [_NOTHING, *(self._promise(shape, ahead) for shape in shapes)]
            promise = max(promises, key=lambda promise: promise.worth)
            self._decided[key] = promise, self._calls + DECISION_STEPS
        return promise

    def _promise(self, shape: Draft, ahead: Ahead) -> _Promise:
        """What `shape` promises with the best number of verified nodes."""
        rows, context, extend = ahead.rows, ahead.context, self._costs.extend
        nodes, tokens = self._seen.tokens(shape.depth, shape.width, rows)
        fed, levels = tokens + rows * self._arriving, shape.level_tokens(rows)
        step = self._costs.step(rows=rows, extend_tokens=fed, level_tokens=levels, nodes=nodes, context=context)
        debt = np.maximum(extend(sum(ahead.pending), context) - extend(fed, context), 0.0)
        steps = np.clip(_left(ahead) * rows / tokens, 1, REPAY_STEPS)
        best = int((tokens / (step + debt / steps)).argmax())
        plain_steps = tokens[best] / rows * self._plain_s(ahead) * self._outcomes.slower(rows)
        worth = plain_steps / (step + debt / steps)[best] * self._outcomes.kept(rows, shape)
        return _Promise(shape, float(worth), float(plain_steps / step[best]), float(step[best]), float(fed[best]))

    def _plain_s(self, ahead: Ahead) -> float:
        rows = ahead.rows
        return self._costs.step(rows=rows, extend_tokens=0, level_tokens=[], nodes=rows, context=ahead.context)

    def _drafting_s(self, shape: Draft, rows: Sequence[int], ahead: Ahead) -> float:
        levels = self._costs.level(np.array(shape.level_tokens(len(rows))), ahead.context)
        return self._costs.extend(sum(ahead.pending[row] for row in rows), ahead.context) + float(levels.sum())

    def _largest_within(self, max_depth: int) -> Draft:
        depth = min(max_depth, self._largest.depth)
        return Draft(depth, self._largest.width) if depth > 0 else PLAIN


class Throughput:
    """Tokens per second of recent steps, for each power of two of running rows apart."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, float, float]] = {}

    def seen(self, rows: int, tokens: int, seconds: float) -> None:
        """A step of `rows` rows gave `tokens` in `seconds`."""
        steps, all_tokens, all_seconds = self._sums.get(bucket(rows), (0, 0.0, 0.0))
        fade = 1 - 1 / MEMORY_STEPS
        self._sums[bucket(rows)] = steps + 1, fade * all_tokens + tokens, fade * all_seconds + seconds

    def value(self, rows: int) -> float | None:
        """Tokens per second at about `rows` running rows, once a few steps have shown it."""
        steps, tokens, seconds = self._sums.get(bucket(rows), (0, 0.0, 0.0))
        return tokens / seconds if steps >= WARM_STEPS else None


def _left(ahead: Ahead) -> float:
    """Tokens that a row may still give, on average; its end may come sooner."""
    return sum(ahead.caps) / ahead.rows + 1
