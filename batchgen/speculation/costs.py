"""What generation costs on this machine: whole runs for estimates before a job, single passes for decisions within it.

One small JSON file a kind and (device, target, head, dtype, batch size, version); a damaged or missing one is simply
not there. Floor 2, standard library and numpy only, so that planning loads no torch.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

T = TypeVar("T")
N = TypeVar("N", float, "NDArray[Any]")

# How far a pass of the target moves all points, in log seconds per log ratio: mostly it is the machine whose speed
# drifts, on shared ones by a third within seconds, and plain and drafting steps are to be compared by the same clock.
DRIFT = 0.2
# How much further it moves the points beside it: how passes differ is learned slowly, noise of 10 % leaves 1 %.
RATE = 0.025
# A pass that took more than this much longer or shorter than expected says that something else took place.
MAX_RATIO = 3.0
# Tokens that no pass has; up to there the last slope goes on.
FAR = 1e9
# Refining multiplies, and what is nothing would stay so.
_LEAST_S = 1e-9


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Measured over one run: completion tokens per second of generation, and completion tokens per row."""

    tokens_per_s: float
    tokens_per_row: float
    num_rows: int


class Table:
    """Seconds of a pass by packed tokens and by total context tokens; monotone in both.

    Linear between the measured points, constant below the first, and above the last on with the last slope (of a single
    point: through the origin, lest a pass of any size look as cheap). Context adds `per_context_token` each.
    """

    def __init__(self, tokens: Sequence[int], seconds: Sequence[float], per_context_token: float = 0.0) -> None:
        self._tokens = [float(each) for each in tokens]
        if not self._tokens or len(self._tokens) != len(seconds):
            raise ValueError("a table needs one duration for each of at least one count of tokens")
        if not (np.diff(self._tokens, prepend=0) >= 1).all():
            raise ValueError("counts of tokens must increase from 1 or more")
        if not (np.isfinite([*self._tokens, *seconds]).all() and 0 <= per_context_token < np.inf):
            raise ValueError("durations must be finite, and context must not make a pass faster")
        # What is learned in every step: lists of few points and one factor are faster to change than arrays.
        self._seconds = [float(each) for each in np.maximum.accumulate(np.maximum(seconds, _LEAST_S))]
        self._per_context_token, self._factor = float(per_context_token), 1.0
        self._lines: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def __call__(self, tokens: N, context: int = 0) -> N:
        """Seconds of a pass over `tokens`, or of one pass for each; no pass, no time."""
        more = self._per_context_token * context
        if isinstance(tokens, np.ndarray):
            if self._lines is None:
                self._lines = np.array([*self._tokens, FAR]), np.array([*self._seconds, self._bare(FAR)])
            return np.where(tokens > 0, self._factor * (np.interp(tokens, *self._lines) + more), 0.0)
        return self._factor * (self._bare(tokens) + more) if tokens > 0 else 0.0

    def _bare(self, tokens: float) -> float:
        """Seconds by the points as they stand."""
        place = bisect.bisect_left(self._tokens, tokens)
        if place == 0:
            return self._seconds[0]
        high = min(place, len(self._tokens) - 1)
        x, y = (self._tokens[high - 1], self._seconds[high - 1]) if high else (0.0, 0.0)
        slope = (self._seconds[high] - y) / (self._tokens[high] - x)
        return self._seconds[high] + slope * (tokens - self._tokens[high])

    def refine(self, tokens: int, context: int, seconds: float, drift: float = DRIFT) -> float:
        """Learn from a pass that was timed: move all points toward it by `drift`, and those beside `tokens` further.

        Returns the factor by which points far away moved.
        """
        if tokens <= 0:
            return 1.0
        ratio, last = bounded(seconds / self(tokens, context)), len(self._tokens) - 1
        high = min(bisect.bisect_left(self._tokens, tokens), last)
        low = max(high - 1, 0)
        if tokens > self._tokens[last]:
            share = {low: 1.0, high: 1.0}  # so that the slope beyond them scales too
        elif low == high:
            share = {high: 1.0}
        else:
            place = (tokens - self._tokens[low]) / (self._tokens[high] - self._tokens[low])
            share = {low: 1.0 - place, high: place}
        for point, weight in share.items():
            self._seconds[point] = max(self._seconds[point] * ratio ** (RATE * weight), _LEAST_S)
        # What is now out of order is further from the measurement than the points it moved: they carry it along.
        if ratio > 1:
            for point in range(low + 1, last + 1):
                self._seconds[point] = max(self._seconds[point - 1 : point + 1])
        else:
            for point in range(high - 1, -1, -1):
                self._seconds[point] = min(self._seconds[point : point + 2])
        self._lines = None
        self.scale(ratio**drift)
        return float(ratio**drift)

    def scale(self, factor: float) -> None:
        """Take every pass to last `factor` times as long, and what context adds too: it is a part of it."""
        self._factor = max(self._factor * factor, _LEAST_S)

    def as_json(self) -> dict[str, Any]:
        """The arguments that make this table."""
        return {
            "tokens": [int(each) for each in self._tokens],
            "seconds": [self._factor * each for each in self._seconds],
            "per_context_token": self._factor * self._per_context_token,
        }


