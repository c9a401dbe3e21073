"""Draft trees for all running rows at once: deterministic top-k of the head, level by level.

As EAGLE-2 (arXiv 2406.16858) and SafeAILab's `topK_genrate`: the likeliest children of each of the `width`
likeliest nodes of a level are candidates, of which the verified nodes are chosen: the likeliest of each row here, or
across all rows by `speculation.budget`. A chain is width 1. Trees never look at sampling noise, which is what makes
verification by following the sampled token exact.
Where a level may be waited for, a row whose likeliest path has become unlikely is not drafted deeper: it would pay for
passes of the head whose nodes nobody verifies (confidence thresholds of chains, as in SpecDec++, arXiv 2405.19715).
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
    from collections.abc import Callable, Sequence

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.kvcache import Pool


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Levels below the root, nodes expanded per level while drafting, and nodes verified per row (root excluded).

    Of each expanded node the `children` likeliest next tokens are candidates, `width` unless given. A row goes on below
    a level only if its likeliest path to there is at least `floor` likely to be kept.
    """

    depth: int
    width: int
    nodes: int
    floor: float = 0.0
    children: int = 0

    def __post_init__(self) -> None:
        if not self.children:
            object.__setattr__(self, "children", self.width)
        if self.children < self.width:
            raise ValueError(f"{self}: the first level has too few candidates for its width")
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

    def level_tokens(self, shape: Shape) -> list[int]:
        """Tokens of each pass of the head that drafted these, after the catch-up that gave level 1."""
        drafted = self.logp.isfinite().sum(0)[shape.children :: shape.width * shape.children]
        return [int(rows) * shape.width for rows in drafted]

    def of_rows(self, rows: torch.Tensor, num_rows: int) -> Candidates:
        """These as candidates of `rows`, rising, among `num_rows` rows; the others' have probability 0."""
        if len(rows) == num_rows:
            return self
        whole = []
        for name in Candidates.__slots__:
            own = getattr(self, name)
            filled = own.new_full((num_rows, own.shape[1]), float("-inf")) if own.is_floating_point() else own[:1]
            whole.append(filled.expand(num_rows, -1).clone().index_copy_(0, rows, own))
        return Candidates(*whole)

    @staticmethod
    def joined(levels: Sequence[Candidates]) -> Candidates:
        """Levels side by side."""
        return Candidates(*(torch.cat([getattr(c, name) for c in levels], 1) for name in Candidates.__slots__))


def root_only(tokens: Sequence[int]) -> list[RowTree]:
    """Trees without draft nodes: one plain decoding step per row."""
    return [RowTree([token], [0], [0], [1]) for token in tokens]


def grow(
    draft: Draft,
    pool: Pool,
    slots: Sequence[int],
    state: torch.Tensor,
    context: Sequence[int],
    shape: Shape,
    accepted: Callable[[Candidates, torch.Tensor], torch.Tensor] | None = None,
) -> Candidates:
    """Draft `shape.depth` levels for all rows, or fewer where `shape.floor` ends them all.

    Row b stands in slot `slots[b]` of `pool`, with `context[b]` true slots written, the last of which gave the output
    state `state[b]`. With a floor `accepted` says how likely each candidate of a level of some rows is kept once its
    parent is, and is waited for.
    """
    num_rows, width, children = len(slots), shape.width, shape.children
    slot_R, prefix_R = (upload(np.array(each, np.int64), state.device) for each in (slots, context))
    rank = torch.arange(children, device=state.device)
    score, token = draft.top(state, children)
    parent = torch.full_like(token, -1)
    found = [Candidates(score, score, rank.expand(num_rows, -1), token, parent, torch.ones_like(token))]
    num_candidates = children
    score, token, place = score[:, :width], token[:, :width], rank[:width]
    beam = place.expand(num_rows, -1)
    parent_state = state[:, None].expand(-1, width, -1)
    bits = (1 << place).expand(num_rows, -1)
    alive = torch.arange(num_rows, device=state.device)
    stops = accepted if shape.floor > 0.0 else None
    likely = stops(found[0], alive) if stops else score
    best_likely = likely[:, :width]
    for level in range(1, shape.depth):
        if stops:
            going = (likely.amax(1) >= shape.floor).nonzero().view(-1)
            if len(going) == 0:
                break
            if len(going) < len(alive):
                alive, slot_R, prefix_R, score, token = (t[going] for t in (alive, slot_R, prefix_R, score, token))
                beam, parent_state, bits, best_likely = (t[going] for t in (beam, parent_state, bits, best_likely))
        layout = Layout.even(slot_R, prefix_R, bits, (level - 1) * width, level - 1, draft.heads)
        # Of one row, the reshaped expansion would still be a view of stride 0, which kernels refuse.
        hidden = parent_state.reshape(len(alive) * width, -1).contiguous()
        out, *top = draft.level(token.reshape(-1), hidden, layout, pool, children)
        # Copies: the next level writes its own to the same place.
        logp, tokens = (t.reshape(len(alive), width * children).clone() for t in top)
        child_score = score.repeat_interleave(children, 1) + logp
        child_rank = rank.repeat(width).expand(len(alive), -1)
        depth = torch.full_like(tokens, level + 1)
        here = Candidates(child_score, logp, child_rank, tokens, beam.repeat_interleave(children, 1), depth)
        found.append(here.of_rows(alive, num_rows))
        best = child_score.sort(dim=-1, descending=True, stable=True).indices[:, :width]
        score, token = child_score.gather(1, best), tokens.gather(1, best)
        beam = num_candidates + best
        above = best // children
        if stops:
            likely = best_likely.repeat_interleave(children, 1) * stops(here, alive)
            best_likely = likely.gather(1, best)
        parent_state = out.view(len(alive), width, -1).gather(1, above[..., None].expand(-1, -1, out.shape[-1]))
        own = 1 << (level * width + place)
        bits = bits.gather(1, above) | own if level + 1 < shape.depth else bits
        num_candidates += width * children
    return Candidates.joined(found)


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
