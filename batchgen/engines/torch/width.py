"""What a step drafts and what of it is verified: always the same tree, or what pays now.

`AutoTree` is where `batchgen.speculation` meets the engine. Before drafting, `schedule` picks depth and width; after
it, `calibration` turns draft probabilities into acceptance and `budget` spends one number of nodes over all rows.
Neither ever sees the noise that tokens are drawn with, so tokens do not depend on what they decide.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from batchgen.engines.torch import forest
from batchgen.engines.torch.forest import Candidates, Shape
from batchgen.speculation import budget
from batchgen.speculation.calibration import Calibration
from batchgen.speculation.costs import RATE
from batchgen.speculation.hindsight import Explored
from batchgen.speculation.lookup import Found, Kept
from batchgen.speculation.schedule import CHILDREN, PLAIN, SHAPES, STOPPING, Draft, Schedule, Throughput
from batchgen_kernels.tree_attention import MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from batchgen.speculation.costs import Costs
    from batchgen.speculation.lookup import History, Merged
    from batchgen.speculation.schedule import Ahead


# Trees are even if that many of the rows have as many nodes.
EVEN_ROWS = 0.9


@dataclasses.dataclass(frozen=True, slots=True)
class Drafted:
    """What there was to verify in one step, candidates [B, P] of B of its decoding rows, `rows`.

    The head drafted `shape`, after catching up on `extend_tokens`; None: it did not. Of the candidates the last columns
    were looked up, as `merged` says; None: none were.
    """

    shape: Shape | None
    rows: Sequence[int]
    extend_tokens: int
    candidates: Candidates
    merged: Merged | None = None

    @property
    def num_drafted(self) -> int:
        """Columns of the candidates that the head drafted."""
        return self.candidates.token.shape[1] - (0 if self.merged is None else self.merged.twin.shape[1])

    def level_tokens(self) -> list[int]:
        """Tokens of each pass of the head that drafted these, after the catch-up that gave level 1."""
        if self.shape is None:
            return []
        drafted = self.candidates.logp.isfinite()
        if not self.shape.floor:
            return [int(drafted[:, 0].sum()) * self.shape.width] * (self.shape.depth - 1)
        first = drafted[:, self.shape.children : self.num_drafted : self.shape.width * self.shape.children]
        return [num * self.shape.width for num in first.sum(0).tolist()]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What one step of `rows` decoding rows took and gave.

    `context` tokens stood before the roots of all rows, `nodes` were verified, roots included, and gave `tokens`.
    `mixed` says that prompts were read in the same pass, `captures` that passes were captured to be replayed later.
    """

    rows: int
    context: int
    nodes: int
    tokens: int
    draft_s: float
    verify_s: float
    mixed: bool
    captures: bool
    drafted: Drafted | None


class Reached(NamedTuple):
    """What a step tells of M candidates whose parents were kept: row of the draft, column, probability by the target.

    Of what was verified, that is: every drafted child of a root, and of accepted nodes.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    chance: NDArray[np.float64]


class Width(Protocol):
    """Decides what each step drafts and verifies; one that `learns` is told what became of it."""

    learns: bool

    def plan(self, ahead: Ahead) -> tuple[Shape, Sequence[int]] | None:
        """What the head drafts, and for which rows, rising; None: nothing."""

    def look_up(self, histories: Callable[[], list[History]], caps: Sequence[int]) -> Found | None:
        """What is to be looked up for all rows, which have these histories, beside what the head drafts."""

    def keep(self, drafted: Drafted, caps: torch.Tensor, ahead: Ahead) -> torch.Tensor:
        """The candidates to verify, bool [B, P] of B rows, each with its parent and none below `caps`."""

    def spent(self, step: Step, reached: Callable[[], Reached] | None) -> None:
        """Learn from a step: what it took, and, of one that drafted, what it tells: that is `reached`."""

    def report(self) -> dict[str, Any]:
        """What was expected and what came, for the job's summary."""


class FixedTree:
    """The same tree for every row in every step."""

    learns = False

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def plan(self, ahead: Ahead) -> tuple[Shape, Sequence[int]] | None:
        """See `Width`."""
        depth = min(self._shape.depth, max(ahead.caps))
        return (dataclasses.replace(self._shape, depth=depth), range(ahead.rows)) if depth > 0 else None

    def look_up(self, histories: Callable[[], list[History]], caps: Sequence[int]) -> Found | None:
        """See `Width`."""
        return None

    def keep(self, drafted: Drafted, caps: torch.Tensor, ahead: Ahead) -> torch.Tensor:
        """See `Width`."""
        assert drafted.shape is not None
        return forest.likeliest(drafted.candidates, caps, drafted.shape.nodes)

    def spent(self, step: Step, reached: Callable[[], Reached] | None) -> None:
        """See `Width`."""

    def report(self) -> dict[str, Any]:
        """See `Width`."""
        return {}