@dataclasses.dataclass(slots=True)
class Costs:
    """Seconds of the passes that a step is made of.

    `verify`: the target over packed nodes, unevenly spread over the rows; `level`: one level of drafting over the nodes
    it expands; `extend`: the head's catch-up over tokens that were kept;
    `even`: a pass of `verify` over rows that have as many nodes each, as a share of one over uneven rows.
    """

    verify: Table
    level: Table
    extend: Table
    even: float = 1.0

    def refine_verify(self, nodes: int, context: int, seconds: float, *, even: bool = False) -> None:
        """Learn from a target pass that was timed. It is most of a step: if it has drifted, so have the others.

        A pass over even rows tells nothing of uneven ones, but what share of theirs it takes.
        """
        if even:
            ratio = bounded(seconds / (self.even * self.verify(nodes, context)))
            # Below 1, or such passes would be made no more, and could not be found to be faster again.
            self.even = min(0.999, self.even * ratio**RATE)
            drift = ratio**DRIFT
            self.verify.scale(drift)
        else:
            drift = self.verify.refine(nodes, context, seconds)
        for other in (self.level, self.extend):
            other.scale(drift)


def bounded(ratio: float) -> float:
    """`ratio` of a duration to what was expected, within `MAX_RATIO`."""
    return min(max(ratio, 1 / MAX_RATIO), MAX_RATIO)


def power_of_two(rows: int) -> int:
    """The power of two that holds `rows`: a full batch and one that misses a row are the same."""
    return (rows - 1).bit_length()


def load(folder: Path, key: str) -> Cost | None:
    """The cost last saved under `key`, if there is one."""
    return _load(folder, key, lambda found: Cost(**found))


def save(folder: Path, key: str, cost: Cost) -> None:
    """Remember `cost` under `key`, replacing what was there at once."""
    _save(folder, key, dataclasses.asdict(cost))


def load_costs(folder: Path, key: str) -> Costs | None:
    """The costs of passes last saved under `key`, if there are any."""
    return _load(folder, f"passes|{key}", _costs)


def save_costs(folder: Path, key: str, costs: Costs) -> None:
    """Remember the costs of passes under `key`, beside what `save` keeps there."""
    tables = {name: getattr(costs, name).as_json() for name in ("verify", "level", "extend")}
    _save(folder, f"passes|{key}", tables | {"even": costs.even})


def _costs(found: dict[str, Any]) -> Costs:
    tables = {name: Table(**found[name]) for name in ("verify", "level", "extend")}
    return Costs(**tables, even=float(found["even"]))


def _load(folder: Path, key: str, build: Callable[[dict[str, Any]], T]) -> T | None:
    try:
        return build(json.loads(_file(folder, key).read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _save(folder: Path, key: str, facts: dict[str, Any]) -> None:
    file = _file(folder, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(facts))
    temporary.replace(file)


def _file(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
