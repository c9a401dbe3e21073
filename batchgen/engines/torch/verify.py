"""Exact verification: sample from the target at a node, follow the child that carries that token, else stop.

The stream of tokens is literally plain sampling from the target's processed distribution, whatever the tree, because
the tree was chosen without looking at the noise and siblings are distinct. The noise is Gumbel, keyed by (job seed,
row, sample, turn, output position), so that the tokens are the same with any tree or none. Temperature 0 is the argmax.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from batchgen.engines.torch.layout import upload
from batchgen_kernels.gumbel import position_words
from batchgen_kernels.sample import gumbel_argmax

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.engines.torch.forest import RowTree
    from batchgen.record import Sampling

# Nucleus sampling sorts this many logits before it falls back to sorting all of them.
_NUCLEUS_GUESS = 1024


class Draw(NamedTuple):
    """How to draw one token: the row's sampling, its noise key, and the token's 0-based output position."""

    sampling: Sampling
    key: int
    position: int


class Walk(NamedTuple):
    """What one step gives a row: the accepted nodes from depth 1 on, and their tokens with one more."""

    path: list[int]
    tokens: list[int]


def noise_key(noise: str) -> int:
    """64 bits that stand for `record.Request.noise`."""
    digest = hashlib.blake2b(noise.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def thresholds(scaled: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """The least of each row of `scaled`, logits / temperature float32 [N, V], that survives top-k and top-p; [N].

    -inf where all do. Tokens that tie with the last survivor survive too, so that the set does not depend on the order
    of equal logits. top-p is taken of the distribution that top-k left, as in vLLM and transformers.
    """
    vocab = scaled.shape[1]
    least = scaled.new_full((len(scaled),), float("-inf"))
    ks = [min(s.top_k or vocab, vocab) for s in samplings]
    limited = [n for n, s in enumerate(samplings) if ks[n] < vocab or s.top_p < 1.0]
    if limited:
        at = torch.tensor(limited, device=scaled.device)
        k = torch.tensor([ks[n] for n in limited], device=scaled.device)[:, None]
        p = torch.tensor([samplings[n].top_p for n in limited], device=scaled.device)[:, None]
        # A GPU sorts everything sooner than it can be asked whether a part was enough.
        largest = max((ks[n] for n in limited if ks[n] < vocab), default=0)
        guess = vocab if scaled.is_cuda else min(vocab, max(_NUCLEUS_GUESS, largest))
        least[at] = _least_survivor(scaled[at], k, p, guess)
    return least


def _least_survivor(scaled: torch.Tensor, k: torch.Tensor, p: torch.Tensor, guess: int) -> torch.Tensor:
    vocab = scaled.shape[1]
    falling = scaled.topk(guess).values
    kth = torch.where(k < vocab, falling.gather(1, (k - 1).clamp(max=guess - 1)), float("-inf"))
    total = torch.where(scaled >= kth, scaled, float("-inf")).logsumexp(1, keepdim=True)
    chance = torch.where(falling >= kth, (falling - total).exp(), 0.0)
    inside = ((chance.cumsum(1) - chance < p) & (chance > 0)).sum(1, keepdim=True)
    least = torch.where(p < 1.0, falling.gather(1, inside - 1), kth)[:, 0]
    if guess < vocab:
        short = ((chance.sum(1, keepdim=True) < p) & (p < 1.0))[:, 0].nonzero()[:, 0]
        if len(short):
            least[short] = _least_survivor(scaled[short], k[short], p[short], vocab)
    return least


class Sampled:
    """What the target samples after each node of a pass, of `logits` [N, V]; `draws[n]` says how.

    On a GPU everything is drawn at once, and the GPU waited for once. On a CPU noise costs more than waiting: rows with
    a temperature are drawn only where asked.
    """

    def __init__(self, logits: torch.Tensor, draws: Sequence[Draw]) -> None:
        self._logits, self._draws = logits, draws
        if logits.is_cuda:
            self._tokens = draw(logits, draws)
            self._missing: set[int] = set()
        else:
            self._tokens = logits.argmax(-1).tolist()
            self._missing = {n for n, each in enumerate(draws) if each.sampling.temperature > 0.0}

    def tokens(self, nodes: Sequence[int]) -> list[int]:
        """The tokens after `nodes`."""
        missing = [n for n in nodes if n in self._missing]
        if missing:
            found = draw(self._logits[missing], [self._draws[n] for n in missing])
            for n, token in zip(missing, found, strict=True):
                self._tokens[n] = token
            self._missing.difference_update(missing)
        return [self._tokens[n] for n in nodes]

    def chances(self, asked: Sequence[tuple[int, int]]) -> list[float]:
        """For each (node, token), how likely the target was to follow the node with it.

        Of greedy rows, and on a GPU of all, whether it did: a second wait would cost more than the certainty is worth.
        """
        chances = [float(self._tokens[node] == token) for node, token in asked]
        warm = [i for i, (node, _) in enumerate(asked) if self._draws[node].sampling.temperature > 0.0]
        if warm and not self._logits.is_cuda:
            nodes = sorted({asked[i][0] for i in warm})
            samplings = [self._draws[n].sampling for n in nodes]
            scaled = self._logits[nodes].float() / torch.tensor([[s.temperature] for s in samplings])
            scaled = torch.where(scaled >= thresholds(scaled, samplings)[:, None], scaled, float("-inf"))
            at = torch.tensor([nodes.index(asked[i][0]) for i in warm])
            logp = scaled[at, [asked[i][1] for i in warm]] - scaled.logsumexp(1)[at]
            for i, chance in zip(warm, logp.exp().tolist(), strict=True):
                chances[i] = chance
        return chances


def draw(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token per row of `logits` [N, V]."""
    if not draws:
        return []
    device = logits.device
    noise = [position_words(d.key, d.position) if d.sampling.temperature > 0.0 else (0, 0) for d in draws]
    words = upload(np.array(noise, np.int64).T.copy(), device)
    temperature = upload(np.array([each.sampling.temperature for each in draws], np.float32), device)
    least = torch.full_like(temperature, float("-inf"))
    warm = [n for n, each in enumerate(draws) if each.sampling.temperature > 0.0]
    if warm:
        scaled = logits[warm].float() / temperature[warm, None]
        least[warm] = thresholds(scaled, [draws[n].sampling for n in warm])
    tokens: list[int] = gumbel_argmax(logits, temperature, least, *words).tolist()
    return tokens


def walk(trees: Sequence[RowTree], pick: Callable[[list[int], list[int]], list[int]]) -> list[Walk]:
    """Verify every row's tree.

    `pick(rows, nodes)` samples from the target after `nodes[i]` of row `rows[i]`, one token each, by the draw for that
    node's depth. It is asked only about nodes that are reached, once per depth.
    """
    walks = [Walk([], []) for _ in trees]
    node = [0] * len(trees)
    alive = list(range(len(trees)))
    while alive:
        still = []
        for r, token in zip(alive, pick(alive, [node[r] for r in alive]), strict=True):
            walks[r].tokens.append(token)
            child = trees[r].child(node[r], token)
            if child is not None:
                walks[r].path.append(child)
                node[r] = child
                still.append(r)
        alive = still
    return walks
