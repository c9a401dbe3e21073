"""One budget of nodes for all running rows: which of everything that was drafted is verified in this step.

The expected tokens of a step are a root per row plus the path probabilities of the verified nodes. A child is at most
as likely as its parent, so any prefix of all candidates of all rows in falling order is a set of trees, and no set of
its size is expected to yield more (TETRIS, arXiv 2502.15197, for chains; OPT-Tree, arXiv 2406.17276, for one tree).
What is left is the size, and since costs have steps every permitted one is tried (as vLLM's adaptive verification does
for chains, PR 47808).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray


# Nodes of each row that are tried as even trees.
MOST_EVEN = 3


def select(
    path: NDArray[np.float32],
    *,
    num_roots: int,
    row_cap: int,
    sizes: ArrayLike,
    cost: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    throughput: float | None,
) -> NDArray[np.bool_]:
    """The nodes to verify, bool [B, P]: a node is chosen only with its parent, and none of probability 0.

    `path` float32 [B, P] is the calibrated probability that each candidate is kept; parents stand left of their
    children and are at least as likely; what may not be used is 0. `num_roots` is how many rows the pass holds: these
    and those that drafted nothing. `row_cap` bounds each row's nodes. `sizes` are the packed node counts, roots
    included, rising, that passes are padded to: a pass pays for its whole size, and the chosen one is filled as far as
    there are candidates; empty permits every count. Where none holds the roots, nothing is chosen. `cost` is the
    seconds of passes over packed counts, `throughput` in tokens per second; None takes the best ratio of this step
    alone, and `cost` must then be of the whole step.
    """
    num_rows, num_candidates = path.shape
    if num_candidates > row_cap:
        path = np.where(_rank_in_row(path) < row_cap, path, np.float32(0))
    # The size needs only the values, of which a sort is ten times faster than one that keeps places.
    falling = np.sort(path, axis=None)[::-1]
    falling = falling[: np.count_nonzero(falling > 0)]
    gains = num_roots + np.concatenate([[0.0], np.cumsum(falling, dtype=np.float64)])
    packed = np.asarray(sizes, np.int64)
    if not len(packed):
        packed = num_roots + np.arange(len(gains), dtype=np.int64)
    elif packed[-1] < num_roots:
        packed = np.array([num_roots], np.int64)
    else:  # beyond the first that holds all candidates they only cost more
        first, last = np.searchsorted(packed, (num_roots, num_roots + len(falling)))
        packed = packed[first : last + 1]
    num_nodes = np.minimum(packed - num_roots, len(falling))
    seconds = cost(packed)
    if throughput is None:
        throughput = best_ratio(gains[num_nodes], seconds)
    num_chosen = int(num_nodes[np.argmax(gains[num_nodes] - throughput * seconds)])
    if num_chosen == 0:
        return np.zeros(path.shape, bool)
    least = falling[num_chosen - 1]
    num_ties = num_chosen - int(np.count_nonzero(falling > least))
    # Of equals the shallower ones of all rows: a child ties with a parent that is certain to lead to it.
    by_level = path.T.reshape(-1)
    ties = by_level == least
    chosen: NDArray[np.bool_] = (by_level > least) | (ties & (ties.cumsum() <= num_ties))
    return chosen.reshape(num_candidates, num_rows).T


def even(path: NDArray[np.float32], num_nodes: int) -> NDArray[np.bool_]:
    """The `num_nodes` likeliest of each row's candidates, `path` as in `select`; what it has, where fewer."""
    return np.where(path > 0, _rank_in_row(path), num_nodes) < num_nodes


def best_ratio(gains: NDArray[np.float64], seconds: NDArray[np.float64]) -> float:
    """The most tokens per second that any one choice gives.

    That is Dinkelbach's fixed point, the throughput at which the best of `gains - throughput * seconds` is 0; with all
    choices at hand it needs no iterating.
    """
    return float((gains / seconds).max())


def _rank_in_row(path: NDArray[np.float32]) -> NDArray[np.intp]:
    """The place of each candidate in its row's falling order, ties by column."""
    order = np.argsort(-path, axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(path.shape[1])[None], 1)
    return place
