"""Where the packed tokens of a pass stand, and who sees whom: for our kernel on a GPU, for torch on a CPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from batchgen_kernels.attend import MAX_COUNTS, num_splits
from batchgen_kernels.dispatch import on_triton
from batchgen_kernels.tree_attention import MAX_NODES, Block, Padded, Ragged, Span, span_mask, tile_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

# Slots that are read together. With 64 rows of 60 to 320 tokens blocks of 16 read about four fifths of what one does.
# Products in bfloat16 take a tenth less in blocks of 32, and less than SDPA from 6 slots on.
BLOCK_SLOTS, BLOCK_SLOTS_BFLOAT16, PRODUCT_SLOTS_BFLOAT16 = 16, 32, 6
# Columns that products in bfloat16 are rounded up to. For each new shape oneDNN compiles code, 0.2 to 0.3 ms on two
# Zen 4 cores, and it keeps that of 1,024 shapes: lengths that grow in every step would be compiled in every step, and
# push out what the products with weights need.
COLUMNS = 16
# Products keep all scores, four times over; SDPA, which takes over beyond so many, keeps a part of them.
MAX_SCORES = 1 << 25
# Padded queries that take as long as a slot of its own: with 128 tokens before them about 20, with 256 about 13.
ALONE_NODES = 16
# Packed tokens, and tiles, that captured passes are padded to.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """The N tree tokens of R rows, at least one, on the host: they stand at 0 to N - 1 of a pass, row after row.

    slot_R, prefix_R: int64; token t of row r has its own key at pool column prefix_R[r] + t
    count_R: int64, how many tokens are of each row, 1 to 64
    bits_N: uint64, has bit c set when the token sees pool column prefix + c
    ahead_N: int64, the token's rotary position less its row's prefix
    """

    slot_R: NDArray[np.int64]
    prefix_R: NDArray[np.int64]
    count_R: NDArray[np.int64]
    bits_N: NDArray[np.uint64]
    ahead_N: NDArray[np.int64]

    @staticmethod
    def chains(slots: ArrayLike, prefixes: ArrayLike, counts: ArrayLike) -> Tiles:
        """Tokens that follow one another and see all before them."""
        count = np.array(counts, np.int64)
        within = _within(count)
        own = np.left_shift(np.uint64(1), within.astype(np.uint64))
        return Tiles(np.array(slots, np.int64), np.array(prefixes, np.int64), count, own | (own - np.uint64(1)), within)


@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """What a layout must know of the attention that reads it; `window` as in `tile_mask`."""

    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where a pass's packed tokens stand: rotary position, slot and pool position of each, and who sees whom."""

    position_N: torch.Tensor
    slot_N: torch.Tensor
    pool_position_N: torch.Tensor
    tiles: Padded | Ragged | None
    spans: list[tuple[Span, torch.Tensor]]

    @staticmethod
    def of(tiles: Tiles | None, spans: list[Span], heads: Heads, *, attends: bool = True) -> Layout:
        """Lay out `tiles` and behind them `spans`; slots must differ, and packed tokens must not overlap.

        A pass that does not attend only stores keys and values, and needs no masks; for our kernel none are made, and
        captured passes are told apart by their tiles.
        """
        num_tile_tokens = 0 if tiles is None else len(tiles.bits_N)
        num_tokens = num_tile_tokens + sum(s.stop - s.start for s in spans)
        position, slot, pool_position, bits = (np.zeros(num_tokens, np.int64) for _ in range(4))
        for span in spans:
            at = slice(span.start, span.stop)
            position[at] = pool_position[at] = np.arange(span.prefix, span.prefix + span.stop - span.start)
            slot[at] = span.slot
        if tiles is not None:
            assert tiles.count_R.max() <= MAX_NODES, "a tile holds at most 64 nodes"
            of_row = np.repeat(np.arange(len(tiles.count_R)), tiles.count_R)
            prefix, at = tiles.prefix_R[of_row], slice(num_tile_tokens)
            position[at], slot[at] = prefix + tiles.ahead_N, tiles.slot_R[of_row]
            pool_position[at] = prefix + _within(tiles.count_R)
            # Bit 63 is the sign bit of int64: the value wraps, the shift in `tile_mask` reads it back.
            bits[at] = tiles.bits_N.view(np.int64)
        tokens = _Tokens(*_together([position, slot, pool_position, bits], heads.device))
        seen = None
        if tiles is not None:
            start_R = np.cumsum(tiles.count_R) - tiles.count_R
            rows = _Rows(*_together([tiles.slot_R, start_R, tiles.count_R, tiles.prefix_R], heads.device))
            seen = _seen(rows, tokens, int(tiles.count_R.max()), heads) if attends or _on_triton(heads) else None
        masked = [(span, span_mask(span, heads.dtype, heads.device, heads.window)) for span in spans if attends]
        return Layout(tokens.position, tokens.slot, tokens.pool_position, seen, masked)

    @staticmethod
    def even(
        slot_R: torch.Tensor, prefix_R: torch.Tensor, bits_RT: torch.Tensor, column: int, ahead: int, heads: Heads
    ) -> Layout:
        """Lay out R tiles of T tokens each from tensors alone, without waiting for their device.

        Row r's tokens are packed together, their keys stand at pool columns `column` + t behind its prefix, and all
        have rotary position `prefix_R` + `ahead`.
        """
        num_rows, width = bits_RT.shape
        within = torch.arange(width, device=bits_RT.device)
        position_N = (prefix_R + ahead).repeat_interleave(width)
        pool_position_N = (prefix_R[:, None] + column + within).view(-1)
        start_R = width * torch.arange(num_rows, device=bits_RT.device)
        rows = _Rows(slot_R, start_R, torch.full_like(start_R, width), prefix_R)
        tokens = _Tokens(position_N, slot_R.repeat_interleave(width), pool_position_N, bits_RT.reshape(-1).contiguous())
        return Layout(tokens.position, tokens.slot, tokens.pool_position, _seen(rows, tokens, width, heads), [])


