"""Attention of packed rows to their KV prefix and to the nodes of their own tree, or causally to their own chunk.

One forward pass carries tokens of many rows side by side. A row's tokens either form a *tile* (at most 64 tree nodes,
each with a bitmask of the nodes it may see) or a *span* (a chunk of prompt, causal). Keys and values are read from
slot-contiguous pools, where the pass's own tokens were written beforehand. Tiles are read by the kernel of `attend`, or
by torch on a CPU: there query heads that share a key/value head are packed into the row dimension, so that each key is
read once per group, and slots in blocks, so that a long row or a wide tree pads its neighbours only.

Torch's SDPA takes about 20 us for every slot, however little is in it. Batched products take less: in float32 for plain
decoding (a tenth with 64 rows on two Intel cores), in bfloat16 for trees of every width (on two AMD cores with bfloat16
0.6 of SDPA's time with 16 slots of 224 tokens and 1 to 8 nodes each). Scores are then rounded to bfloat16 before the
softmax, as in transformers' eager attention: on random keys the result is off by 0.4 to 1 % of float32's instead of by
0.2 %. What that is beside all else that bfloat16 rounds: the demo's logits are off by 1.75 instead of 1.73 %.

Shape legend: N packed tokens, R tiles, S slots, T tile width, L pool length, H query heads, K key/value heads,
G = H // K, D head size.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from batchgen_kernels.attend import tree_attend

MAX_NODES = 64  # bits of an ancestor mask, the root included


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A causal chunk: packed tokens [start, stop) of slot `slot`, whose first token stands at `prefix` in the pool."""

    start: int
    stop: int
    slot: int
    prefix: int


@dataclasses.dataclass(frozen=True, slots=True)
class Ragged:
    """All tiles of a pass as `attend.tree_attend` takes them, on the device."""

    slot_R: torch.Tensor
    start_R: torch.Tensor
    count_R: torch.Tensor
    prefix_R: torch.Tensor
    bits_N: torch.Tensor
    position_N: torch.Tensor
    max_count: int
    splits: int
    window: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """Tiles of neighbouring slots `first` to `stop`, padded to one width T and one pool length L.

    start: their first place among the padded queries of the pass
    mask: float [stop - first, 1, G * T, L], or [(stop - first) * K, G * T, L] where products are to compute it; 0 where
        query t of a slot may see pool column l, else -inf
    """

    first: int
    stop: int
    start: int
    width: int
    mask: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Padded:
    """All tiles of a pass as torch's SDPA takes them: P padded queries in blocks of slots.

    token_P: packed index of each padded query, padding points at packed token 0; None where all are in their places
    flat_N: for each tile token its place in P; they are the first of the packed tokens
    """

    blocks: list[Block]
    token_P: torch.Tensor | None
    flat_N: torch.Tensor


