"""How likely the target keeps a drafted token, learned while the job runs.

    logit a = w_draft * logit q + w_rank * log(1 + rank) + b[depth]

with q the head's own probability of the token given its parent, `rank` its place among its siblings (0-based) and
`depth` its level (1-based): the form of vLLM's acceptance estimator (PR 47808), to which rank is added since its drafts
are chains. A tree tells more than whether a token was kept: every kept node has a target probability for each of its
drafted children, and such soft labels are learned from as they are. Nodes that were verified but not kept have them
too, but there the target reads what it would not have written: on the starter head, learning from these as well
predicts the tokens that count 4 to 11 % too low at depths 2 to 5, and from children of kept nodes alone within 1 %.

Nodes are remembered as counts in cells of (depth, rank, logit q), old ones fading, so that memory and the time of a
fit are bounded and a fit can repeat its Newton steps over all of them. A likelier or better ranked token is never
predicted to be kept less often than its sibling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_DEPTH = 8  # deeper levels share their bias
MAX_RANK = 15
MAX_LOGIT = 10.0  # float32 log-softmax says nothing finer about probabilities near 1
CELLS = (MAX_DEPTH, MAX_RANK + 1, 40)
MEMORY_NODES = 50_000  # of exponential forgetting: the weights' noise is then about 1 %
REFIT_CALLS = 50
# Nodes that are learned from together: a step of one row has a few, and the counting takes as long for these.
BATCH_NODES = 64
PRIOR_NODES = 50  # nodes that weigh as much as the prior

# [w_draft, w_rank, b of all depths, b of depth 1, of depth 2, ...]: a depth not drafted yet is like the others.
# Nearly the head's own word: on 3,288 children of kept nodes of the starter head (24 prompts, greedy, float32, width 3)
# the fit is 0.91, -0.19 and 0.12.
PRIOR = np.array([0.9, -0.1, -0.1, *[0.0] * MAX_DEPTH])
RIDGE = np.array([1.0, 1.0, 0.1, *[2.0] * MAX_DEPTH])
MIN_DRAFT_WEIGHT = 0.05


class Calibration:
    """Acceptance of a drafted token from its draft probability, its rank among its siblings and its depth."""

    def __init__(self) -> None:
        self._cells = np.zeros((3, *CELLS))  # nodes, labels, logit q
        self._fitted = PRIOR
        # Steps, those that the weights are fitted at, and whether anything was counted since.
        self._calls, self._refit_at, self._counted = 0, 1, False
        self._bins = np.zeros((3, 10))  # nodes, predictions, labels, by prediction
        self._weights = _weights(PRIOR)
        self._waiting: list[NDArray[Any]] = []

    def acceptance(self, logq: NDArray[Any], rank: NDArray[Any], depth: NDArray[Any]) -> NDArray[np.float32]:
        """Probability in (0, 1) that the target keeps each token once its parent is kept.

        `logq`, `rank` and `depth` broadcast.
        """
        w, level = self._weights, np.asarray(depth, np.intp)
        ranks = np.log1p(np.asarray(rank, np.float32))
        logit = w[0] * _logit(logq.astype(np.float32)) + w[1] * ranks + w[1 + level.clip(1, MAX_DEPTH)]
        # 12: the largest whole logit whose probability float32 tells well from 1.
        a: NDArray[np.float32] = 1 / (1 + np.exp(-logit.clip(-12.0, 12.0)))
        return a

    def learn(self, logq: NDArray[Any], rank: NDArray[Any], depth: NDArray[Any], label: NDArray[Any]) -> bool:
        """Learn from the drafted children of the root and of kept nodes, [N] each; whether acceptances have changed.

        `label` in [0, 1] is how likely the target was to keep the token: its probability, or whether it did.
        """
        if not len(label):
            return False
        self._calls += 1
        self._waiting.append(np.stack([logq, rank, depth, label]))
        # The first calls are learned from at once.
        if self._calls >= self._refit_at or sum(each.shape[1] for each in self._waiting) >= BATCH_NODES:
            self._count()
            self._counted = True
        return self._refit_in_time()

    def waits(self) -> bool:
        """A step drafted nothing: what was learned before is made use of no later; whether acceptances have changed."""
        self._calls += 1
        return self._refit_in_time()

    def _refit_in_time(self) -> bool:
        if self._calls < self._refit_at or not (self._counted or self._waiting):
            return False
        self._count()
        self._counted, self._refit_at = False, min(2 * self._calls, self._calls + REFIT_CALLS)
        self._refit()
        return True

    def _count(self) -> None:
        """Count what waits; it was predicted by the weights that stand."""
        if not self._waiting:
            return
        logq, rank, depth, label = np.concatenate(self._waiting, 1).astype(np.float64)
        self._waiting.clear()
        predicted = self.acceptance(logq, rank, depth)
        place = np.minimum(predicted * 10, 9).astype(int)
        self._bins += [np.bincount(place, values, 10) for values in (None, predicted, label)]
        logit = _logit(logq)
        at = np.ravel_multi_index(
            (
                np.clip(depth.astype(int), 1, MAX_DEPTH) - 1,
                np.clip(rank.astype(int), 0, MAX_RANK),
                np.minimum((logit + MAX_LOGIT) / (2 * MAX_LOGIT) * CELLS[2], CELLS[2] - 1).astype(int),
            ),
            CELLS,
        )
        self._cells *= np.exp(-len(label) / MEMORY_NODES)
        for sums, values in zip(self._cells.reshape(3, -1), (None, label, logit), strict=True):
            np.add(sums, np.bincount(at, values, len(sums)), out=sums)

    def report(self) -> dict[str, float]:
        """How well acceptance was predicted, over all nodes so far, each predicted before it was learned from.

        `expected` and `realised` are the means of prediction and label; `error` is the expected calibration error: the
        mean distance of the two in ten bins of prediction. All zero before the first node.
        """
        self._count()
        count, predicted, realised = self._bins
        nodes = max(count.sum(), 1.0)
        return {
            "nodes": int(count.sum()),
            "expected": float(predicted.sum() / nodes),
            "realised": float(realised.sum() / nodes),
            "error": float(np.abs(predicted - realised).sum() / nodes),
        }

    def _refit(self) -> None:
        level, rank, _ = np.nonzero(self._cells[0])
        count, kept, logit = self._cells[:, self._cells[0] > 0]
        x = np.column_stack(
            [logit / count, np.log1p(rank), np.ones_like(count), level[:, None] == np.arange(MAX_DEPTH)]
        )
        free = np.ones(len(PRIOR), bool)
        fitted = _newton(x, count, kept, self._fitted, free)
        for weight, bound, wrong in ((0, MIN_DRAFT_WEIGHT, np.less), (1, 0.0, np.greater)):
            if wrong(fitted[weight], bound):  # hold it at its bound and fit the others around it
                fitted[weight], free[weight] = bound, False
                fitted = _newton(x, count, kept, fitted, free)
        self._fitted = fitted
        nodes = count.sum()
        self._weights = _weights(PRIOR + nodes / (nodes + PRIOR_NODES) * (fitted - PRIOR))


def _logit(logq: NDArray[Any]) -> NDArray[Any]:
    """Log-odds of log-probabilities, within +-MAX_LOGIT up to rounding."""
    edge = float(np.log1p(np.exp(MAX_LOGIT)))
    logq = logq.clip(-edge, MAX_LOGIT - edge)
    logit: NDArray[Any] = (logq - np.log(-np.expm1(logq))).clip(-MAX_LOGIT, MAX_LOGIT)
    return logit


def _weights(fitted: NDArray[Any]) -> NDArray[np.float32]:
    """[w_draft, w_rank, b[1] .. b[MAX_DEPTH]] of what was fitted."""
    return np.concatenate([fitted[:2], fitted[2] + fitted[3:]]).astype(np.float32)


def _newton(
    x: NDArray[Any], count: NDArray[Any], kept: NDArray[Any], start: NDArray[Any], free: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The ridge logistic regression of `kept` of `count` on `x`, over the `free` weights."""
    w = start.copy()
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ w))
        slope = x.T @ (kept - count * p) - RIDGE * (w - PRIOR)
        curve = (x.T * (count * p * (1 - p))) @ x + np.diag(RIDGE)
        move = np.linalg.solve(curve[np.ix_(free, free)], slope[free]).clip(-1.0, 1.0)  # far off, Newton overshoots
        w[free] += move
        if np.abs(move).max() < 1e-6:
            break
    return w
