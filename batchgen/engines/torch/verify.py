"""Exact verification: sample from the target at a node, follow the child that carries that token, else stop.

The stream of tokens is literally plain sampling from the target's processed distribution, whatever the tree, because
the tree was chosen without looking at the noise and siblings are distinct. The noise is Gumbel, keyed by (job seed,
row, sample, turn, output position), so that the tokens are the same with any tree or none. Temperature 0 is the argmax.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchgen.engines.torch.layout import upload
from batchgen_kernels.gumbel import position_words
from batchgen_kernels.sample import gumbel_argmax

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from batchgen.engines.torch.forest import Forest
    from batchgen.record import Sampling

# Nucleus sampling sorts this many logits before it falls back to sorting all of them.
_NUCLEUS_GUESS = 1024
# Logits of how many nodes are sorted at once, with about 30 bytes for each.
_LIMITED_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Draws:
    """How to draw the tokens after N nodes of R rows.

    sampling_R: a row's sampling; key_R: uint64, its noise key
    position_R: 0-based output position of what follows its root
    row_N, depth_N: a node's row and levels below its root
    """

    sampling_R: Sequence[Sampling]
    key_R: NDArray[np.uint64]
    position_R: NDArray[np.int64]
    row_N: NDArray[np.int64]
    depth_N: NDArray[np.int64]

    def of(self, nodes: NDArray[np.int64]) -> Draws:
        """The same of `nodes` only."""
        return dataclasses.replace(self, row_N=self.row_N[nodes], depth_N=self.depth_N[nodes])

    def temperatures(self) -> NDArray[np.float32]:
        """The temperature of each node's row."""
        return np.array([each.temperature for each in self.sampling_R], np.float32)[self.row_N]

    def samplings(self) -> list[Sampling]:
        """The sampling of each node's row."""
        return [self.sampling_R[row] for row in self.row_N.tolist()]

    def words(self) -> NDArray[np.int64]:
        """What the noise of each node is made of, int64 [2, N]; greedy rows make none."""
        position_N = (self.position_R[self.row_N] + self.depth_N).astype(np.uint64)
        return np.stack(position_words(self.key_R[self.row_N], position_N)).astype(np.int64)


