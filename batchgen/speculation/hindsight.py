"""What narrower and shallower drafts would have found, worked out from a few wide and deep ones.

A beam of width w drafts the w likeliest children of its w likeliest nodes of each level (`engines/torch/forest.py`),
and a wider beam drafts nearly all of these among others. So one wide draft prices every smaller shape on the same
tokens, with none of the noise of comparing different steps.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

KEPT_ROWS = 128
GRID = 512


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    """One recorded draft: how to value its candidates, their depths, and which of them a beam of each width had."""

    value: Callable[[], NDArray[Any]]
    depth: NDArray[Any]
    found: dict[int, NDArray[np.bool_]]


class Hindsight:
    """The newest drafted rows, `KEPT_ROWS` or a draft more, as beams of the given `widths` would have drafted them."""

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = set(widths)
        self._drafts: collections.deque[_Draft] = collections.deque()
        self._paths: list[NDArray[Any]] = []
        self._falling: dict[tuple[int, int], NDArray[np.float64]] = {}
        self.num_rows = 0

    @property
    def depth(self) -> int:
        """The deepest level on record."""
        return max((int(draft.depth.max()) for draft in self._drafts), default=0)

    def record(
        self, value: Callable[[], NDArray[Any]], score: NDArray[Any], parent: NDArray[Any], depth: NDArray[Any]
    ) -> None:
        """Remember a draft; see `Schedule.record`."""
        found = {width: truncate(score, parent, depth, width) for width in self._widths}
        self._drafts.append(_Draft(value, depth, found))
        self.num_rows += len(score)
        while self.num_rows - len(self._drafts[0].depth) >= KEPT_ROWS:
            self.num_rows -= len(self._drafts.popleft().depth)
        self.revalue()

    def revalue(self) -> None:
        """Value all drafts anew when they are looked at next."""
        self._paths.clear()
        self._falling.clear()

    def tokens(self, depth: int, width: int, rows: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Expected tokens of a step of `rows` rows by the number of nodes that it verifies, roots included.

        Counts are 0, 1, .. likeliest nodes beyond the roots, up to all that were drafted; of many, evenly spread ones.
        """
        if not self._paths:
            self._paths = [draft.value() for draft in self._drafts]
        if (depth, width) not in self._falling:
            drafts = zip(self._drafts, self._paths, strict=True)
            path = np.concatenate([p[draft.found[width] & (draft.depth <= depth) & (p > 0)] for draft, p in drafts])
            self._falling[depth, width] = np.concatenate([[0.0], np.cumsum(np.sort(path.astype(np.float64))[::-1])])
        kept = self._falling[depth, width]
        scale = rows / self.num_rows
        most = int(np.ceil((len(kept) - 1) * scale))
        nodes = np.linspace(0, most, min(most, GRID) + 1).round().astype(np.intp)
        return rows + nodes, rows + scale * np.interp(nodes / scale, np.arange(len(kept)), kept)


def truncate(score: NDArray[Any], parent: NDArray[Any], depth: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Which candidates of a wide beam [B, P] a beam of `width` would have drafted too.

    Siblings stand together, likeliest first. The result is all that it would have drafted, unless the wide beam left
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
        rank = np.arange(len(at)) - (above[:, :, None] == above[:, None, :]).argmax(-1)
        here = np.take_along_axis(beam, above, 1) & (rank < width)
        drafted[:, at] = here
        best = np.argsort(np.where(here, -score[:, at], np.inf), axis=1, kind="stable")[:, :width]
        in_beam = np.zeros_like(here)
        np.put_along_axis(in_beam, best, np.take_along_axis(here, best, 1), 1)
        beam[:, at] = in_beam
    return drafted