def tile_mask(
    prefix_S: torch.Tensor,
    bits_ST: torch.Tensor,
    position_ST: torch.Tensor,
    length: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> torch.Tensor:
    """Additive mask [S, T, length] from per-slot prefix lengths and per-query bitmasks over the tile's columns.

    Column c of slot s is visible when c < prefix_S[s], or when bit c - prefix_S[s] of bits_ST[s, t] is set. With a
    `window`, prefix columns (whose position is c) are visible only less than `window` positions back; a tile is
    assumed to be narrower than any window.
    """
    column = torch.arange(length, device=prefix_S.device) - prefix_S[:, None]  # [S, L]
    in_prefix = (column < 0)[:, None].expand(-1, bits_ST.shape[1], -1)
    if window is not None:
        distance = position_ST[:, :, None] - torch.arange(length, device=prefix_S.device)
        in_prefix = in_prefix & (distance < window)
    bit = (bits_ST[:, :, None] >> column.clamp(0, MAX_NODES - 1)[:, None]) & 1
    in_tile = ((column >= 0) & (column < MAX_NODES))[:, None] & (bit == 1)
    mask = torch.zeros((*bits_ST.shape, length), dtype=dtype, device=prefix_S.device)
    return mask.masked_fill_(~(in_prefix | in_tile), float("-inf"))


def tree_attention(
    q_NHD: torch.Tensor,
    k_SKLD: torch.Tensor,
    v_SKLD: torch.Tensor,
    tiles: Padded | Ragged | None,
    spans: list[tuple[Span, torch.Tensor]],
    scale: float,
) -> torch.Tensor:
    """Attention output [N, H, D] in the dtype of `q_NHD`; padding queries are computed and dropped.

    Each span comes with its `span_mask`: masks are built once a pass and used in every layer.
    """
    out_NHD = torch.empty_like(q_NHD)
    if isinstance(tiles, Ragged):
        rows = (tiles.slot_R, tiles.start_R, tiles.count_R, tiles.prefix_R, tiles.bits_N)
        how = (scale, tiles.max_count, tiles.splits, tiles.window, tiles.position_N)
        tree_attend(q_NHD, k_SKLD, v_SKLD, *rows, *how, out_NHD)
    elif tiles is not None:
        _attend_padded(q_NHD, k_SKLD, v_SKLD, tiles, scale, out_NHD)
    for span, mask in spans:
        stop = span.prefix + span.stop - span.start
        q = q_NHD[span.start : span.stop].transpose(0, 1)[None]
        k, v = k_SKLD[span.slot, :, :stop][None], v_SKLD[span.slot, :, :stop][None]
        o = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        out_NHD[span.start : span.stop] = o[0].transpose(0, 1)
    return out_NHD


def _attend_padded(
    q_NHD: torch.Tensor,
    k_SKLD: torch.Tensor,
    v_SKLD: torch.Tensor,
    tiles: Padded,
    scale: float,
    out_NHD: torch.Tensor,
) -> None:
    num_heads, head_dim = q_NHD.shape[1:]
    num_kv = k_SKLD.shape[1]
    group = num_heads // num_kv
    q_PHD = q_NHD if tiles.token_P is None else q_NHD.index_select(0, tiles.token_P)
    out_PHD = out_NHD if tiles.token_P is None else torch.empty_like(q_PHD)
    for block in tiles.blocks:
        slots, width, length = block.stop - block.first, block.width, block.mask.shape[-1]
        at = slice(block.start, block.start + slots * width)
        q = q_PHD[at].view(slots, width, num_kv, group, head_dim).permute(0, 2, 3, 1, 4)
        k, v = (x[block.first : block.stop, :, :length] for x in (k_SKLD, v_SKLD))
        if block.mask.dim() == 4:
            q = q.reshape(slots, num_kv, group * width, head_dim)
            o = scaled_dot_product_attention(q, k, v, block.mask, scale=scale)
        else:
            q = q.reshape(slots * num_kv, group * width, head_dim)
            o = torch.bmm(_scores(q, k.flatten(0, 1), block.mask, scale).softmax(-1), v.flatten(0, 1))
        out_PHD[at].view(slots, width, num_kv, group, head_dim).copy_(
            o.view(slots, num_kv, group, width, head_dim).permute(0, 3, 1, 2, 4)
        )
    if tiles.token_P is not None:
        torch.index_select(out_PHD, 0, tiles.flat_N, out=out_NHD[: len(tiles.flat_N)])


def _scores(q_BQD: torch.Tensor, k_BLD: torch.Tensor, mask_BQL: torch.Tensor, scale: float) -> torch.Tensor:
    if q_BQD.dtype is torch.float32:
        return torch.baddbmm(mask_BQL, q_BQD, k_BLD.transpose(1, 2), alpha=scale)
    # oneDNN rearranges what comes second: that had better be the queries than the keys.
    scores_BLQ = torch.bmm(k_BLD, q_BQD.transpose(1, 2))
    return torch.add(mask_BQL, scores_BLQ.transpose(1, 2).contiguous(), alpha=scale)


def span_mask(span: Span, dtype: torch.dtype, device: torch.device, window: int | None = None) -> torch.Tensor:
    """Causal mask [T, prefix + T] of one span, to be added; in half precision on a GPU one that is only named.

    With a mask of numbers SDPA neither takes flash attention nor anything else that knows grouped heads: it would
    repeat keys and keep all scores, gigabytes of a long prompt. A window has no such name.
    """
    num, length = span.stop - span.start, span.prefix + span.stop - span.start
    if device.type == "cuda" and dtype is not torch.float32 and (window is None or window >= length):
        named: torch.Tensor = causal_lower_right(num, length)
        return named
    query = torch.arange(span.prefix, length, device=device)[:, None]
    distance = query - torch.arange(length, device=device)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
