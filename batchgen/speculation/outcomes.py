"""What drafting gave beside what it had promised: whatever forecasts leave out is learned here, and expected next time.

A forecast multiplies a sample of recent drafts by a table of costs, and the best of many forecasts is mostly the most
mistaken one. So every step that drafts is held against the promise that it was chosen for, both as multiples of what a
plain step gives in the same seconds. Later promises are worth the quotient of the two sums. Each shape has sums of its
own; one that was hardly used is taken for little more than what all shapes together proved worth, since mostly they
err alike. What is old fades, with plain steps too: a shape that was given up is tried again now and then, and comes
back if it does better.

Before anything was seen all promises are taken for somewhat more than they say: what is never tried is never corrected,
and a job would go on without drafts because of one measurement in a bad moment. To find out costs a few steps' worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.speculation.costs import bounded, power_of_two

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.speculation.schedule import Draft

# Steps that stand for promises kept before anything was seen; of few rows more, since one row gives a token or five.
TRUSTED_STEPS, TRUSTED_ROWS = 24, 64
# What promises are taken for before: passes are measured once, on shared machines to within a fifth in bad moments.
HOPED = 1.2
# How many times as many steps are remembered. What trying again may cost is in the inverse of it.
MEMORY = 16
# The power of what all shapes proved worth that one which was hardly used is taken for: 1 would never try it where a
# likelier one disappointed, and at 0.5 sixteen of them were tried one after the other.
TAKEN_FOR = 0.75
# How much longer than foretold a plain step takes is averaged over so many, and over so many foretold ones at first.
PLAIN_STEPS, FIRST_STEPS = 32, 4


class Outcomes:
    """Promises of drafting and what became of them, for each power of two of rows apart."""

    def __init__(self) -> None:
        # Of each shape and, under None, of all: what was given and what had been promised, in plain steps.
        self._sums: dict[int, dict[Draft | None, tuple[float, float]]] = {}
        self._slower: dict[int, tuple[int, float]] = {}

    def plain(self, rows: int, seconds: float, foretold: float) -> None:
        """A plain step of `rows` rows took `seconds`, where its costs said `foretold`."""
        steps, slower = self._slower.get(power_of_two(rows), (FIRST_STEPS, 1.0))
        steps = min(steps + 1, PLAIN_STEPS)
        self._slower[power_of_two(rows)] = steps, slower + (bounded(seconds / foretold) - slower) / steps
        self.fade(rows)

    def drafted(self, rows: int, draft: Draft, promised: float, tokens: int, seconds: float, plain_s: float) -> None:
        """A step of `rows` rows gave `tokens` in `seconds`, that promised `promised` times as many as plain ones.

        `plain_s` is what the costs say of a plain step. A draft of depth 0 is what was looked up without one; it was a
        `plain` step, too.
        """
        if draft.depth:
            self.fade(rows)
        sums = self._sums.setdefault(power_of_two(rows), {})
        gave, hoped = tokens / rows, promised * seconds / (plain_s * self.slower(rows))
        for key in (draft, None) if draft.depth else (draft,):
            before = sums.get(key, (0.0, 0.0))
            # What is looked up gives a row one token or a dozen: to bound that would take a dozen for less.
            sums[key] = before[0] + gave, before[1] + (gave * bounded(hoped / gave) if draft.depth else hoped)

    def slower(self, rows: int) -> float:
        """How many times as long as foretold a plain step takes."""
        return self._slower.get(power_of_two(rows), (FIRST_STEPS, 1.0))[1]

    def kept(self, rows: int) -> Callable[[Draft], float]:
        """What is to be expected of a draft, as a share of what is promised."""
        sums, trusted = self._sums.get(power_of_two(rows), {}), _trusted(rows)
        shared = _quotient(sums.get(None), trusted, 1.0)
        otherwise = max(shared, shared**TAKEN_FOR)
        # The same for all shapes: it is about drafting or not, and must not have every shape tried in turn. Squared, so
        # that it is gone before what was given has had its full weight.
        _, hoped = sums.get(None, (0.0, 0.0))
        hope = 1 + (HOPED - 1) * (trusted / (trusted + hoped)) ** 2

        def kept(draft: Draft) -> float:
            if not draft.depth:
                return _quotient(sums.get(draft), trusted, 1.0)
            return hope * _quotient(sums.get(draft), trusted, otherwise)

        return kept

    def fade(self, rows: int) -> None:
        """A step of `rows` rows passed."""
        sums = self._sums.get(power_of_two(rows), {})
        fade = 1 - 1 / (MEMORY * _trusted(rows))
        for key, (gave, hoped) in sums.items():
            sums[key] = fade * gave, fade * hoped


def _trusted(rows: int) -> float:
    return max(TRUSTED_STEPS, TRUSTED_ROWS / rows)


def _quotient(sums: tuple[float, float] | None, steps: float, otherwise: float) -> float:
    """Of what was given by what was hoped for, as if `steps` before had given `otherwise`."""
    gave, hoped = sums or (0.0, 0.0)
    return (steps * otherwise + gave) / (steps + hoped)