class AutoTree:
    """The tree that pays: one budget over all rows, set anew in every step from measured costs.

    `sizes` as in `budget.select`. With `lookup` what rows repeat of themselves is verified, too. `stops_early` lets it
    look at each level before the next is drafted, and leave rows off that are unlikely to get there; where passes are
    queued on a device that would be a wait for each level.
    """

    learns = True

    def __init__(
        self, costs: Costs, sizes: Sequence[int] = (), *, lookup: bool = True, stops_early: bool = False
    ) -> None:
        self.costs = costs
        self._lookup = Kept() if lookup else None
        self._sizes = np.array(sizes, np.int64)
        self._calibration = Calibration()
        self._schedule = Schedule(costs, SHAPES + STOPPING if stops_early else SHAPES)
        self._throughput = Throughput()
        # Of the step that was planned last: whether it explores, looks up and has even trees, the seconds that deciding
        # took, and the tokens of the head's passes.
        self._exploring = self._looks_up = self._even = False
        self._deciding_s = 0.0
        self._levels: list[int] = []
        self._expected = 0.0
        self._num_steps = self._num_drafting = self._num_nodes = self._num_roots = self._num_tokens = 0
        self._forecast = 0.0

    def plan(self, ahead: Ahead) -> tuple[Shape, Sequence[int]] | None:
        """See `Width`."""
        began = time.perf_counter()
        self._expected, self._even, self._levels = float(ahead.rows), False, []
        plan = self._schedule.next(ahead)
        self._exploring, self._looks_up = plan.explores, plan.looks_up
        self._deciding_s = time.perf_counter() - began
        if plan.draft == PLAIN:
            return None
        depth, width, floor = dataclasses.astuple(plan.draft)
        return Shape(depth, width, MAX_NODES - 1, floor, CHILDREN), plan.rows

    def look_up(self, histories: Callable[[], list[History]], caps: Sequence[int]) -> Found | None:
        """See `Width`."""
        if self._lookup is None or not self._looks_up:
            return None
        began = time.perf_counter()
        found = Found.of(histories(), caps)
        self._deciding_s += time.perf_counter() - began
        return found if found.token.size else None

    def keep(self, drafted: Drafted, caps: torch.Tensor, ahead: Ahead) -> torch.Tensor:
        """See `Width`."""
        began = time.perf_counter()
        candidates, merged, shape = drafted.candidates, drafted.merged, drafted.shape
        logp, rank, parent, depth = candidates.logp, candidates.rank, candidates.parent, candidates.depth
        offer = _Offer(logp.numpy(), rank.numpy(), parent.numpy(), depth.numpy(), caps.numpy(), merged, shape)
        num, path = drafted.num_drafted, offer.value(self._calibration, self._lookup)
        if self._exploring:
            self._record(offer, candidates.score.numpy()[:, :num])
        rows, self._levels = ahead.rows, drafted.level_tokens()
        throughput = self._throughput.value(rows, self._unit_s(rows, ahead.context))
        # What a step takes however many nodes it verifies tells only what its tokens are worth.
        fed = rows if shape is not None else 0  # as in a step like many, whatever is pending in this one
        drafting_s = 0.0 if throughput is not None else self._drafting_s(fed, ahead.context)
        if merged is not None:
            path[:, num:][merged.twin >= 0] = 0.0  # what has a twin is verified as that
        kept = budget.select(
            path,
            num_roots=rows,
            row_cap=MAX_NODES - 1,
            sizes=self._sizes,
            cost=lambda nodes: drafting_s + self.costs.verify(nodes, ahead.context),
            throughput=throughput,
        )
        if throughput is not None and self.costs.even < 1.0 and len(path) == rows > 1:
            kept = self._evened(path, kept, throughput, ahead.context)
        if self._exploring and num:
            # Who is believed to be right never would not be verified, and could not be found to be right again.
            first = np.isfinite(logp.numpy()[:, 0]) & offer.of_use[:, 0] & (kept.sum(1) < MAX_NODES - 1)
            kept[:, 0] |= first
        self._expected += float(path[kept].sum())
        self._deciding_s += time.perf_counter() - began
        return torch.from_numpy(kept)

    def _record(self, offer: _Offer, score: NDArray[np.float32]) -> None:
        """Remember what the rows that explored had to verify; of the others there is nothing of a head."""
        rows, num = np.flatnonzero(np.isfinite(score[:, 0])), score.shape[1]
        mine = offer.of_rows(rows)

        def value() -> NDArray[np.float32]:
            path = mine.value(self._calibration, self._lookup)
            if mine.merged is None or self._lookup is None:
                return path
            alone = self._lookup.share(mine.merged.alone) * mine.of_use[:, num:]
            return np.concatenate([path, np.cumprod(alone, axis=1)], 1)

        twin = None if mine.merged is None else mine.merged.twin
        self._schedule.record(Explored(value, score[rows], mine.parent[:, :num], mine.depth[:, :num], twin))

    def _evened(
        self, path: NDArray[np.float32], uneven: NDArray[np.bool_], throughput: float, context: int
    ) -> NDArray[np.bool_]:
        """`uneven`, or as many nodes of each row where that is worth more: rows that are alike make a faster pass."""
        rows, num_uneven = len(path), int(np.count_nonzero(uneven))
        gain = float(path[uneven].sum()) - throughput * self.costs.verify(rows + num_uneven, context)
        likeliest, num_even = np.sort(path, axis=1)[:, : -budget.MOST_EVEN - 1 : -1], 0
        for num_nodes in range(1, likeliest.shape[1] + 1):
            column = likeliest[:, :num_nodes]
            if np.count_nonzero(column[:, -1]) < EVEN_ROWS * rows:
                break
            seconds = self.costs.even * self.costs.verify(rows + int(np.count_nonzero(column)), context)
            found = float(column.sum()) - throughput * seconds
            if found > gain:
                gain, num_even = found, num_nodes
        self._even = num_even > 0
        return budget.even(path, num_even) if num_even else uneven

    def spent(self, step: Step, reached: Callable[[], Reached] | None) -> None:
        """See `Width`."""
        self._num_steps += 1
        self._num_roots += step.rows
        self._num_nodes += step.nodes - step.rows
        self._num_tokens += step.tokens
        self._forecast += self._expected
        drafted = step.drafted
        headed = drafted is not None and drafted.shape is not None
        self._num_drafting += headed
        began = time.perf_counter()
        if drafted is not None and reached is not None:
            self._learn(drafted, reached())
        elif self._calibration.waits():
            self._schedule.revalue()
        deciding_s = self._deciding_s + time.perf_counter() - began
        # What a second is worth must be told by the clock that nodes are priced by: with costs that are all a third too
        # high, and tokens per real second, hardly a node would seem worth its price.
        drafting_s = self._drafting_s(drafted.extend_tokens, step.context) if drafted is not None else 0.0
        verify_s = float(self.costs.verify(step.nodes, step.context)) * (self.costs.even if self._even else 1.0)
        seconds = verify_s + drafting_s + deciding_s
        self._throughput.seen(step.rows, step.tokens, seconds / self._unit_s(step.rows, step.context))
        taken = step.draft_s + step.verify_s + deciding_s - self._deciding_s
        self._schedule.spent(taken)
        if step.captures:  # which takes longer than many passes
            return
        # What exploring steps draft is like nothing else; their pass of the target still tells how fast the machine is,
        # and at first they alone do.
        if drafted is not None and headed and not self._exploring:
            ratio = (step.draft_s - self._deciding_s) / drafting_s
            passes = [(self.costs.extend, drafted.extend_tokens), *((self.costs.level, n) for n in self._levels[:1])]
            for table, tokens in passes:
                table.refine(tokens, step.context, ratio * table(tokens, step.context), RATE)
        if step.mixed:  # its seconds are the prompts' as well
            return
        if not self._exploring:
            shape = None if drafted is None else drafted.shape
            draft = PLAIN if shape is None else Draft(shape.depth, shape.width, shape.floor)
            self._schedule.timed(draft, step.tokens, taken, verify_s, deciding_s)
        self.costs.refine_verify(step.nodes, step.context, step.verify_s, even=self._even)

    def _learn(self, drafted: Drafted, reached: Reached) -> None:
        features = (drafted.candidates.logp, drafted.candidates.rank, drafted.candidates.depth)
        logp, rank, depth = (feature.numpy()[reached.row, reached.column] for feature in features)
        own, merged = np.isfinite(logp), drafted.merged
        if merged is not None and self._lookup is not None:
            kind = merged.kind[reached.row, reached.column]
            self._lookup.learn(kind, reached.chance)
            # The head's word is judged where there is no other.
            rival = merged.rival[reached.row, np.minimum(reached.column, drafted.num_drafted - 1)] if own.any() else 0
            own &= (kind == 0) & (rival == 0)
        if self._calibration.learn(logp[own], rank[own], depth[own], reached.chance[own]):
            self._schedule.revalue()

    def _drafting_s(self, extend_tokens: int, context: int) -> float:
        """Seconds of the head's passes in the step that was planned last; none where it drafted nothing."""
        if not extend_tokens:
            return 0.0
        levels_s = sum(self.costs.level(tokens, context) for tokens in self._levels)
        return self.costs.extend(extend_tokens, context) + levels_s

    def _unit_s(self, rows: int, context: int) -> float:
        """Seconds of a plain step as it is priced now; the clock changes with the machine's speed."""
        return float(self.costs.verify(rows, context))

    def report(self) -> dict[str, Any]:
        """See `Width`; `expected_tokens` and `tokens` are per decoding step of all rows."""
        if not self._num_steps:
            return {}
        return {
            "steps": self._num_steps,
            "drafting_steps": self._num_drafting,
            "nodes_per_row": round(self._num_nodes / self._num_roots, 3),
            "expected_tokens_per_step": round(self._forecast / self._num_steps, 3),
            "tokens_per_step": round(self._num_tokens / self._num_steps, 3),
            "calibration": self._calibration.report(),
        }