class _Rows(NamedTuple):
    slot: torch.Tensor
    start: torch.Tensor
    num: torch.Tensor
    prefix: torch.Tensor


class _Tokens(NamedTuple):
    position: torch.Tensor
    slot: torch.Tensor
    pool_position: torch.Tensor
    bits: torch.Tensor


def _together(columns: Sequence[NDArray[np.int64]], device: torch.device) -> list[torch.Tensor]:
    """`columns`, all of one length, on `device` in one transfer."""
    length = len(columns[0])
    # Each begins at a multiple of 16 bytes: kernels are compiled anew for pointers that are not.
    table = np.zeros((len(columns), length + length % 2), np.int64)
    table[:, :length] = columns
    return [column[:length] for column in upload(table, device)]


def _within(count_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each packed token in its row."""
    return np.arange(count_R.sum()) - np.repeat(np.cumsum(count_R) - count_R, count_R)


def _on_triton(heads: Heads) -> bool:
    return on_triton(torch.empty(0, dtype=heads.dtype, device=heads.device))


def _seen(rows: _Rows, tokens: _Tokens, width: int, heads: Heads) -> Padded | Ragged:
    """Who sees whom in tiles of at most `width` tokens, as what computes it on their device wants it."""
    if not _on_triton(heads):
        return _pad(rows, tokens, heads)
    num_sms = torch.cuda.get_device_properties(heads.device).multi_processor_count if heads.device.type == "cuda" else 1
    splits = num_splits(padded_size(len(rows.slot)), heads.num_kv_heads, num_sms)
    max_count = next(count for count in MAX_COUNTS if count >= width)
    return Ragged(*rows, tokens.bits, tokens.position, max_count, splits, heads.window)


def _pad(rows: _Rows, tokens: _Tokens, heads: Heads) -> Padded:
    slot_R, start_R, count_R, prefix_R = (column.numpy() for column in rows)
    within = _within(count_R)
    position_N, pool_position_N, bits_N = (
        each.numpy()[: len(within)] for each in (tokens.position, tokens.pool_position, tokens.bits)
    )
    num_slots = int(slot_R.max()) + 1
    # A slot without a tile is a query that sees column 0, so that its softmax is defined.
    count_S, length_S, prefix_S = (
        np.zeros(num_slots, np.int64),
        np.ones(num_slots, np.int64),
        np.ones(num_slots, np.int64),
    )
    count_S[slot_R], prefix_S[slot_R] = count_R, prefix_R
    length_S[slot_R] = np.maximum.reduceat(pool_position_N, start_R) + 1
    start, extents = 0, []
    # A slot's first `width_S` tokens stand at `base_S`, what it has beyond them at `tail_S`.
    width_S, base_S, tail_S = (np.zeros(num_slots, np.int64) for _ in range(3))
    block_slots = BLOCK_SLOTS if heads.dtype is torch.float32 else BLOCK_SLOTS_BFLOAT16
    for first in range(0, num_slots, block_slots):
        stop = min(first + block_slots, num_slots)
        width = _shared_width(count_S[first:stop])
        if width == 0:
            continue
        width_S[first:stop], base_S[first:stop] = width, start + width * np.arange(stop - first)
        extents.append((first, stop, start, width, int(length_S[first:stop].max())))
        start += width * (stop - first)
        for slot in (first + np.flatnonzero(count_S[first:stop] > width)).tolist():
            tail_S[slot], beyond = start, int(count_S[slot]) - width
            extents.append((slot, slot + 1, start, beyond, int(length_S[slot])))
            start += beyond
    slot_N = np.repeat(slot_R, count_R)
    in_tail_N = within - width_S[slot_N]
    flat = np.where(in_tail_N < 0, base_S[slot_N] + within, tail_S[slot_N] + in_tail_N)
    token_P, bits_P, position_P = (np.zeros(start, np.int64) for _ in range(3))
    for padded, values in ((token_P, np.arange(len(within))), (bits_P, bits_N), (position_P, position_N)):
        padded[flat] = values
    blocks = []
    group = heads.num_heads // heads.num_kv_heads
    for first, stop, begin, width, length in extents:
        at = slice(begin, begin + width * (stop - first))
        bits_ST, position_ST = (torch.from_numpy(each[at].reshape(-1, width)) for each in (bits_P, position_P))
        prefix = torch.from_numpy(prefix_S[first:stop])
        by_products = width == 1 if heads.dtype is torch.float32 else stop - first >= PRODUCT_SLOTS_BFLOAT16
        by_products = by_products and (stop - first) * heads.num_heads * width * length <= MAX_SCORES
        columns = length
        if by_products and heads.dtype is not torch.float32:
            columns += -length % COLUMNS
        window = heads.window if heads.window is not None and heads.window < length else None
        mask = tile_mask(prefix, bits_ST, position_ST, columns, heads.dtype, window)
        every = (stop - first, heads.num_kv_heads if by_products else 1, group, width, columns)
        mask = mask[:, None, None].expand(every).reshape(*every[:2], group * width, columns)
        mask = mask.flatten(0, 1) if by_products else mask
        blocks.append(Block(first, stop, begin, width, mask))
    in_place = len(token_P) == len(within) and bool((token_P == np.arange(len(token_P))).all())
    return Padded(blocks, None if in_place else torch.from_numpy(token_P), torch.from_numpy(flat))


def _shared_width(count_S: np.ndarray) -> int:
    """The width to which tiles of neighbouring slots are padded, 0 without any; what goes beyond is computed alone."""
    if (count_S == count_S[0]).all():
        return int(count_S[0])

    def cost(width: int) -> int:
        beyond = (count_S - width).clip(0)
        return int(width * len(count_S) + (beyond + ALONE_NODES * (beyond > 0)).sum())

    return min((int(count) for count in np.unique(count_S) if count), key=cost, default=0)


def padded_size(num: int) -> int:
    """The least of `SIZES` that holds `num`, or `num` itself."""
    return next((size for size in SIZES if size >= num), num)


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """`values` on `device`; the host goes on before they are there."""
    host = torch.from_numpy(values)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
