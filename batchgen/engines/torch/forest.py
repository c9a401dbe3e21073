"""Draft trees for all running rows at once: deterministic top-k of the head, level by level.

As EAGLE-2 (arXiv 2406.16858) and SafeAILab's `topK_genrate`: the `width` likeliest children of each of the `width`
likeliest nodes of a level are candidates, of which the verified nodes are chosen: the likeliest of each row here, or
across all rows by `speculation.budget`. A chain is width 1. Trees never look at sampling noise, which is what makes
verification by following the sampled token exact.
A child ties with a parent of probability 1; selection is stable in level order, so that a parent is never dropped
before its child (SGLang's "invalid eagle tree" is that tie).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchgen.engines.torch.layout import Layout, upload
from batchgen_kernels.tree_attention import MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.kvcache import Pool


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Levels below the root, nodes kept per level while drafting, and nodes verified per row (root excluded)."""

    depth: int
    width: int
    nodes: int

    def __post_init__(self) -> None:
        if self.nodes >= MAX_NODES or (self.depth - 1) * self.width >= MAX_NODES:
            raise ValueError(f"{self} does not fit a tile of {MAX_NODES} nodes")


@dataclasses.dataclass(frozen=True, slots=True)
class RowTree:
    """One row's tree, the root at index 0 and parents before children.

    `tokens[0]` is the root's token; `bits[i]` has bit j set when j is i or an ancestor of i.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    bits: list[int]
    candidates: list[int] = dataclasses.field(default_factory=list)
    """The `Candidates` column of each node but the root."""

    def children(self, node: int) -> list[int]:
        """The nodes whose parent is `node`."""
        return [i for i in range(node + 1, len(self.tokens)) if self.parents[i] == node]

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if the tree has one."""
        return next((i for i in self.children(node) if self.tokens[i] == token), None)


@dataclasses.dataclass(slots=True)
class Candidates:
    """Every drafted node of B rows, [B, P] each, in level order.

    score: cumulative draft log-probability of the path, float32, by which the beam is chosen
    logp: draft log-probability of the token itself; rank: its place among its siblings, 0 the likeliest
    parent: a candidate, or -1 under the root; depth: 1 under the root
    """

    score: torch.Tensor
    logp: torch.Tensor
    rank: torch.Tensor
    token: torch.Tensor
    parent: torch.Tensor
    depth: torch.Tensor

    def on_host(self) -> Candidates:
        """The same on the CPU, in one transfer."""
        if self.token.device.type == "cpu":
            return self
        fields = [getattr(self, name) for name in Candidates.__slots__]
        # float64 holds token ids, and whatever else there is, exactly.
        there = torch.stack([field.double() for field in fields]).cpu()
        return Candidates(*(each.to(field.dtype) for each, field in zip(there, fields, strict=True)))


def root_only(tokens: Sequence[int]) -> list[RowTree]:
    """Trees without draft nodes: one plain decoding step per row."""
    return [RowTree([token], [0], [0], [1]) for token in tokens]


def grow(
    draft: Draft, pool: Pool, slots: Sequence[int], state: torch.Tensor, context: Sequence[int], shape: Shape
) -> Candidates:
    """Draft `shape.depth` levels for all rows.

    Row b stands in slot `slots[b]` of `pool`, with `context[b]` true slots written, the last of which gave the output
    state `state[b]`.
    """
    num_rows, width = len(slots), shape.width
    slot_R, prefix_R = (upload(np.array(each, np.int64), state.device) for each in (slots, context))
    rank = torch.arange(width, device=state.device)
    score, token = draft.top(state, width)
    parent = torch.full_like(token, -1)
    found = [Candidates(score, score, rank.expand(num_rows, -1), token, parent, torch.ones_like(token))]
    num_candidates = width
    beam = rank.expand(num_rows, -1)
    parent_state = state[:, None].expand(-1, width, -1)
    bits = (1 << rank).expand(num_rows, -1)
    for level in range(1, shape.depth):
        layout = Layout.even(slot_R, prefix_R, bits, (level - 1) * width, level - 1, draft.heads)
        # Of one row, the reshaped expansion would still be a view of stride 0, which kernels refuse.
        hidden = parent_state.reshape(num_rows * width, -1).contiguous()
        out, *top = draft.level(token.reshape(-1), hidden, layout, pool, width)
        # Copies: the next level writes its own to the same place.
        logp, children = (t.reshape(num_rows, width * width).clone() for t in top)
        child_score = score.repeat_interleave(width, 1) + logp
        child_rank = rank.repeat(width).expand(num_rows, -1)
        depth = torch.full_like(children, level + 1)
        found.append(Candidates(child_score, logp, child_rank, children, beam.repeat_interleave(width, 1), depth))
        best = child_score.sort(dim=-1, descending=True, stable=True).indices[:, :width]
        score, token = child_score.gather(1, best), children.gather(1, best)
        beam = num_candidates + best
        parent_state = out.view(num_rows, width, -1).gather(1, (best // width)[..., None].expand(-1, -1, out.shape[-1]))
        own = 1 << (level * width + rank)
        bits = bits.gather(1, best // width) | own if level + 1 < shape.depth else bits
        num_candidates += width * width
    return Candidates(*(torch.cat([getattr(c, f) for c in found], 1) for f in Candidates.__slots__))


def likeliest(candidates: Candidates, depth_caps: torch.Tensor, nodes: int) -> torch.Tensor:
    """Each row's `nodes` likeliest candidates no deeper than `depth_caps` [B], bool [B, P]; parents always included."""
    usable = candidates.depth <= depth_caps[:, None]
    order = candidates.score.masked_fill(~usable, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(usable).scatter_(1, order[:, :nodes], True)
    return kept & usable


def trees(candidates: Candidates, kept: torch.Tensor, roots: Sequence[int]) -> list[RowTree]:
    """Every row's tree of its kept candidates, among which no node lacks its parent."""
    tokens, parents, depths = (getattr(candidates, field).tolist() for field in ("token", "parent", "depth"))
    made = []
    for b, row in enumerate(kept.tolist()):
        tree = RowTree([roots[b]], [0], [0], [1])
        place = {-1: 0}
        for candidate in (i for i, keep in enumerate(row) if keep):
            parent = place[parents[b][candidate]]
            place[candidate] = len(tree.tokens)
            tree.bits.append(tree.bits[parent] | 1 << len(tree.tokens))
            tree.tokens.append(tokens[b][candidate])
            tree.parents.append(parent)
            tree.depths.append(depths[b][candidate])
            tree.candidates.append(candidate)
        made.append(tree)
    return made
