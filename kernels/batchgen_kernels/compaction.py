"""Accepted tree nodes move next to their prefix in the KV pool, in all layers at once.

A node of depth d has the rotary position of pool position prefix + d, whichever column it was drafted in, so keys move
as they are. Rejected nodes stay behind as garbage beyond every length.

Shape legend: layers, S slots, K key/value heads, L pool length, D head size, M moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen_kernels.dispatch import with_kernel

if TYPE_CHECKING:
    import torch


@with_kernel("triton_compaction")
def compact(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slot_M: torch.Tensor,
    source_M: torch.Tensor,
    destination_M: torch.Tensor,
) -> None:
    """Copy position `source` of `slot` to `destination`, in place, in both pools [layers, S, K, L, D].

    The moves are int64. Those of one slot come with sources and destinations strictly ascending and destination <=
    source; they may stand apart and overlap. A negative slot is no move.
    """
    real = slot_M >= 0
    slot, source, destination = slot_M[real], source_M[real], destination_M[real]
    for pool in (k_pool, v_pool):  # indexing gathers every source before it writes a destination
        pool[:, slot, :, destination] = pool[:, slot, :, source]
