"""Passes of tiles replayed from CUDA graphs: launching a small model's kernels one by one takes longer than they run.

A graph is captured for each kind of pass and padded size, at its first use. Everything ragged lies in device tensors:
which slots, how many tokens of each, what they see. Padding is tokens without a slot, which are stored nowhere, and
tiles without tokens. Passes that read prompts run as they come; they are large.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from batchgen.engines.torch.kvcache import out_of_memory
from batchgen.engines.torch.layout import SIZES, Layout, padded_size
from batchgen_kernels.tree_attention import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.engines.torch.kvcache import Pool

Outputs: TypeAlias = "tuple[Any, ...]"  # tensors, or None
Packed: TypeAlias = "Callable[..., Outputs]"  # of a layout and inputs [N, ...]; outputs are [N, ...] too
Capture: TypeAlias = "Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]"

_LOG = logging.getLogger(__name__)

# Each keeps what it writes: those that were used last stay.
MAX_GRAPHS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class _Graph:
    """A captured pass: what it reads, first the tokens' side and then the tiles', and what it writes."""

    replay: Callable[[], None]
    tokens: list[torch.Tensor]
    rows: list[torch.Tensor]
    outputs: Outputs
    pool: tuple[int, int, int, int]

    def fill(self, tokens: list[torch.Tensor], rows: list[torch.Tensor]) -> None:
        """Put another pass in place."""
        _fill(self.tokens, self.rows, tokens, rows)


class Graphs:
    """Runs passes, from graphs where a `Capture` makes them; without one every pass runs as it comes.

    A `Capture` takes a function without arguments, and returns what replays it and the tensors that a replay writes to.
    `begin` makes one, and another after all graphs were forgotten.
    """

    def __init__(self, begin: Callable[[], Capture] | None) -> None:
        self._begin = begin
        self._capture = None if begin is None else begin()
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self.num_captured = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """What passes are padded to, in packed tokens; empty if they are not."""
        return SIZES if self._capture is not None else ()

    def clear(self) -> None:
        """Forget all graphs, and give their memory back."""
        self._graphs.clear()
        if self._begin is not None and self._capture is not None:
            self._capture = self._begin()  # the memory of graphs that are all gone takes no new ones

    @torch.inference_mode()  # what is captured once is written again
    def run(self, name: str, function: Packed, pool: Pool, layout: Layout, *inputs: torch.Tensor) -> Outputs:
        """What `function(layout, *inputs)` returns; the next pass of its `name` and size overwrites it.

        `function` reads and writes tensors of its layout, its inputs and `pool`, and nothing else that changes.
        """
        tiles, num_tokens = layout.tiles, len(layout.position_N)
        if self._capture is None or layout.spans or not isinstance(tiles, Ragged) or num_tokens > SIZES[-1]:
            return function(layout, *inputs)
        size, num_rows = padded_size(num_tokens), padded_size(len(tiles.slot_R))
        key = (name, size, num_rows, tiles.max_count, tiles.splits, tiles.window)
        # A token of slot -1 is stored nowhere, a tile of no tokens reads nothing.
        tokens = [layout.slot_N, layout.position_N, layout.pool_position_N, tiles.bits_N, *inputs]
        rows = [tiles.slot_R, tiles.start_R, tiles.count_R, tiles.prefix_R]
        at = (pool.k.data_ptr(), pool.v.data_ptr(), pool.slots, pool.length)
        graph = self._graphs.pop(key, None)
        if graph is None or graph.pool != at:
            self._graphs = {k: g for k, g in self._graphs.items() if k[0] != name or g.pool == at}
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph = self._captured(function, tiles, tokens, rows, (size, num_rows), at)
            if graph is None:
                return function(layout, *inputs)
        else:
            graph.fill(tokens, rows)
        self._graphs[key] = graph  # the last one
        graph.replay()
        return tuple(None if each is None else each[:num_tokens] for each in graph.outputs)

    def _captured(
        self,
        function: Packed,
        tiles: Ragged,
        tokens: list[torch.Tensor],
        rows: list[torch.Tensor],
        sizes: tuple[int, int],
        pool: tuple[int, int, int, int],
    ) -> _Graph | None:
        """A new graph, filled with this pass but not yet replayed; None if the device cannot capture it."""
        assert self._capture is not None
        self.num_captured += 1
        static_tokens, static_rows = (
            [each.new_zeros(size, *each.shape[1:]) for each in some]
            for some, size in zip((tokens, rows), sizes, strict=True)
        )
        _fill(static_tokens, static_rows, tokens, rows)
        slot, position, pool_position, bits, *inputs = static_tokens
        slot_R, start_R, count_R, prefix_R = static_rows
        how = (tiles.max_count, tiles.splits, tiles.window)
        seen = Ragged(slot_R, start_R, count_R, prefix_R, bits, position, *how)
        layout = Layout(position, slot, pool_position, seen, [])
        try:
            replay, outputs = self._capture(lambda: function(layout, *inputs))
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            _LOG.warning("CUDA graphs are off, passes run kernel by kernel: %s", error)
            self._capture = None
            return None
        return _Graph(replay, static_tokens, static_rows, outputs, pool)


def _fill(
    static_tokens: list[torch.Tensor],
    static_rows: list[torch.Tensor],
    tokens: list[torch.Tensor],
    rows: list[torch.Tensor],
) -> None:
    for static, values in zip((*static_tokens, *static_rows), (*tokens, *rows), strict=True):
        static[: len(values)].copy_(values)
        static[len(values) :].fill_(-1 if static is static_tokens[0] else 0)


def cuda_graph() -> Capture:
    """Captures on the current CUDA device; all graphs of one caller share memory."""
    memory = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels compile and libraries take their workspaces before
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            outputs = run()
        return graph.replay, outputs

    return capture
