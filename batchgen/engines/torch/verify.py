"""Exact verification: sample from the target at a node, follow the child that carries that token, else stop.

The stream of tokens is literally plain sampling from the target's processed distribution, whatever the tree, because
the tree was chosen without looking at the noise and siblings are distinct. The noise is Gumbel, keyed by (job seed,
row, sample, output position), so that the tokens are the same with any tree or none. Temperature 0 is the argmax.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from batchgen_kernels.gumbel import gumbel_noise

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


def noise_key(seed: int, row_id: str, sample: int) -> int:
    """64 bits that name one sample's noise."""
    digest = hashlib.blake2b(f"{seed}\0{row_id}\0{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def processed_logits(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and float32 log-weights (unnormalised) that survive temperature, top-k and top-p, in this order.

    `logits` is one row [V]. Tokens that tie with the last survivor survive too, so that the set does not depend on the
    order of equal logits. top-p is taken of the distribution that top-k left, as in vLLM and transformers.
    """
    scaled = logits.float() / sampling.temperature
    ids = torch.arange(scaled.shape[0], device=scaled.device)
    if sampling.top_k is not None and sampling.top_k < scaled.shape[0]:
        ids = (scaled >= scaled.topk(sampling.top_k).values[-1]).nonzero()[:, 0]
        scaled = scaled[ids]
    if sampling.top_p < 1.0:
        p = torch.softmax(scaled, 0)
        best = p.topk(min(_NUCLEUS_GUESS, p.shape[0])).values
        if float(best.sum()) < sampling.top_p:
            best = p.sort(descending=True).values
        inside = int((best.cumsum(0) - best < sampling.top_p).sum())
        keep = p >= best[inside - 1]
        ids, scaled = ids[keep], scaled[keep]
    return ids, scaled


def draw(
    logits: torch.Tensor, draws: Sequence[Draw], asked: Sequence[Sequence[int]] | None = None
) -> tuple[list[int], list[list[float]]]:
    """One token per row of `logits` [R, V], and the probability that it had been each of the tokens `asked` about."""
    if not draws:
        return [], []
    tokens: list[int] = logits.argmax(-1).tolist()
    chances = [
        [float(token == t) for t in some] for token, some in zip(tokens, asked or [[]] * len(draws), strict=True)
    ]
    for i, (sampling, key, position) in enumerate(draws):
        if sampling.temperature > 0.0:
            ids, weights = processed_logits(logits[i], sampling)
            tokens[i] = int(ids[(weights + gumbel_noise(key, position, ids)).argmax()])
            if chances[i]:
                assert asked is not None
                wanted = torch.tensor(asked[i], device=ids.device)
                p = torch.softmax(weights, 0)
                chances[i] = ((ids == wanted[:, None]) * p).sum(-1).tolist()
    return tokens, chances


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
