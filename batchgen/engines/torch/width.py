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
from batchgen.speculation.schedule import CHILDREN, PLAIN, SHAPES, STOPPING, Draft, Schedule, Throughput
from batchgen_kernels.tree_attention import MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from batchgen.speculation.costs import Costs
    from batchgen.speculation.schedule import Ahead


@dataclasses.dataclass(frozen=True, slots=True)
class Drafted:
    """What one step drafted for `rows` of its decoding rows, after catching up on `extend_tokens`."""

    shape: Shape
    rows: Sequence[int]
    extend_tokens: int
    candidates: Candidates


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
        """What to draft, and for which rows, rising; None for a plain step."""

    def keep(self, candidates: Candidates, caps: torch.Tensor, shape: Shape, ahead: Ahead) -> torch.Tensor:
        """The candidates to verify, bool [B, P] of B rows that drafted, each with its parent and none below `caps`."""

    def spent(self, step: Step, reached: Reached | None) -> None:
        """Learn from a step: what it took, and, of one that drafted, what it tells."""

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

    def keep(self, candidates: Candidates, caps: torch.Tensor, shape: Shape, ahead: Ahead) -> torch.Tensor:
        """See `Width`."""
        return forest.likeliest(candidates, caps, shape.nodes)

    def spent(self, step: Step, reached: Reached | None) -> None:
        """See `Width`."""

    def report(self) -> dict[str, Any]:
        """See `Width`."""
        return {}


