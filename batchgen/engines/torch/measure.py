"""What passes cost on this machine, measured in a few seconds before the first row."""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchgen.engines.torch import forest
from batchgen.engines.torch.kvcache import free_bytes
from batchgen.engines.torch.layout import Tiles
from batchgen.speculation.costs import Costs, Table
from batchgen.speculation.schedule import CHILDREN
from batchgen_kernels.tree_attention import MAX_NODES, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.target import Target

_GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Context of each row for the grid, and the longer one that tells what context costs.
_SHORT, _LONG = 64, 512
# Prompt tokens that the head catches up on. To go on with the slope of the last points of the grid would not do: of two
# durations that differ by a few milliseconds noise takes a third.
_CATCH_UP = (512, 1024)
# Levels of which one is the mean.
_LEVELS = 3
# Turns in which each point is timed, and in how many it has to be undisturbed; the most turns and seconds until these
# are there, and the share of points that may lack them. Beside one busy process every pass took 8 times as long, and
# costs measured so had a job draft at a fifth of its speed.
_TURNS, _MOST_TURNS, _MOST_S, _LACKING = 3, 9, 8.0, 0.1
# The share of a pass that threads may have waited for a core. What the kernel does now and then takes far less.
_MOST_WAITING = 0.1
# The most that the context of the grid may be taken to be of any of its passes: what it costs is told by one point.
_MOST_CONTEXT = 0.5