@dataclasses.dataclass(frozen=True, slots=True)
class Walks:
    """What one step gives R rows: the nodes that are reached and the token that follows each, by depth.

    `node_RD` and `token_RD` [R, D]: the root, as a place among all N nodes, and what follows it; the node that carries
    it and what follows that; and so on. -1 where a row has left its tree. A row emits its tokens, and keeps its nodes.
    """

    node_RD: NDArray[np.int64]
    token_RD: NDArray[np.int64]

    def lengths(self) -> NDArray[np.int64]:
        """Nodes that each row keeps, the root included: as many as it emits tokens."""
        lengths: NDArray[np.int64] = np.count_nonzero(self.node_RD >= 0, axis=1)
        return lengths


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
    ks = np.array([min(s.top_k or vocab, vocab) for s in samplings], np.int64)
    ps = np.array([s.top_p for s in samplings], np.float32)
    limited = np.flatnonzero((ks < vocab) | (ps < 1.0))
    if len(limited):
        at, k, p = (upload(each, scaled.device) for each in (limited, ks[limited], ps[limited]))
        k, p = k[:, None], p[:, None]
        # A GPU sorts everything sooner than it can be asked whether a part was enough.
        largest = int(ks[limited].max(initial=0, where=ks[limited] < vocab))
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
    """What the target samples after each node of a pass, of `logits` [N, V].

    On a GPU everything is drawn at once, and the GPU waited for once. On a CPU noise costs more than waiting: rows with
    a temperature are drawn only where asked.
    """

    def __init__(self, logits: torch.Tensor, draws: Draws) -> None:
        self._logits, self._draws = logits, draws
        self._warm_N = draws.temperatures() > 0.0
        self._missing_N = self._warm_N & (not logits.is_cuda)
        self._least_N = torch.full((len(logits),), float("-inf"))
        if logits.is_cuda:
            self._tokens_N = draw(logits, draws)
        elif self._warm_N.all():
            self._tokens_N = np.zeros(len(logits), np.int64)
        else:
            # Of equals the first, as by `argmax`, which takes twice as long in bfloat16.
            self._tokens_N = logits.max(-1).indices.numpy()

    def tokens(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens after `nodes`."""
        missing = nodes[self._missing_N[nodes]]
        if len(missing):
            at, draws = torch.from_numpy(missing), self._draws.of(missing)
            logits = self._logits[at]
            self._least_N[at] = least = limits(logits, draws)
            self._tokens_N[missing] = draw(logits, draws, least)
            self._missing_N[missing] = False
        return self._tokens_N[nodes]

    def chances(self, nodes: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """How likely the target was to follow each of `nodes`, for which a token was drawn, with one of `tokens`.

        Of greedy rows, and on a GPU of all, whether it did: a second wait would cost more than the certainty is worth.
        """
        chances: NDArray[np.float64] = (self._tokens_N[nodes] == tokens).astype(np.float64)
        warm = np.flatnonzero(self._warm_N[nodes])
        if len(warm) and not self._logits.is_cuda:
            asked, place = np.unique(nodes[warm], return_inverse=True)
            nodes_at, temperature = torch.from_numpy(asked), torch.from_numpy(self._draws.of(asked).temperatures())
            scaled = self._logits[nodes_at].float() / temperature[:, None]
            scaled = torch.where(scaled >= self._least_N[nodes_at, None], scaled, float("-inf"))
            at = torch.from_numpy(place)
            logp = scaled[at, torch.from_numpy(tokens[warm])] - scaled.logsumexp(1)[at]
            chances[warm] = logp.exp().numpy()
        return chances


def limits(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The least of each row of `logits` [N, V] / temperature that its sampling lets survive, float32 [N]."""
    samplings, device = draws.samplings(), logits.device
    temperature = upload(draws.temperatures(), device)
    least = torch.full_like(temperature, float("-inf"))
    limited = [i for i, s in enumerate(samplings) if s.temperature > 0.0 and (s.top_k or s.top_p < 1.0)]
    for first in range(0, len(limited), _LIMITED_AT_ONCE):
        some = limited[first : first + _LIMITED_AT_ONCE]
        at = upload(np.array(some, np.int64), device)
        scaled = logits[at].float() / temperature[at, None]
        least[at] = thresholds(scaled, [samplings[i] for i in some])
    return least


def draw(logits: torch.Tensor, draws: Draws, least: torch.Tensor | None = None) -> NDArray[np.int64]:
    """One token per row of `logits` [N, V], whose `limits` are `least`."""
    if not len(logits):
        return np.zeros(0, np.int64)
    least = limits(logits, draws) if least is None else least
    temperature, device = upload(draws.temperatures(), logits.device), logits.device
    tokens: NDArray[np.int64] = gumbel_argmax(logits, temperature, least, *upload(draws.words(), device)).cpu().numpy()
    return tokens


def walk(forest: Forest, pick: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Walks:
    """Verify every row's tree.

    `pick(nodes)` samples from the target after each of `nodes`. It is asked only about nodes that are reached, once per
    depth.
    """
    depths = int(forest.depth_N.max(initial=0)) + 1
    node_RD, token_RD = np.full((2, len(forest.start_R), depths), -1)
    after_N = np.full(len(forest.row_N), -1)
    node = forest.start_R
    for depth in range(depths):
        if not len(node):
            break
        row = forest.row_N[node]
        node_RD[row, depth] = node
        token_RD[row, depth] = after_N[node] = pick(node)
        below = np.flatnonzero(forest.depth_N == depth + 1)
        node = below[forest.token_N[below] == after_N[forest.parent_N[below]]]
    return Walks(node_RD, token_RD)
