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
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchgen.engines.torch.layout import Layout, upload
from batchgen.speculation.lookup import Merged
from batchgen_kernels.tree_attention import MAX_NODES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.kvcache import Pool
    from batchgen.speculation.lookup import Found


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Levels below the root, nodes expanded per level while drafting, and nodes verified per row (root excluded).

    Of each expanded node the `children` likeliest next tokens are candidates, `width` unless given. A row goes on below
    a level only if the head takes its likeliest path to there for at least `floor` likely.
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
class Forest:
    """The trees of R rows side by side, N nodes in all: a row's root before its other nodes, parents before children.

    start_R: places of the roots among all nodes
    row_N, token_N, depth_N: a node's row, token and levels below its root
    parent_N: place of its parent among all nodes, -1 of a root; candidate_N: its `Candidates` column, -1 of a root
    bits_N: uint64, bit j is set of a node that is the j-th of its row or descends from it
    """

    start_R: NDArray[np.int64]
    row_N: NDArray[np.int64]
    token_N: NDArray[np.int64]
    depth_N: NDArray[np.int64]
    parent_N: NDArray[np.int64]
    candidate_N: NDArray[np.int64]
    bits_N: NDArray[np.uint64]

    def counts(self) -> NDArray[np.int64]:
        """Nodes of each row."""
        return np.diff(self.start_R, append=len(self.row_N))

    @staticmethod
    def of_roots(tokens: Sequence[int]) -> Forest:
        """Trees without draft nodes: one plain decoding step per row."""
        rows, none = np.arange(len(tokens)), np.full(len(tokens), -1)
        return Forest(rows, rows, np.array(tokens, np.int64), 0 * rows, none, none, np.ones(len(tokens), np.uint64))

    @staticmethod
    def of(candidates: Candidates, kept: torch.Tensor, rows: Sequence[int], roots: Sequence[int]) -> Forest:
        """Trees on the tokens `roots` [R], those of `rows`, B rising ones, with their `kept` candidates, bool [B, P].

        None may be kept without its parent.
        """
        place, column = np.nonzero(kept.numpy())
        count_R = 1 + np.bincount(np.array(rows, np.int64)[place], minlength=len(roots))
        start_R, num_nodes = np.cumsum(count_R) - count_R, int(count_R.sum())
        row_N, node = np.repeat(np.arange(len(roots)), count_R), np.delete(np.arange(num_nodes), start_R)
        token_N, depth_N, parent_N, candidate_N = (np.full(num_nodes, value) for value in (0, 0, -1, -1))
        token_N[start_R], token_N[node] = roots, candidates.token.numpy()[place, column]
        depth_N[node], candidate_N[node] = candidates.depth.numpy()[place, column], column
        nodes = np.full((len(rows), kept.shape[1] + 1), -1)
        nodes[:, -1] = start_R[rows]  # where a parent of -1 finds it
        nodes[place, column] = node
        parent_N[node] = nodes[place, candidates.parent.numpy()[place, column]]
        assert (parent_N[node] >= 0).all(), "a node is kept without its parent"
        bits_N = np.left_shift(np.uint64(1), (np.arange(num_nodes) - start_R[row_N]).astype(np.uint64))
        for level in range(1, int(depth_N.max()) + 1):
            at = np.flatnonzero(depth_N == level)
            bits_N[at] |= bits_N[parent_N[at]]
        return Forest(start_R, row_N, token_N, depth_N, parent_N, candidate_N, bits_N)


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

    def beside(self, found: Found) -> tuple[Candidates, Merged]:
        """These, on the host, and behind them what was looked up for the same rows."""
        columns = (self.token, self.parent, self.rank, self.logp)
        merged = Merged.of(found, *(column.numpy() for column in columns))
        (num_rows, num_found), num_drafted = found.token.shape, self.token.shape[1]
        place = np.where(merged.twin >= 0, merged.twin, num_drafted + np.arange(num_found))
        parent = torch.from_numpy(np.concatenate([np.full((num_rows, 1), -1), place[:, :-1]], 1)[:, :num_found])
        depth = torch.arange(1, num_found + 1).expand(num_rows, -1)
        unlikely = torch.full((num_rows, num_found), float("-inf"))
        token, none = torch.from_numpy(found.token), torch.zeros_like(depth)
        looked_up = Candidates(unlikely, unlikely, none, token, parent, depth)
        return Candidates.joined([self, looked_up]), merged

    @staticmethod
    def none(num_rows: int) -> Candidates:
        """No candidates of `num_rows` rows."""
        number, place = torch.empty(num_rows, 0), torch.empty(num_rows, 0, dtype=torch.int64)
        return Candidates(number, number, place, place, place, place)

    @staticmethod
    def joined(levels: Sequence[Candidates]) -> Candidates:
        """Levels side by side."""
        return Candidates(*(torch.cat([getattr(c, name) for c in levels], 1) for name in Candidates.__slots__))


def grow(
    draft: Draft,
    pool: Pool,
    slots: Sequence[int],
    state: torch.Tensor,
    context: Sequence[int],
    shape: Shape,
    caps: torch.Tensor | None = None,
) -> Candidates:
    """Draft `shape.depth` levels for all rows, or fewer where `shape.floor` ends them all.

    Row b stands in slot `slots[b]` of `pool`, with `context[b]` true slots written, the last of which gave the output
    state `state[b]`. With a floor each level is waited for, and row b is drafted no deeper than `caps[b]`.
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
    least = math.log(shape.floor) if shape.floor > 0.0 else None
    for level in range(1, shape.depth):
        if least is not None:
            likely = score[:, 0] >= least
            going = (likely if caps is None else likely & (caps.to(alive.device)[alive] > level)).nonzero().view(-1)
            if len(going) == 0:
                break
            if len(going) < len(alive):
                alive, slot_R, prefix_R, score, token = (t[going] for t in (alive, slot_R, prefix_R, score, token))
                beam, parent_state, bits = (t[going] for t in (beam, parent_state, bits))
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
        parent_state = out.view(len(alive), width, -1).gather(1, above[..., None].expand(-1, -1, out.shape[-1]))
        own = 1 << (level * width + place)
        bits = bits.gather(1, above) | own if level + 1 < shape.depth else bits
        num_candidates += width * children
    return Candidates.joined(found)


def likeliest(candidates: Candidates, depth_caps: torch.Tensor, nodes: int) -> torch.Tensor:
    """Each row's `nodes` likeliest candidates no deeper than `depth_caps` [B], bool [B, P]; parents always included."""
    usable = (candidates.depth <= depth_caps[:, None]) & candidates.score.isfinite()
    order = candidates.score.masked_fill(~usable, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(usable).scatter_(1, order[:, :nodes], True)
    return kept & usable