def measure(target: Target, draft: Draft, batch_size: int) -> tuple[Costs, bool]:
    """Seconds of the target's pass, a draft level and the draft's catch-up, for up to four nodes a row.

    And whether that was undisturbed by other processes: if not, it is better than nothing, but not to be kept.
    """
    clock = Clock()
    batch_size = min(batch_size, _GRID[-1])
    pool, draft_pool = target.pool(), draft.pool()
    width = MAX_NODES + _LONG
    while batch_size > 8 and pool.num_bytes(batch_size, width) > free_bytes(target.device) // 2:
        batch_size //= 2
    for each, length in ((pool, width), (draft_pool, max(width, -(-_CATCH_UP[-1] // batch_size)))):
        each.resize(batch_size, length)
        for stored in (each.k, each.v):
            stored.fill_(0.5)  # pages that were never written would all be read from one
    blank = torch.zeros(0, dtype=target.dtype, device=target.device)
    grid = [n for n in _GRID if n <= min(max(64, 4 * batch_size), batch_size * MAX_NODES)]

    def verify(tokens: int, context: int, spread: Callable[[int, int], list[int]] = _spent) -> None:
        ids = torch.arange(tokens, device=target.device)
        layout = target.layout(_chains(spread(tokens, batch_size), context), [])
        target.verify(ids, layout, pool)[2].max(-1).indices.tolist()

    def extend(tokens: int, context: int) -> None:
        tiles, spans, counts = None, [], _evenly(tokens, batch_size)
        if counts[0] > MAX_NODES:
            ends = list(itertools.accumulate(counts, initial=0))
            spans = [Span(start, stop, slot, 0) for slot, (start, stop) in enumerate(itertools.pairwise(ends))]
        else:
            tiles = _chains(counts, context)
        features = blank.new_zeros(tokens, draft.feature_width)
        ids = torch.arange(tokens, device=target.device) % len(draft.embedding)
        out = draft.extend(ids, features, tiles, spans, draft_pool)
        draft.top(out, 2)[1].tolist()

    def grow(tokens: int, context: int, depth: int) -> None:
        rows = min(tokens, batch_size)
        state = blank.new_zeros(rows, draft.config.layer.hidden_size)
        shape = forest.Shape(depth, tokens // rows, MAX_NODES - 1, children=CHILDREN)
        forest.grow(draft, draft_pool, range(rows), state, [context] * rows, shape).on_host()

    def after_target() -> None:
        # As in a step: by then the target's weights have taken the place of the head's in the caches.
        verify(1, _SHORT)

    def table(run: Callable[[int, int], None], before: Callable[[], None], more: Sequence[int] = ()) -> Table:
        points = _points([*(grid if run is verify else grid[::2]), *more], batch_size)
        return _table(points, clock.seconds(run, points, before), batch_size)

    def levels() -> Table:
        # A level takes longer than the head's pass in it: its children are ranked, and the next level laid out.
        points = _points([n for n in grid[::2] if n <= 4 * batch_size and n % min(n, batch_size) == 0], batch_size)
        depths = (1, 1 + _LEVELS)
        seconds = clock.seconds(grow, [(*point, depth) for point in points for depth in depths], after_target)
        pairs = zip(seconds[::2], seconds[1::2], strict=True)
        return _table(points, [(deep - shallow) / _LEVELS for shallow, deep in pairs], batch_size)

    catch_up = [tokens for tokens in _CATCH_UP if tokens > grid[-1]]
    costs = Costs(
        verify=table(verify, lambda: None),
        level=levels(),
        extend=table(extend, after_target, catch_up),
        # On a GPU passes are padded to sizes, and our kernel takes ragged rows as they are.
        even=_even(clock, verify, batch_size) if batch_size > 1 and target.device.type == "cpu" else 1.0,
    )
    if target.device.type == "cuda":
        del pool, draft_pool
        torch.cuda.empty_cache()  # or the job would take these pools' memory for used
    return costs, clock.undisturbed


def _even(clock: Clock, verify: Callable[..., None], batch_size: int) -> float:
    """Seconds of a pass over rows of two nodes each, as a share of one over uneven rows."""
    ways = (_spent, _evenly)
    uneven_s, even_s = clock.seconds(lambda way: verify(2 * batch_size, _SHORT, ways[way]), [(0,), (1,)], lambda: None)
    return min(1.0, even_s / uneven_s)


def _points(grid: Sequence[int], batch_size: int) -> list[tuple[int, int]]:
    """Tokens and context of each measurement; the last one, beside the longest context, is of a token a row."""
    alone = max(n for n in grid if n <= batch_size)
    return [*((n, _SHORT) for n in grid), (alone, _LONG)]


def _table(points: Sequence[tuple[int, int]], seconds: Sequence[float], batch_size: int) -> Table:
    *grid, (alone, _) = points
    *short, longer = seconds
    tokens = [n for n, _ in grid]
    per_context_token = max(0.0, (longer - short[tokens.index(alone)]) / (alone * (_LONG - _SHORT)))
    all_of_it = min(s / (min(n, batch_size) * _SHORT) for n, s in zip(tokens, short, strict=True))
    per_context_token = min(per_context_token, _MOST_CONTEXT * all_of_it)
    bare = [s - per_context_token * min(n, batch_size) * _SHORT for n, s in zip(tokens, short, strict=True)]
    return Table(tokens, [max(s, 1e-6) for s in bare], per_context_token)


def _evenly(tokens: int, batch_size: int) -> list[int]:
    rows = min(tokens, batch_size)
    return [tokens // rows + (row < tokens % rows) for row in range(rows)]


def _spent(tokens: int, batch_size: int) -> list[int]:
    """Nodes of each row as a budget spends them where the rows' acceptance rates are spread over (0, 1).

    Evenly spread nodes would make a cheaper pass: on a CPU a wide tree pads its neighbours. No row has more than about
    twice as many as all have on average: where nodes are dear, drafts are not so deep that one could.
    """
    rows = min(tokens, batch_size)
    most = min(max(2, 2 * -(-tokens // rows) - 1), MAX_NODES)
    rate = np.random.default_rng(0).permutation((np.arange(rows) + 0.5) / rows)
    path = rate[:, None] ** np.arange(1, most)
    best = np.argsort(-path, axis=None, kind="stable")[: tokens - rows]
    return list(1 + np.bincount(best // path.shape[1], minlength=rows))


def _chains(counts: Sequence[int], context: int) -> Tiles:
    return Tiles.chains(range(len(counts)), [context] * len(counts), counts)


class Clock:
    """Times passes; `undisturbed` while nearly all of them had the machine to themselves."""

    def __init__(self) -> None:
        self.undisturbed = True

    def seconds(
        self, run: Callable[..., None], points: Sequence[tuple[int, ...]], before: Callable[[], None]
    ) -> list[float]:
        """The fastest undisturbed time at each point, each after `before`; and after one that pays for first use.

        Points take turns: what counts is how they differ, and a machine's speed drifts.
        """
        clean: list[list[float]] = [[] for _ in points]
        disturbed: list[list[float]] = [[] for _ in points]
        until = time.perf_counter() + _MOST_S
        for turn in range(1 + _MOST_TURNS):
            for i, point in enumerate(points):
                before()
                waited, began = waited_s(), time.perf_counter()
                run(*point)
                seconds = time.perf_counter() - began
                if turn:
                    quiet = waited_s() - waited <= _MOST_WAITING * seconds
                    (clean if quiet else disturbed)[i].append(seconds)
            lacking = sum(len(times) < _TURNS for times in clean) > _LACKING * len(points)
            if turn >= _TURNS and (not lacking or time.perf_counter() > until):
                break
        self.undisturbed &= not lacking
        return [min(times or others) for times, others in zip(clean, disturbed, strict=True)]


def waited_s() -> float:
    """Seconds that the threads of this process were ready to run and others had their cores (proc_pid_schedstat(5)).

    0 where the kernel does not count them.
    """
    waited_ns = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            waited_ns += int(file.read_text().split()[1])
    return waited_ns / 1e9
