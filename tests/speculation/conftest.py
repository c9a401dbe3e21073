"""What tests of the schedule share: drafts, rows, costs."""

from __future__ import annotations

from unittest import mock

import numpy as np

from batchgen.speculation import outcomes
from batchgen.speculation.costs import Costs, Table
from batchgen.speculation.schedule import Ahead

# What is never tried is taken for somewhat more than it says; here for just that.
taken_at_their_word = mock.patch.object(outcomes, "HOPED", 1.0)


def pools(seed, rows, width, levels, kept=0.8, children=4):
    """Drafts of a head whose beams nest: a child's own probability falls with its rank alone, so no node overtakes."""
    rng = np.random.default_rng(seed)
    own = np.sort(rng.uniform(0.2, 0.9, (rows, 1)), 1) * 0.02 ** np.arange(children)
    score = [np.log(own)]
    parent, depth = [np.full((rows, children), -1)], [np.full((rows, children), 1)]
    beam, first = np.tile(np.arange(width), (rows, 1)), 0
    for level in range(2, levels + 1):
        above = np.take_along_axis(score[-1], beam - first, 1)
        first += score[-1].shape[1]
        score.append((above[:, :, None] + np.log(own)[:, None]).reshape(rows, -1))
        parent.append(np.repeat(beam, children, 1))
        depth.append(np.full(score[-1].shape, level))
        beam = first + np.argsort(-score[-1], 1, kind="stable")[:, :width]
    score, parent, depth = (np.concatenate(parts, 1) for parts in (score, parent, depth))
    return lambda: np.exp(score) * kept**depth, score, parent, depth


def ahead(rows, pending, cap, context=100, arrived=0):
    """Rows that are alike."""
    return Ahead(
        context, [pending // rows] * (rows - 1) + [pending - pending // rows * (rows - 1)], [cap] * rows, arrived
    )


def flat(seconds, per_token=0.0):
    return Table([1, 1001], [seconds + per_token, seconds + 1001 * per_token])


CHEAP = Costs(flat(0.01), flat(1e-4), flat(1e-4, 1e-6))
DEAR = Costs(flat(0.01, 0.01), flat(1e-4), flat(1e-4, 1e-6))
