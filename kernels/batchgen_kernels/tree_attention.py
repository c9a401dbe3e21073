"""Attention of packed rows to their KV prefix and to the nodes of their own tree, or causally to their own chunk.

One forward pass carries tokens of many rows side by side. A row's tokens either form a *tile* (at most 64 tree nodes,
each with a bitmask of the nodes it may see) or a *span* (a chunk of prompt, causal). Keys and values are read from
slot-contiguous pools, where the pass's own tokens were written beforehand. Query heads that share a key/value head are
packed into the row dimension, so that each key is read once per group.

Shape legend: N packed tokens, S slots, T tile width, L pool length, H query heads, K key/value heads, G = H // K,
D head size.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.functional import scaled_dot_product_attention

MAX_NODES = 64  # bits of an ancestor mask, the root included


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A causal chunk: packed tokens [start, stop) of slot `slot`, whose first token stands at `prefix` in the pool."""

    start: int
    stop: int
    slot: int
    prefix: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """All tiles of a pass, padded to [S, T]; S is the highest slot in use plus one.

    token_ST: packed index of each tile query, padding points at packed token 0
    flat_N: for each packed tile token, in packed order, its place in the flattened [S * T]
    packed_N: for each packed tile token its packed index
    mask: float [S, 1, G * T, L], 0 where query t of slot s may see pool column l, else -inf
    """

    token_ST: torch.Tensor
    flat_N: torch.Tensor
    packed_N: torch.Tensor
    mask: torch.Tensor


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
    tiles: Tiles | None,
    spans: list[tuple[Span, torch.Tensor]],
    scale: float,
) -> torch.Tensor:
    """Attention output [N, H, D] in the dtype of `q_NHD`; padding queries are computed and dropped.

    Each span comes with its `span_mask`: masks are built once a pass and used in every layer.
    """
    out_NHD = torch.empty_like(q_NHD)
    num_heads, head_dim = q_NHD.shape[1:]
    num_kv = k_SKLD.shape[1]
    group = num_heads // num_kv
    if tiles is not None:
        (slots, width), length = tiles.token_ST.shape, tiles.mask.shape[3]
        q = q_NHD[tiles.token_ST].view(slots, width, num_kv, group, head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(slots, num_kv, group * width, head_dim)
        k, v = k_SKLD[:slots, :, :length], v_SKLD[:slots, :, :length]
        o = scaled_dot_product_attention(q, k, v, tiles.mask, scale=scale)
        o = o.view(slots, num_kv, group, width, head_dim).permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)
        out_NHD[tiles.packed_N] = o[tiles.flat_N]
    for span, mask in spans:
        stop = span.prefix + span.stop - span.start
        q = q_NHD[span.start : span.stop].transpose(0, 1)[None]
        k, v = k_SKLD[span.slot, :, :stop][None], v_SKLD[span.slot, :, :stop][None]
        o = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        out_NHD[span.start : span.stop] = o[0].transpose(0, 1)
    return out_NHD


def span_mask(span: Span, dtype: torch.dtype, device: torch.device, window: int | None = None) -> torch.Tensor:
    """Additive causal mask [T, prefix + T] of one span."""
    query = torch.arange(span.prefix, span.prefix + span.stop - span.start, device=device)[:, None]
    distance = query - torch.arange(span.prefix + span.stop - span.start, device=device)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