class AutoTree:
    """The tree that pays: one budget over all rows, set anew in every step from measured costs.

    `sizes` as in `budget.select`. `stops_early` lets it look at each level before the next is drafted, and leave rows
    off that are unlikely to get there; where passes are queued on a device that would be a wait for each level.
    """

    learns = True

    def __init__(self, costs: Costs, sizes: Sequence[int] = (), *, stops_early: bool = False) -> None:
        self.costs = costs
        self._sizes = np.array(sizes, np.int64)
        self._calibration = Calibration()
        self._schedule = Schedule(costs, SHAPES + STOPPING if stops_early else SHAPES)
        self._throughput = Throughput()
        # Of the step that was planned last: whether it explores, has even trees, the seconds that deciding took and the
        # tokens of the head's passes.
        self._exploring = self._even = False
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
        self._exploring = plan.explores
        self._deciding_s = time.perf_counter() - began
        if plan.draft == PLAIN:
            return None
        depth, width, floor = dataclasses.astuple(plan.draft)
        return Shape(depth, width, MAX_NODES - 1, floor, CHILDREN), plan.rows

    def keep(self, candidates: Candidates, caps: torch.Tensor, shape: Shape, ahead: Ahead) -> torch.Tensor:
        """See `Width`."""
        began = time.perf_counter()
        columns = (candidates.logp, candidates.rank, candidates.parent, candidates.depth, caps)
        logp, rank, parent, depth, cap = (column.numpy() for column in columns)
        of_use = (depth <= cap[:, None]) & np.isfinite(logp)

        def value() -> NDArray[np.float32]:
            accepted = np.where(of_use, self._calibration.acceptance(logp, rank, depth), np.float32(0))
            return _along(accepted, parent, shape)

        path = value()
        if self._exploring:
            self._schedule.record(value, candidates.score.numpy(), parent, depth)
        rows, self._levels = ahead.rows, candidates.level_tokens(shape)
        throughput = self._throughput.value(rows, self._unit_s(rows, ahead.context))
        # What a step takes however many nodes it verifies tells only what its tokens are worth.
        drafting_s = 0.0 if throughput is not None else self._drafting_s(rows, ahead.context)
        kept = budget.select(
            path,
            num_roots=rows,
            row_cap=shape.nodes,
            sizes=self._sizes,
            cost=lambda nodes: drafting_s + self.costs.verify(nodes, ahead.context),
            throughput=throughput,
        )
        if throughput is not None and self.costs.even < 1.0 and len(path) == rows > 1:
            kept = self._evened(path, kept, throughput, ahead.context)
        self._expected += float(path[kept].sum())
        self._deciding_s += time.perf_counter() - began
        return torch.from_numpy(kept)

    def _evened(
        self, path: NDArray[np.float32], uneven: NDArray[np.bool_], throughput: float, context: int
    ) -> NDArray[np.bool_]:
        """`uneven`, or as many nodes of each row where that is worth more: rows that are alike make a faster pass."""
        rows, num_uneven = len(path), int(np.count_nonzero(uneven))
        gain = float(path[uneven].sum()) - throughput * self.costs.verify(rows + num_uneven, context)
        likeliest, num_even = np.sort(path, axis=1)[:, : -budget.MOST_EVEN - 1 : -1], 0
        for num_nodes in range(1, likeliest.shape[1] + 1):
            column = likeliest[:, :num_nodes]
            seconds = self.costs.even * self.costs.verify(rows + int(np.count_nonzero(column)), context)
            found = float(column.sum()) - throughput * seconds
            if found > gain:
                gain, num_even = found, num_nodes
        self._even = num_even > 0
        return budget.even(path, num_even) if num_even else uneven

    def spent(self, step: Step, reached: Reached | None) -> None:
        """See `Width`."""
        self._num_steps += 1
        self._num_roots += step.rows
        self._num_nodes += step.nodes - step.rows
        self._num_tokens += step.tokens
        self._forecast += self._expected
        drafted = step.drafted
        if drafted is not None:
            self._num_drafting += 1
            if reached is not None:
                features = (drafted.candidates.logp, drafted.candidates.rank, drafted.candidates.depth)
                logp, rank, depth = (feature.numpy()[reached.row, reached.column] for feature in features)
                if self._calibration.learn(logp, rank, depth, reached.chance):
                    self._schedule.revalue()
        # What a second is worth must be told by the clock that nodes are priced by: with costs that are all a third too
        # high, and tokens per real second, hardly a node would seem worth its price.
        drafting_s = self._drafting_s(drafted.extend_tokens, step.context) if drafted is not None else 0.0
        verify_s = float(self.costs.verify(step.nodes, step.context)) * (self.costs.even if self._even else 1.0)
        seconds = verify_s + drafting_s + self._deciding_s
        self._throughput.seen(step.rows, step.tokens, seconds / self._unit_s(step.rows, step.context))
        taken = step.draft_s + step.verify_s
        self._schedule.spent(taken)
        if step.captures:  # which takes longer than many passes
            return
        # What exploring steps draft is like nothing else; their pass of the target still tells how fast the machine is,
        # and at first they alone do.
        if drafted is not None and not self._exploring:
            ratio = (step.draft_s - self._deciding_s) / drafting_s
            passes = [(self.costs.extend, drafted.extend_tokens), *((self.costs.level, n) for n in self._levels[:1])]
            for table, tokens in passes:
                table.refine(tokens, step.context, ratio * table(tokens, step.context), RATE)
        if step.mixed:  # its seconds are the prompts' as well
            return
        if not self._exploring:
            draft = PLAIN if drafted is None else Draft(drafted.shape.depth, drafted.shape.width, drafted.shape.floor)
            self._schedule.timed(draft, step.tokens, taken, self._deciding_s)
        self.costs.refine_verify(step.nodes, step.context, step.verify_s, even=self._even)

    def _drafting_s(self, extend_tokens: int, context: int) -> float:
        """Seconds of the head's passes in the step that was planned last."""
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


def _along(accepted: NDArray[np.float32], parent: NDArray[np.int64], shape: Shape) -> NDArray[np.float32]:
    """The probability that each candidate is kept [B, P], from that of its acceptance once its parent is kept."""
    each = shape.width * shape.children
    for start in range(shape.children, accepted.shape[1], each):
        level = slice(start, start + each)
        accepted[:, level] *= np.take_along_axis(accepted, parent[:, level], 1)
    return accepted
