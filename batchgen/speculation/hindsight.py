"""What narrower and shallower drafts would have found, worked out from a few wide and deep ones.

A beam of width w drafts the likeliest children of its w likeliest nodes of each level (`engines/torch/forest.py`), and
a wider beam drafts nearly all of these among others. So one wide draft prices every smaller shape on the same
tokens, with none of the noise of comparing different steps; and drafts that leave rows off whose likeliest path has
become less likely than some floor.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from batchgen.speculation.budget import MOST_EVEN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

KEPT_ROWS = 128
GRID = 512


class Explored(NamedTuple):
    """What an explored step had to verify: candidates, [B, P] each in level order and of equal depths in every row.

    value: calls for the calibrated probability that each is kept, 0 where it is of no use, by what is known then; where
        L tokens were looked up, of these as well, and of these once more as without a draft: [B, P + 2 L]
    score: cumulative draft log-probability, by which the beam was chosen
    parent: the parent's column, -1 at depth 1
    twin: of each token that was looked up [B, L] the candidate that is the same in the same place, whose value it has,
        or -1
    """

    value: Callable[[], NDArray[Any]]
    score: NDArray[Any]
    parent: NDArray[Any]
    depth: NDArray[Any]
    twin: NDArray[Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    """One recorded draft: how to value its candidates, their scores and depths, and which a beam of each width had.

    `twin` is as in `Explored`.
    """

    value: Callable[[], NDArray[Any]]
    score: NDArray[Any]
    depth: NDArray[Any]
    twin: NDArray[Any]
    found: dict[int, NDArray[np.bool_]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Alike:
    """Drafts of the same depths, one below the other: values [B, P], depths [P], and what beams of each width had.

    `likeliest` [B, 1 + depth] is how likely the head takes the likeliest path of each length for, by width.
    `looked_up` are the values of what was looked up [B, L], `alone` those without a draft, and `twin` the candidates
    that are the same.
    """

    value: NDArray[Any]
    looked_up: NDArray[Any]
    alone: NDArray[Any]
    twin: NDArray[Any]
    depth: NDArray[Any]
    found: dict[int, NDArray[np.bool_]]
    likeliest: dict[int, NDArray[Any]]

    @staticmethod
    def of(drafts: list[_Draft]) -> _Alike:
        """Value `drafts` by what is known now."""
        whole, depth = [draft.value() for draft in drafts], drafts[0].depth[0]
        value = np.concatenate([each[:, : len(depth)] for each in whole])
        longest = max(draft.twin.shape[1] for draft in drafts)
        each_looked_up = [np.split(each[:, len(depth) :], 2, axis=1) for each in whole]
        looked_up, alone = (
            np.concatenate([_widened(each[i], longest, 0.0) for each in each_looked_up]) for i in range(2)
        )
        twin = np.concatenate([_widened(draft.twin, longest, -1) for draft in drafts])
        found = {width: np.concatenate([draft.found[width] for draft in drafts]) for width in drafts[0].found}
        starts, root = np.searchsorted(depth, np.arange(1, depth[-1] + 1)), np.ones((len(value), 1))
        path = np.where(value > 0, np.exp(np.concatenate([draft.score for draft in drafts])), 0.0)
        levels = {w: np.maximum.reduceat(np.where(had, path, 0), starts, axis=1) for w, had in found.items()}
        likeliest = {width: np.concatenate([root, best], 1) for width, best in levels.items()}
        return _Alike(value, looked_up, alone, twin, depth, found, likeliest)

    def of_use(self, depth: int, width: int, floor: float) -> NDArray[np.float64]:
        """The values of drafts of this shape and of what was looked up beside them [B, P + L], 0 of what is no use."""
        if depth == 0:
            return self.alone.astype(np.float64)
        drafted = self.found[width] & (self.depth <= depth)
        if floor > 0.0:
            drafted &= (self.likeliest[width] >= floor)[:, self.depth - 1]
        doubled = (self.twin >= 0) & np.take_along_axis(drafted, self.twin, 1)
        columns = (np.where(drafted, self.value, 0.0), np.where(doubled, 0.0, self.looked_up))
        return np.concatenate(columns, 1, dtype=np.float64)


class Hindsight:
    """The newest drafted rows, `KEPT_ROWS` or a draft more, as beams of the given `widths` would have drafted them.

    With a `floor`, a row is drafted below a level only where the head takes its likeliest path of that length for that
    likely. `depth` is the deepest level on record.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = set(widths)
        self._drafts: collections.deque[_Draft] = collections.deque()
        self._valued: list[_Alike] = []
        self._falling: dict[tuple[int, int, float], NDArray[np.float64]] = {}
        self._even: dict[tuple[int, int, float], NDArray[np.float64]] = {}
        self.num_rows = self.depth = 0
        self.looks_up = False  # whether anything ever was

    def record(self, explored: Explored) -> None:
        """Remember a draft."""
        value, score, parent, depth, twin = explored
        found = {width: truncate(score, parent, depth, width) for width in self._widths}
        self.looks_up |= twin is not None
        twin = np.empty((len(score), 0), np.int64) if twin is None else twin
        self._drafts.append(_Draft(value, score, depth, twin, found))
        self.num_rows += len(score)
        while self.num_rows - len(self._drafts[0].depth) >= KEPT_ROWS:
            self.num_rows -= len(self._drafts.popleft().depth)
        self.depth = max(int(draft.depth.max()) for draft in self._drafts)
        self.revalue()

    def revalue(self) -> None:
        """Value all drafts anew when they are looked at next."""
        self._valued.clear()
        self._falling.clear()
        self._even.clear()

    def tokens(
        self, depth: int, width: int, rows: int, floor: float = 0.0
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Expected tokens of a step of `rows` rows by the number of nodes that it verifies, roots included.

        Counts are 0, 1, .. likeliest nodes beyond the roots, up to all that were drafted; of many, evenly spread ones.
        """
        if (depth, width, floor) not in self._falling:
            path = np.concatenate([each.of_use(depth, width, floor).ravel() for each in self._all()])
            falling = np.cumsum(np.sort(path[path > 0])[::-1])
            self._falling[depth, width, floor] = np.concatenate([[0.0], falling])
        kept = self._falling[depth, width, floor]
        scale = rows / self.num_rows
        most = int(np.ceil((len(kept) - 1) * scale))
        nodes = np.linspace(0, most, min(most, GRID) + 1).round().astype(np.intp)
        return rows + nodes, rows + scale * np.interp(nodes / scale, np.arange(len(kept)), kept)

    def even_tokens(
        self, depth: int, width: int, rows: int, floor: float = 0.0
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The same where as many nodes of each row are verified: 1, 2, .. `MOST_EVEN` likeliest ones."""
        if (depth, width, floor) not in self._even:
            kept = np.zeros(MOST_EVEN)
            for alike in self._all():
                likeliest = np.sort(alike.of_use(depth, width, floor), axis=1)[:, : -MOST_EVEN - 1 : -1].sum(0)
                kept[: len(likeliest)] += likeliest
            self._even[depth, width, floor] = 1.0 + kept.cumsum() / self.num_rows
        return rows * np.arange(2, MOST_EVEN + 2), rows * self._even[depth, width, floor]

    def going_on(self, depth: int, width: int, floor: float) -> list[float]:
        """The share of all rows that is drafted below level 1, below level 2, .. to `depth`."""
        num_going = np.zeros(depth - 1)
        for alike in self._all():
            going = (alike.likeliest[width][:, 1:depth] >= floor).sum(0)
            num_going[: len(going)] += going
        shares: list[float] = (num_going / self.num_rows).tolist()
        return shares

    def _all(self) -> list[_Alike]:
        if not self._valued:
            alike: dict[bytes, list[_Draft]] = {}
            for draft in self._drafts:
                alike.setdefault(draft.depth[0].tobytes(), []).append(draft)
            self._valued = [_Alike.of(drafts) for drafts in alike.values()]
        return self._valued


def _widened(values: NDArray[Any], columns: int, fill: float) -> NDArray[Any]:
    more = np.full((len(values), columns - values.shape[1]), fill, values.dtype)
    return np.concatenate([values, more], 1)


def truncate(score: NDArray[Any], parent: NDArray[Any], depth: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Which candidates of a wide beam [B, P] a beam of `width` would have drafted too.

    The result is all that it would have drafted, unless the wide beam left
    one of its nodes for likelier ones: then what the narrow beam would have found below that node is missing, and it
    is valued too low by that.
    """
    num_rows, num_candidates = score.shape
    drafted = np.zeros((num_rows, num_candidates), bool)
    beam = np.zeros((num_rows, num_candidates + 1), bool)
    beam[:, -1] = True  # the root, where parent -1 finds it
    for level in range(1, depth.max() + 1):
        at = np.flatnonzero(depth[0] == level)
        above = parent[:, at]
        here = np.take_along_axis(beam, above, 1)
        drafted[:, at] = here
        best = np.argsort(np.where(here, -score[:, at], np.inf), axis=1, kind="stable")[:, :width]
        in_beam = np.zeros_like(here)
        np.put_along_axis(in_beam, best, np.take_along_axis(here, best, 1), 1)
        beam[:, at] = in_beam
    return drafted
