"""Draft trees for all running rows at once: deterministic top-k of the head, level by level.

As EAGLE-2 (arXiv 2406.16858) and SafeAILab's `topK_genrate`: the `width` likeliest children of each of the `width`
likeliest nodes of a level are candidates, and the `nodes` likeliest candidates of all levels are verified. A chain is
width 1. Trees never look at sampling noise, which is what makes verification by following the sampled token exact.
A child ties with a parent of probability 1; selection is stable in level order, so that a parent is never dropped
before its child (SGLang's "invalid eagle tree" is that tie).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from batchgen.engines.torch.kvcache import Pool, Tile
from batchgen_kernels.tree_attention import MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.engines.torch.draft import Draft


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

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if the tree has one."""
        for i in range(node + 1, len(self.tokens)):
            if self.parents[i] == node and self.tokens[i] == token:
                return i
        return None


@dataclasses.dataclass(slots=True)
class _Candidates:
    """Every drafted node so far, [B, P] each, in level order; `parent` is a candidate, or -1 under the root."""

    score: torch.Tensor
    token: torch.Tensor
    parent: torch.Tensor
    depth: torch.Tensor


def root_only(tokens: Sequence[int]) -> list[RowTree]:
    """Trees without draft nodes: one plain decoding step per row."""
    return [RowTree([token], [0], [0], [1]) for token in tokens]


def grow(
    draft: Draft,
    pool: Pool,
    roots: Sequence[int],
    state: torch.Tensor,
    context: Sequence[int],
    depth_caps: Sequence[int],
    shape: Shape,
) -> list[RowTree]:
    """Draft one tree per row.

    Row b stands in slot b of `pool`, with `context[b]` true slots written, the last of which gave the output state
    `state[b]`. `depth_caps[b]` is the deepest level that can still be of use to the row (0: none).
    """
    num_rows, width = len(roots), shape.width
    levels = min(shape.depth, max(depth_caps))
    if levels == 0:
        return root_only(roots)
    score, token = draft.top(state, width)
    root_parent = torch.full_like(token, -1)
    found = [_Candidates(score, token, root_parent, torch.ones_like(token))]
    num_candidates = width
    beam = torch.arange(width, device=state.device).expand(num_rows, -1)
    parent_state = state[:, None].expand(-1, width, -1)
    bits = (1 << torch.arange(width, device=state.device)).expand(num_rows, -1)
    for level in range(1, levels):
        columns = [(level - 1) * width + j for j in range(width)]
        tiles = [
            Tile(b * width, b, context[b], row_bits, columns, [context[b] - 1 + level] * width)
            for b, row_bits in enumerate(bits.tolist())
        ]
        layout = draft.layout(tiles, [])
        out = draft.forward(token.reshape(-1), parent_state.reshape(num_rows * width, -1), layout, pool)
        logp, children = draft.top(out, width)
        child_score = (score[:, :, None] + logp.view(num_rows, width, width)).view(num_rows, -1)
        child_token = children.view(num_rows, -1)
        child_parent = beam.repeat_interleave(width, 1)
        found.append(_Candidates(child_score, child_token, child_parent, torch.full_like(child_token, level + 1)))
        best = child_score.sort(dim=-1, descending=True, stable=True).indices[:, :width]
        score, token = child_score.gather(1, best), child_token.gather(1, best)
        beam = num_candidates + best
        parent_state = out.view(num_rows, width, -1).gather(1, (best // width)[..., None].expand(-1, -1, out.shape[-1]))
        own = 1 << (level * width + torch.arange(width, device=state.device))
        bits = bits.gather(1, best // width) | own if level + 1 < levels else bits
        num_candidates += width * width
    everything = _Candidates(*(torch.cat([getattr(c, f) for c in found], 1) for f in _Candidates.__slots__))
    return _select(everything, roots, depth_caps, shape.nodes)


def _select(candidates: _Candidates, roots: Sequence[int], depth_caps: Sequence[int], nodes: int) -> list[RowTree]:
    caps = torch.tensor(depth_caps, device=candidates.score.device)[:, None]
    score = candidates.score.masked_fill(candidates.depth > caps, float("-inf"))
    order = score.sort(dim=-1, descending=True, stable=True).indices[:, :nodes]
    kept = order.sort(-1).values
    usable = score.gather(1, kept).isfinite().tolist()
    tokens, parents, depths = (
        getattr(candidates, field).gather(1, kept).tolist() for field in ("token", "parent", "depth")
    )
    trees = []
    for b, row in enumerate(kept.tolist()):
        tree = RowTree([roots[b]], [0], [0], [1])
        place = {-1: 0}
        for i, candidate in enumerate(row):
            if not usable[b][i]:
                continue
            parent = place[parents[b][i]]
            place[candidate] = len(tree.tokens)
            tree.bits.append(tree.bits[parent] | 1 << len(tree.tokens))
            tree.tokens.append(tokens[b][i])
            tree.parents.append(parent)
            tree.depths.append(depths[b][i])
        trees.append(tree)
    return trees
