"""Keys and values of the running rows, one contiguous stretch per slot.

Slots in use are always 0..R-1 (`move` fills a hole with the last row), so that attention reads a view and never a copy.
Rejected tree nodes are not cleared, they lie beyond every length mask and are overwritten by the next step.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchgen_kernels.compaction import compact

if TYPE_CHECKING:
    from batchgen.engines.torch.layout import Layout


class Pool:
    """Key and value pools of `num_layers` layers, each [slots, num_kv_heads, length, head_dim], growing on demand."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._num_layers, self._num_kv_heads, self._head_dim = num_layers, num_kv_heads, head_dim
        self._dtype, self._device = dtype, device
        self.slots = self.length = 0
        self.k = self.v = self._zeros(0, 0)

    def num_bytes(self, slots: int, length: int) -> int:
        """Bytes that `resize(slots, length)` comes to, keys and values of all layers."""
        slots, length = _round(slots, length)
        return 2 * self._num_layers * slots * self._num_kv_heads * length * self._head_dim * self._dtype.itemsize

    def _zeros(self, slots: int, length: int) -> torch.Tensor:
        shape = (self._num_layers, slots, self._num_kv_heads, length, self._head_dim)
        if self._device.type == "cpu":
            # calloc: pages that no row reaches are never touched. numpy has no bfloat16, hence the view.
            raw = np.zeros(shape, dtype={2: np.int16, 4: np.int32, 8: np.int64}[self._dtype.itemsize])
            return torch.from_numpy(raw).view(self._dtype)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def resize(self, slots: int, length: int, *, rows: int = 0, tokens: int = 0) -> None:
        """Hold `slots` rows of `length` tokens, rounded up; the first `tokens` tokens of the first `rows` are kept.

        Takes as much again as half of what was there while it copies. Where memory runs out the pool is of no more use.
        """
        slots, length = _round(slots, length)
        if (slots, length) == (self.slots, self.length):
            return
        rows, tokens = min(rows, self.slots), min(tokens, self.length)
        self.k = self._resized(self.k, slots, length, rows, tokens)
        self.v = self._resized(self.v, slots, length, rows, tokens)
        self.slots, self.length = slots, length

    def _resized(self, old: torch.Tensor, slots: int, length: int, rows: int, tokens: int) -> torch.Tensor:
        new = self._zeros(slots, length)
        new[:, :rows, :, :tokens] = old[:, :rows, :, :tokens]
        return new

    def write(self, layer: int, k_NKD: torch.Tensor, v_NKD: torch.Tensor, layout: Layout) -> None:
        """Scatter a pass's keys and values to their slots and pool positions, in place."""
        self.k[layer][layout.slot_N, :, layout.pool_position_N] = k_NKD
        self.v[layer][layout.slot_N, :, layout.pool_position_N] = v_NKD

    def compact(self, slots: torch.Tensor, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy pool positions `source` of `slots` to `destination` in all layers, in place; all int64 [M]."""
        compact(self.k, self.v, slots, source, destination)

    def move(self, source: int, destination: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of one slot over another's, in place."""
        for pool in (self.k, self.v):
            pool[:, destination, :, :num_tokens] = pool[:, source, :, :num_tokens]


def _round(slots: int, length: int) -> tuple[int, int]:
    """Sizes that are grown to: few enough that growing is rare, close enough that little lies idle."""
    return 1 << (slots - 1).bit_length() if 0 < slots < 8 else -(-slots // 8) * 8, -(-length // 256) * 256


def budget(device: torch.device, share: float = 1.0) -> int:
    """Bytes that the pools of one of several workers may take, whose `share` of the device or machine is given.

    While pools grow they take up to 1.5 times as much; the rest is for activations.
    """
    return int(0.6 * share * free_bytes(device))


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation could take, in bytes; on a CPU at most what the container has left."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        return min(free, int(share * total) - torch.cuda.memory_reserved(device))
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min(available, container_bytes() or available)


def container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control group (v2) in `folder` may still take, in bytes, None without a limit.

    File pages that were not used lately count as free: the kernel drops them first.
    """
    limit = folder / "memory.max"
    if not limit.exists() or (bound := limit.read_text().strip()) == "max":
        return None
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / "memory.current").read_text()) - int(stat["inactive_file"])
    return max(0, int(bound) - used)


def out_of_memory(error: Exception) -> bool:
    """Whether it is the device's or the machine's memory that ran out; only torch's own allocator says so by a type."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # of a CPU, CUDA and Triton, cuBLAS
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in words)
