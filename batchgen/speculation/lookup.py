"""Drafts that no head makes: where a row repeats its own prompt or output, what followed there may follow here.

Copied text costs no pass of a head, and heads that look a few tokens ahead lose it after two or three: of the demo's
mixed prompts one token in five ends a match of eight or more tokens, and the next five come true on average (prompt
lookup, in vLLM `ngram`; SuffixDecoding, arXiv 2411.04975). A token looked up is a candidate like the head's: it shares
the budget, and where the head drafted it, too, the two are one node. How likely it is kept is learned by how many
tokens matched and by what the head says.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Tokens looked up, tokens of a match that are counted, and how many earlier places are compared, the latest first.
MOST, LONGEST, PLACES = 12, 24, 8
# Lengths of matches that are told apart, from each on. A token deep in what was looked up ends a match as much longer.
FROM = np.array([2, 3, 4, 5, 6, 8, 12, 20])
# What the head says: nothing; nothing here, but the same above; surely the same; the same; something else.
ALONE, BACKED, SURE, LIKELY, OTHER = range(5)
# Shares kept by length and by what the head says; on 72 mixed prompts, smoothed. They weigh as much as so many tokens.
PRIOR = np.array(
    [
        [0.50, 0.75, 0.92, 0.70, 0.12],
        [0.62, 0.80, 0.94, 0.75, 0.25],
        [0.70, 0.85, 0.95, 0.80, 0.40],
        [0.78, 0.90, 0.96, 0.80, 0.45],
        [0.80, 0.92, 0.97, 0.80, 0.50],
        [0.85, 0.94, 0.97, 0.85, 0.55],
        [0.90, 0.96, 0.98, 0.85, 0.65],
        [0.95, 0.98, 0.99, 0.90, 0.90],
    ]
)
PRIOR_TOKENS, MEMORY_TOKENS = 8, 2000


class History:
    """Where each pair of a row's `tokens` stood before; tokens are appended to the list, never changed."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._last: dict[tuple[int, int], int] = {}
        self._before: list[int] = []  # of the pair that ends at each place, 0 if it is new: none ends there

    def follow(self, most: int) -> tuple[int, list[int]]:
        """How many tokens at the end stood together before, and the `most` tokens that followed; 0 and none if new.

        Of the places the one that matches longest is taken, of equals the latest. What repeats itself is repeated.
        """
        tokens, before = self._tokens, self._before
        for place in range(len(before), len(tokens)):
            pair = (tokens[place - 1], tokens[place])
            before.append(self._last.get(pair, 0) if place else 0)
            if place:
                self._last[pair] = place
        end = len(tokens) - 1
        longest = found = 0
        place = before[end]
        for _ in range(PLACES):
            if not place:
                break
            length = 2
            while length < LONGEST and length <= place and tokens[place - length] == tokens[end - length]:
                length += 1
            if length > longest:
                longest, found = length, place
            place = before[place]
        if not longest or most <= 0:
            return 0, []
        period = end - found
        return longest, [tokens[found + 1 + i % period] for i in range(most)]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What was looked up for R rows: `token` [R, L], -1 behind the last one, and `match` [R], tokens that matched."""

    token: NDArray[np.int64]
    match: NDArray[np.int64]

    @staticmethod
    def of(histories: Sequence[History], caps: Sequence[int]) -> Found:
        """Look up to `caps` tokens up for each row, at most `MOST`."""
        found = [history.follow(min(cap, MOST)) for history, cap in zip(histories, caps, strict=True)]
        token = np.full((len(found), max((len(tokens) for _, tokens in found), default=0)), -1)
        for row, (_, tokens) in enumerate(found):
            token[row, : len(tokens)] = tokens
        return Found(token, np.array([match for match, _ in found], np.int64))


@dataclasses.dataclass(frozen=True, slots=True)
class Merged:
    """What was looked up for R rows among the P candidates of their heads.

    twin: the candidate that is the same token in the same place [R, L], -1 where there is none
    kind: what is known of each candidate [R, P], and of what was looked up [R, L] behind them, for `Kept`; 0 of what
        was not looked up, and of what has a twin
    alone: what would be known of what was looked up if there were no candidates [R, L]
    rival: 1 + the place of the token that was looked up instead of a candidate [R, P], 0 where none was
    """

    twin: NDArray[np.int64]
    kind: NDArray[np.int64]
    alone: NDArray[np.int64]
    rival: NDArray[np.int64]

    @staticmethod
    def of(
        found: Found,
        token: NDArray[np.int64],
        parent: NDArray[np.int64],
        rank: NDArray[np.int64],
        logp: NDArray[np.float32],
    ) -> Merged:
        """Find `found` among the candidates [R, P], as in `forest.Candidates`; those of `logp` -inf do not count."""
        (num_rows, num_found), num_candidates = found.token.shape, token.shape[1]
        twin = np.full((num_rows, num_found), -1)
        kind = np.zeros((num_rows, num_candidates + num_found), np.int64)
        length = np.searchsorted(FROM, found.match[:, None] + np.arange(num_found), "right") - 1
        first = 1 + length * PRIOR.shape[1]
        rival = np.zeros((num_rows, num_candidates), np.int64)
        node, rows = np.full(num_rows, -1), np.arange(num_rows)
        among = np.full(num_rows, num_candidates > 0)  # whether the path so far is among the candidates
        backed = np.zeros(num_rows, bool)
        there = np.isfinite(logp)
        for level in range(num_found):
            looked_up = found.token[:, level] >= 0
            says = np.where(backed, BACKED, ALONE)
            has = np.zeros(num_rows, bool)
            if among.any():
                child = there & (parent == node[:, None]) & among[:, None]
                same = child & (token == found.token[:, level, None])
                has, place = same.any(1), same.argmax(1)
                likeliest = has & (rank[rows, place] == 0)
                sure = np.where(logp[rows, place] > np.log(0.5), SURE, LIKELY)
                says = np.where(likeliest, sure, np.where(child.any(1), OTHER, says))
                rival[child & ~same & looked_up[:, None]] = 1 + level
                backed |= likeliest
                twin[has, level] = node[has] = place[has]
                among = has
            column = np.where(has, twin[:, level], num_candidates + level)
            kind[rows[looked_up], column[looked_up]] = (first[:, level] + says)[looked_up]
        return Merged(twin, kind, np.where(found.token >= 0, first + ALONE, 0), rival)

    def of_rows(self, rows: NDArray[np.intp]) -> Merged:
        """The same of some rows."""
        return Merged(self.twin[rows], self.kind[rows], self.alone[rows], self.rival[rows])


class Kept:
    """How likely the target keeps a token that was looked up once its parent is kept, by `Merged.kind`."""

    def __init__(self) -> None:
        self._kept, self._count = (np.concatenate([[0.0], values]) for values in _prior())

    def share(self, kind: NDArray[np.int64]) -> NDArray[np.float32]:
        """The probability of each; 0 of kind 0."""
        share = self._kept / np.maximum(self._count, 1e-9)
        of_kind: NDArray[np.float32] = share.astype(np.float32)[kind]
        return of_kind

    def learn(self, kind: NDArray[np.int64], label: NDArray[np.float64]) -> None:
        """Learn from looked-up children of the root and of kept nodes, as `Calibration.learn`; kind 0 is left out."""
        of_use = kind > 0
        if not of_use.any():
            return
        kind, label = kind[of_use], label[of_use]
        fade = np.exp(-len(kind) / MEMORY_TOKENS)
        kept, count = _prior()
        self._kept[1:] = kept + fade * (self._kept[1:] - kept)
        self._count[1:] = count + fade * (self._count[1:] - count)
        self._kept += np.bincount(kind, label, len(self._kept))
        self._count += np.bincount(kind, minlength=len(self._count))


def _prior() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return PRIOR_TOKENS * PRIOR.ravel(), np.full(PRIOR.size, float(PRIOR_TOKENS))
