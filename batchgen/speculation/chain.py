"""How many tokens to draft for every row, where an engine drafts chains of one length for all: vLLM.

Such an engine tells what its steps took and how many tokens were accepted at each position, nothing else. So lengths
are compared by measurement, for each power of two of running rows apart. The first steps try one length after the
other, none first, and leave out those that could not win if they took as long as the next shorter one that was tried.
From then on the best length is at work, and now and then a few steps probe a neighbour, or none.

A machine's speed drifts for every length: what is at work carries what is known of the others along.

Length 0 is not for free, an engine that could draft runs its head all the same. Whether to start one that cannot is
decided before it starts (`without_pays`): where none or hardly anything pays at the job's number of rows, the next job
is run without, and from then on it is known which is better.

Steps that read prompts beside the decoding rows take longer by the tokens that they read, and in a large batch hardly a
step reads none. So the price of such a token is fitted, and the seconds of a length are those of a step without:
prompts must be read whatever the length.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from batchgen.speculation.costs import MAX_RATIO, power_of_two

if TYPE_CHECKING:
    from collections.abc import Sequence

# Longest chain that is considered.
LONGEST = 5
# Steps of one probe; the first of them still verifies what was drafted before it, and is not measured.
PROBE_STEPS = 4
# Steps between two probes, at least: of a length that is hardly known yet, and of one that is.
FIRST_PAUSE, PAUSE = 8, 128
# What probing may lose of all tokens.
PROBE_SHARE = 0.01
# A length must promise this multiple of the current one's tokens per second to replace it.
MARGIN = 1.02
# What length 0 must be worth, as a share of the best length, to try an engine that cannot draft.
TRY_WITHOUT = 0.9
# After so many engines in a row that could not draft one that can is started again.
STARTS_WITHOUT = 7
# Steps that a mean of seconds remembers, and drafts that an acceptance rate remembers.
MEMORY_STEPS, MEMORY_DRAFTS = 32, 4096
# Drafts that weigh as much as what is assumed of a position: the rate of the one before it, of the first `FIRST_RATE`.
PRIOR_DRAFTS, FIRST_RATE = 8, 0.8
# How far a length that has become slower or faster moves all others.
DRIFT = 0.75


@dataclasses.dataclass(slots=True)
class _Steps:
    """Steps of one length: means of their seconds and of the prompt tokens they read, and how the two vary together."""

    num: int = 0
    seconds: float = 0.0
    prompt: float = 0.0
    together: float = 0.0
    spread: float = 0.0

    def add(self, seconds: float, prompt: int) -> None:
        if self.num and not prompt:
            seconds = min(seconds, MAX_RATIO * self.seconds)
        self.num = min(self.num + 1, MEMORY_STEPS)
        share = 1 / self.num
        by_seconds, by_prompt = seconds - self.seconds, prompt - self.prompt
        self.seconds += share * by_seconds
        self.prompt += share * by_prompt
        self.together = (1 - share) * (self.together + share * by_seconds * by_prompt)
        self.spread = (1 - share) * (self.spread + share * by_prompt**2)


@dataclasses.dataclass(slots=True)
class _Size:
    """What is known of one number of rows: steps by length, and how often a length was probed."""

    best: int
    steps: dict[int, _Steps] = dataclasses.field(default_factory=dict)
    without: _Steps = dataclasses.field(default_factory=_Steps)
    probes: dict[int, int] = dataclasses.field(default_factory=dict)
    wait: int = FIRST_PAUSE
    probing: int | None = None
    left: int = 0

    def seconds(self) -> dict[int, float]:
        """Seconds of a step that reads no prompt, by length."""
        spread = sum(steps.spread for steps in self.steps.values())
        together = sum(steps.together for steps in self.steps.values())
        a_token = max(0.0, together / spread) if spread > 0 else 0.0
        # Noise must not make a step free.
        return {
            length: max(steps.seconds - a_token * steps.prompt, 0.1 * steps.seconds)
            for length, steps in self.steps.items()
        }


class ChainLengths:
    """Chooses the length of each step, from 0 to `longest`; a step is `next`, and `seen` once it is over."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._sizes: dict[int, _Size] = {}
        self._drafted, self._accepted = np.zeros(longest), np.zeros(longest)
        self._starts_without = 0  # of engines in a row

    def next(self, rows: int) -> int:
        """The length to draft in a step of `rows` rows."""
        size = self._size(rows)
        if size.probing is None:
            untried = self._untried(size)
            if untried is None:
                size.wait -= 1
                if size.wait > 0:
                    return size.best
            size.probing, size.left = self._candidate(size) if untried is None else untried, PROBE_STEPS
            size.probes[size.probing] = size.probes.get(size.probing, 0) + 1
        length = size.probing
        size.left -= 1
        if size.left == 0:
            size.probing = None
            size.wait = self._pause(size, length)
        return length

    def seen(self, rows: int, length: int, seconds: float, prompt_tokens: int = 0) -> None:
        """A step of `rows` rows verified chains of `length` and drafted as many, beside reading `prompt_tokens`."""
        size = self._size(rows)
        steps = size.steps.setdefault(length, _Steps())
        before = steps.seconds if steps.num == MEMORY_STEPS and not prompt_tokens else None
        steps.add(seconds, prompt_tokens)
        if before is not None:
            for other in size.steps.values():
                if other is not steps:
                    other.seconds *= (steps.seconds / before) ** DRIFT
        if size.probing is None:
            values = self._values(size)
            # A length that was never at work has no value: the first measured one replaces it.
            now = MARGIN * values.get(size.best, 0.0)
            best = max(values, key=lambda each: values[each])
            if values[best] > now:
                size.best, size.wait = best, FIRST_PAUSE

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
        rate, path, total = FIRST_RATE, 1.0, 1.0
        for drafted, accepted in zip(self._drafted[:length], self._accepted[:length], strict=True):
            rate = (accepted + PRIOR_DRAFTS * rate) / (drafted + PRIOR_DRAFTS)
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

    def seen_without(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows, that read no prompt, of an engine that cannot draft took `seconds`."""
        self._size(rows).without.add(seconds, 0)

    def started(self, *, drafts: bool) -> None:
        """An engine has started that can draft, or one that cannot."""
        self._starts_without = 0 if drafts else self._starts_without + 1

    def without_pays(self, rows: int) -> bool:
        """Whether an engine that cannot draft is better at this number of rows, or worth a try.

        False before every length that might pay was tried, and once in `STARTS_WITHOUT` engines: other prompts may be
        drafted better.
        """
        size = self._sizes.get(power_of_two(rows))
        if size is None or self._untried(size) is not None or self._starts_without >= STARTS_WITHOUT:
            return False
        values = self._values(size)
        none, best = values.get(0, 0.0), max(values.values(), default=0.0)
        if size.without.num and none < best:  # else it does the same with less work, whatever a noisy hour said of it
            return 1 / size.without.seconds > best
        return none > TRY_WITHOUT * best

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
            bucket: {
                "best": size.best,
                "seconds": [(length, seconds, size.steps[length].num) for length, seconds in size.seconds().items()],
                "without": size.without.seconds,
            }
            for bucket, size in self._sizes.items()
        }
        counts = {"drafted": self._drafted.tolist(), "accepted": self._accepted.tolist()}
        return json.dumps({"longest": self.longest, "sizes": sizes, "starts_without": self._starts_without} | counts)

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
        lengths._starts_without = int(facts["starts_without"])
        for bucket, size in facts["sizes"].items():
            steps = {int(length): _Steps(int(num), float(seconds)) for length, seconds, num in size["seconds"]}
            seconds = float(size["without"])
            without = _Steps(int(seconds > 0), seconds)
            known = _Size(int(size["best"]), steps, without)
            lengths._sizes[int(bucket)] = known
        return lengths

    def _size(self, rows: int) -> _Size:
        bucket = power_of_two(rows)
        if bucket not in self._sizes:
            near = min(self._sizes, key=lambda other: abs(other - bucket), default=None)
            best = self.longest // 2 if near is None else self._sizes[near].best
            self._sizes[bucket] = _Size(best)
        return self._sizes[bucket]

    def _values(self, size: _Size) -> dict[int, float]:
        """Tokens per second of a row, by length."""
        return {length: self.tokens(length) / seconds for length, seconds in size.seconds().items()}

    def _pause(self, size: _Size, probed: int) -> int:
        """Steps until the next probe: enough that what one of this length loses is no more than `PROBE_SHARE`."""
        steps = size.steps.get(probed)
        least = PAUSE if steps is not None and steps.num == MEMORY_STEPS else FIRST_PAUSE
        values = self._values(size)
        if probed not in values or size.best not in values:
            return least
        return max(least, round(PROBE_STEPS * max(0.0, 1 - values[probed] / values[size.best]) / PROBE_SHARE))

    def _untried(self, size: _Size) -> int | None:
        """The length that promises most of those never tried here, none first; None where no such one might win."""
        seconds, tried = size.seconds(), size.steps.keys() | size.probes.keys()
        if 0 not in tried:
            return 0
        if 0 not in seconds:
            return None  # its steps are under way
        to_beat = MARGIN * max(self._values(size).values())
        promises = {
            length: self.tokens(length) / max(s for shorter, s in seconds.items() if shorter < length)
            for length in range(1, self.longest + 1)
            if length not in tried
        }
        best = max(promises, key=lambda length: promises[length], default=None)
        return best if best is not None and promises[best] > to_beat else None

    def _candidate(self, size: _Size) -> int:
        """The neighbour, or 0, that was probed least; of equals the longer one, which tells more."""
        near = {size.best - 1, size.best + 1, 0} & set(range(self.longest + 1)) - {size.best}
        return min(sorted(near, reverse=True), key=lambda length: size.probes.get(length, 0), default=size.best)


def _counts(values: Sequence[float], num: int) -> np.ndarray[Any, Any]:
    counts = np.array(values, np.float64)
    if counts.shape != (num,):
        raise ValueError(f"expected {num} counts, found {counts.shape}")
    return counts
