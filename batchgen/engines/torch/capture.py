"""Hidden states of finished rows, by the torch engine's own target: one prefill, no decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from batchgen_kernels.tree_attention import Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.engines.torch.target import Target

# Tokens of a pass: enough to be compute-bound, few enough to bound activations.
PASS_TOKENS = 1024


class TorchCapture:
    """The `Capture` of engine kind torch: the residual stream after each of `layers`, ascending, in `dtype`."""

    def __init__(self, target: Target, layers: Sequence[int], dtype: torch.dtype) -> None:
        self.max_tokens = target.max_tokens
        self._target, self._num_layers, self._dtype = target, len(layers), dtype
        self._pool = target.pool()
        target.capture(layers)

    def states(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """[S, L, H] on the CPU for each row of S token ids, in their order."""
        parts: list[list[torch.Tensor]] = [[] for _ in rows]
        for spans, at in _passes(rows):
            ids: list[int] = []
            for span, row in zip(spans, at, strict=True):
                ids += rows[row][span.prefix : span.prefix + span.stop - span.start]
            if spans[0].prefix == 0:  # a long row's later chunks go on in what its first one made
                self._pool = self._target.pool()
                self._pool.resize(len(spans), max(len(rows[row]) for row in at))
            token_ids = torch.tensor(ids, device=self._target.device)
            _, captured = self._target.forward(token_ids, self._target.layout(None, spans), self._pool)
            assert captured is not None
            for span, row in zip(spans, at, strict=True):
                own = captured[span.start : span.stop].to("cpu", self._dtype, copy=True)
                parts[row].append(own.view(len(own), self._num_layers, -1))
        return [torch.cat(part) for part in parts]

    def close(self) -> None:
        """Give the pool back."""
        self._pool = self._target.pool()


def _passes(rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[Span], list[int]]]:
    """Spans of each pass and the rows they are of: rows side by side, and long ones in turns of their own slot."""
    spans: list[Span] = []
    at: list[int] = []
    filled = 0
    for row, ids in enumerate(rows):
        if filled and filled + len(ids) > PASS_TOKENS:
            yield spans, at
            spans, at, filled = [], [], 0
        for prefix in range(0, len(ids), PASS_TOKENS):
            num = min(PASS_TOKENS, len(ids) - prefix)
            spans.append(Span(filled, filled + num, len(spans) if prefix == 0 else 0, prefix))
            at.append(row)
            filled += num
            if len(ids) > PASS_TOKENS:
                yield spans, at
                spans, at, filled = [], [], 0
    if spans:
        yield spans, at