@dataclasses.dataclass(frozen=True, slots=True)
class _Offer:
    """Candidates of B rows, [B, P] each, L of them looked up as `merged` says, to be valued by what is known."""

    logp: NDArray[np.float32]
    rank: NDArray[np.int64]
    parent: NDArray[np.int64]
    depth: NDArray[np.int64]
    cap: NDArray[np.int64]
    merged: Merged | None
    shape: Shape | None

    @property
    def of_use(self) -> NDArray[np.bool_]:
        """Whether a row may still give as many tokens."""
        of_use: NDArray[np.bool_] = self.depth <= self.cap[:, None]
        return of_use

    def of_rows(self, rows: NDArray[np.intp]) -> _Offer:
        """The same of some rows."""
        merged = None if self.merged is None else self.merged.of_rows(rows)
        tokens = (self.logp[rows], self.rank[rows], self.parent[rows], self.depth[rows])
        return _Offer(*tokens, self.cap[rows], merged, self.shape)

    def value(self, calibration: Calibration, lookup: Kept | None) -> NDArray[np.float32]:
        """The probability that each is kept, 0 where it is of no use; of what was looked up that of its twin."""
        drafted = calibration.acceptance(self.logp, self.rank, self.depth)
        accepted = np.where(np.isfinite(self.logp), drafted, np.float32(0))
        if self.merged is None or lookup is None:
            return _along(accepted * self.of_use, self.parent, self.shape)
        twin, kind, num = self.merged.twin, self.merged.kind, self.merged.rival.shape[1]
        share = lookup.share(kind)
        looked_up = share[:, num:]
        if num:
            rows, of_twin = np.arange(len(twin))[:, None], twin >= 0
            looked_up = np.where(of_twin, share[rows, twin], looked_up)
            # What the head leaves to others than the twin is theirs in what the lookup leaves.
            left = (1 - looked_up) / np.maximum(1 - np.where(of_twin, accepted[rows, twin], 0), 1e-3)
            left = np.concatenate([np.ones((len(twin), 1), np.float32), np.minimum(left, 1)], 1)
            accepted[:, :num] *= left[rows, self.merged.rival]
        accepted = np.where(kind > 0, share, accepted) * self.of_use
        path = _along(accepted[:, :num], self.parent, self.shape)
        return np.concatenate([path, _beside(path, accepted[:, num:], twin)], 1)


def _along(accepted: NDArray[np.float32], parent: NDArray[np.int64], shape: Shape | None) -> NDArray[np.float32]:
    """The probability that each candidate is kept [B, P], from that of its acceptance once its parent is kept."""
    if shape is None:
        return accepted
    each = shape.width * shape.children
    for start in range(shape.children, accepted.shape[1], each):
        level = slice(start, start + each)
        accepted[:, level] *= np.take_along_axis(accepted, parent[:, level], 1)
    return accepted


def _beside(path: NDArray[np.float32], accepted: NDArray[np.float32], twin: NDArray[np.int64]) -> NDArray[np.float32]:
    """The same of what was looked up [B, L]: each below the one before it; of a twin that of the candidate it is."""
    beside, rows = np.ones((len(path), 1 + twin.shape[1]), np.float32), np.arange(len(path))
    for level in range(twin.shape[1]):
        own = beside[:, level] * accepted[:, level]
        drafted = path[rows, twin[:, level]] if path.shape[1] else own
        beside[:, level + 1] = np.where(twin[:, level] >= 0, drafted, own)
    return beside[:, 1:]
