"""How many tokens to draft for every row, where an engine drafts chains of one length for all: vLLM.

Such an engine tells what its steps took and how many tokens were accepted at each position, nothing else. So lengths
are compared by measurement: for each power of two of running rows, the best length so far is at work, and now and then
a few steps probe a neighbour. Length 0 is a candidate like any other.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

# Steps of one probe; the first of them still verifies what was drafted before it, and is not measured.
PROBE_STEPS = 4
# Steps between two probes: the fewest, in a batch of a size never seen before, and the most.
FIRST_PAUSE, LONGEST_PAUSE = 8, 128
# A length must promise this multiple of the current one's tokens per second to replace it.
MARGIN = 1.02
# Steps that a mean of seconds remembers, and drafts that an acceptance rate remembers.
MEMORY_STEPS, MEMORY_DRAFTS = 32, 4096
# Drafts at a position before its rate is believed; until then it counts as good as the one before it.
WARM_UP_DRAFTS = 32


@dataclasses.dataclass(slots=True)
class _Size:
    """What is known of one number of rows: mean seconds of a step by length, and how many steps made the mean."""

    best: int
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    steps: dict[int, int] = dataclasses.field(default_factory=dict)
    pause: int = FIRST_PAUSE
    wait: int = FIRST_PAUSE
    probing: int | None = None
    left: int = 0


class ChainLengths:
    """Chooses the length of each step, from 0 to `longest`; a step is `next`, and `seen` once it is over."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._sizes: dict[int, _Size] = {}
        self._drafted, self._accepted = np.zeros(longest), np.zeros(longest)

    def next(self, rows: int) -> int:
        """The length to draft in a step of `rows` rows."""
        size = self._size(rows)
        if size.probing is None:
            size.wait -= 1
            if size.wait > 0:
                return size.best
            size.probing, size.left = self._candidate(size), PROBE_STEPS
        length = size.probing
        size.left -= 1
        if size.left == 0:
            size.probing = None
            size.wait, size.pause = size.pause, min(2 * size.pause, LONGEST_PAUSE)
        return length

    def seen(self, rows: int, length: int, seconds: float) -> None:
        """A step of `rows` rows verified chains of `length`, drafted as many and took `seconds`; no prompt was read."""
        size = self._size(rows)
        steps = size.steps[length] = min(size.steps.get(length, 0) + 1, MEMORY_STEPS)
        mean = size.seconds.get(length, seconds)
        size.seconds[length] = mean + (seconds - mean) / steps
        if size.probing is None:
            values = {each: self.tokens(each) / taken for each, taken in size.seconds.items()}
            # A length that was never at work has no value: the first measured one replaces it.
            now = MARGIN * values.get(size.best, 0.0)
            best = max(values, key=lambda each: values[each])
            if values[best] > now:
                size.best, size.pause = best, FIRST_PAUSE

    def judged(self, drafted: int, accepted: int) -> None:
        """Of a chain of `drafted` tokens the first `accepted` were."""
        reached = min(accepted + 1, drafted)
        self._drafted[:reached] += 1
        self._accepted[:accepted] += 1
        if self._drafted[0] > MEMORY_DRAFTS:
            self._drafted /= 2
            self._accepted /= 2

    def tokens(self, length: int) -> float:
        """Expected tokens of a row and step that verifies a chain of `length`."""
        rate, path, total = 1.0, 1.0, 1.0
        for drafted, accepted in zip(self._drafted[:length], self._accepted[:length], strict=True):
            if drafted >= WARM_UP_DRAFTS:
                rate = accepted / drafted
            path *= rate
            total += path
        return total

    def schedule(self) -> list[tuple[int, int, int]]:
        """The best lengths as vLLM's `num_speculative_tokens_per_batch_size`: first rows, last rows, length."""
        known = sorted(self._sizes)
        starts = [1, *((1 << (bucket - 1)) + 1 if bucket else 1 for bucket in known[1:])]
        stops = [*(start - 1 for start in starts[1:]), 1 << known[-1]] if known else []
        return [
            (first, last, self._sizes[bucket].best)
            for first, last, bucket in zip(starts, stops, known, strict=bool(known))
        ]

    def report(self) -> dict[str, Any]:
        """Acceptance by position and the lengths that won, for the job's summary."""
        known = self._drafted > 0
        rates = self._accepted[known] / self._drafted[known]
        return {
            "lengths": [list(each) for each in self.schedule()],
            "acceptance": [round(r, 3) for r in rates.tolist()],
        }

    def as_json(self) -> str:
        """All that was learned."""
        sizes = {
            bucket: {"best": s.best, "seconds": list(s.seconds.items()), "steps": list(s.steps.items())}
            for bucket, s in self._sizes.items()
        }
        counts = {"drafted": self._drafted.tolist(), "accepted": self._accepted.tolist()}
        return json.dumps({"longest": self.longest, "sizes": sizes} | counts)

    @classmethod
    def of_json(cls, text: str) -> ChainLengths:
        """What `as_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: it did not.
        """
        facts = json.loads(text)
        lengths = cls(int(facts["longest"]))
        lengths._drafted = _counts(facts["drafted"], lengths.longest)
        lengths._accepted = _counts(facts["accepted"], lengths.longest)
        for bucket, size in facts["sizes"].items():
            seconds, steps = ({int(k): v for k, v in size[name]} for name in ("seconds", "steps"))
            lengths._sizes[int(bucket)] = _Size(int(size["best"]), seconds, steps, LONGEST_PAUSE, LONGEST_PAUSE)
        return lengths

    def _size(self, rows: int) -> _Size:
        bucket = (rows - 1).bit_length()
        if bucket not in self._sizes:
            near = min(self._sizes, key=lambda other: abs(other - bucket), default=None)
            best = self.longest // 2 if near is None else self._sizes[near].best
            self._sizes[bucket] = _Size(best)
        return self._sizes[bucket]

    def _candidate(self, size: _Size) -> int:
        """The neighbour, or 0, that was measured least; of equals the longer one, which tells more."""
        near = {size.best - 1, size.best + 1, 0} & set(range(self.longest + 1)) - {size.best}
        return min(sorted(near, reverse=True), key=lambda length: size.steps.get(length, 0), default=size.best)


def _counts(values: Sequence[float], num: int) -> np.ndarray[Any, Any]:
    counts = np.array(values, np.float64)
    if counts.shape != (num,):
        raise ValueError(f"expected {num} counts, found {counts.shape}")
    return counts
