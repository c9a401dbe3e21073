"""Continuous batching with speculation: every step advances all running rows, and reads prompts beside them.

One pass of the target carries the trees of the rows that decode and a chunk of the prompts that are being read, so that
arriving rows do not stall running ones. `slots.py` decides which rows run, `rows.Row` says what holds between steps.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from batchgen.engines.torch import forest, verify
from batchgen.engines.torch.forest import Candidates, Forest
from batchgen.engines.torch.kvcache import budget, out_of_memory
from batchgen.engines.torch.layout import Tiles, upload
from batchgen.engines.torch.rows import Row
from batchgen.engines.torch.slots import Slots
from batchgen.engines.torch.width import Drafted, FixedTree, Reached, Step
from batchgen.speculation.schedule import Ahead
from batchgen_kernels.tree_attention import MAX_NODES, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.target import Target
    from batchgen.engines.torch.width import Width
    from batchgen.record import Completion, Request

# Target features of all rows that may wait for the draft while nothing is drafted. A row that ends before it is drafted
# again has spared the draft its catching up.
PENDING_BYTES = 768 << 20
# Passes in a row that may read prompts beside decoding rows.
MOST_MIXED = 32


class TorchEngine:
    """The `generate.Engine` of kind torch.

    `decode` turns token ids into text without special tokens. `width` decides what is drafted and verified: a fixed
    `forest.Shape`, or `width.AutoTree`; None decodes plainly, head or no head. `memory_bytes` bounds the KV pools; None
    means `kvcache.budget`. `prefill_tokens` prompt tokens make a pass where no row decodes,
    a quarter of them where one does: enough to be compute-bound, few enough to bound activations and the others' wait.
    """

    name = "torch"

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        *,
        decode: Callable[[Sequence[int]], str],
        batch_size: int,
        width: forest.Shape | Width | None = None,
        memory_bytes: int | None = None,
        prefill_tokens: int = 1024,
    ) -> None:
        self.capacity = batch_size
        self._target, self._decode = target, decode
        self._width = FixedTree(width) if isinstance(width, forest.Shape) else width
        self._draft = draft if width is not None else None
        self._prefill_tokens = prefill_tokens
        if memory_bytes is None:
            memory_bytes = budget(target.device)
        models: list[Target | Draft] = [target] if self._draft is None else [target, self._draft]
        self._slots = Slots(batch_size, target.max_tokens, memory_bytes, models)
        self._rows = self._slots.rows
        self.running = self.num_tokens = self._mixed = 0
        self.seconds = {"draft": 0.0, "target": 0.0, "host": 0.0}  # where the time of passes went

    @property
    def reading(self) -> int:
        """Rows whose prompts are not yet read to the end, those that wait included."""
        return len(self._slots.waiting) + sum(row.unread > 0 for row in self._rows)

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._slots.waiting) + len(self._rows)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        limit = min(len(request.prompt_token_ids) + request.sampling.max_tokens, self._target.max_tokens)
        key = verify.noise_key(request.noise)
        now = time.perf_counter()
        self._slots.waiting.append(Row(request, list(request.prompt_token_ids), limit, key, now, now))

    def stop_speculating(self) -> None:
        """Decode plainly from here on."""
        self._draft = None
        self._slots.without_draft()
        self._target.capture(())

    def report(self) -> dict[str, Any]:
        """See `width.AutoTree.report`; empty with a fixed tree or none."""
        return self._width.report() if self._width is not None else {}

    def close(self) -> None:
        """Forget all rows and give the pools back."""
        self._slots.clear()
        self._target.graphs.clear()

    def step(self) -> list[Completion]:
        """Admit what fits, then advance every decoding row by one verification and the prompts by a chunk."""
        completed = [self._completion(row) for row in self._slots.admit()]
        self.running = 0
        if self._rows:
            try:
                self._slots.make_room()
                self.running = len(self._rows)
                self._pass()
                self._slots.calm()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                completed += self._collect()
                if self._rows:
                    self._slots.shrink(error)
                    self._target.graphs.clear()
                    if self._target.device.type == "cuda":
                        torch.cuda.empty_cache()
        return completed + self._collect()

    def _pass(self) -> None:
        """One step of every row: draft, then one pass of the target over trees and prompts, then verify and keep."""
        began, before, captured_before = time.perf_counter(), self.num_tokens, self._target.graphs.num_captured
        decoding = [slot for slot, row in enumerate(self._rows) if row.unread == 0]
        rows = [self._rows[slot] for slot in decoding]
        context = sum(row.seen for row in rows)
        drafted, trees = self._grow(decoding)
        grown = time.perf_counter()
        num_nodes = len(trees.token_N)
        seen = np.array([row.seen for row in rows], np.int64)
        tiles = Tiles(np.array(decoding), seen, trees.counts(), trees.bits_N, trees.depth_N) if rows else None
        # A pass that reads prompts tells nothing of what drafting takes, and with long prompts every pass would be one.
        learns = self._width is not None and self._width.learns
        spans = [] if rows and learns and self._mixed == MOST_MIXED else self._chunk(num_nodes)
        self._mixed = self._mixed + 1 if rows and spans else 0
        prompts = [self._rows[span.slot].tokens[span.prefix : span.prefix + span.stop - span.start] for span in spans]
        token_ids = self._upload(np.concatenate([trees.token_N, *prompts]))
        # A prompt that was read to its end gives its row's first token; a row that resumes has it already.
        ends = [s for s in spans if self._rows[s.slot].unread == s.stop - s.start and not self._rows[s.slot].num_output]
        last = np.array([span.stop - 1 for span in ends], np.int64)
        # Of prompts only the last token's logits are of use.
        asked = self._upload(np.concatenate([np.arange(num_nodes), last])) if spans else None
        layout = self._target.layout(tiles, spans)
        final, captured, logits = self._target.verify(token_ids, layout, self._slots.pools[0], asked)
        begun = [self._rows[span.slot] for span in ends]
        sampled = self._sample(logits, _draws([*rows, *begun], trees), trees, drafted)
        judged = time.perf_counter()
        walks = verify.walk(trees, sampled.tokens)
        first = sampled.tokens(num_nodes + np.arange(len(ends)))
        self._keep(decoding, trees, walks, spans, final if captured is None else captured)
        self._count(rows, trees, walks, drafted)
        for row, token in zip(begun, first.tolist(), strict=True):
            self._append(row, [token])
        ended = time.perf_counter()
        self._bound_pending()
        for name, seconds in (("draft", grown - began), ("target", judged - grown), ("host", ended - judged)):
            self.seconds[name] += seconds
        if self._width is not None and self._draft is not None and rows:
            num_tokens = self.num_tokens - before - len(ends)
            times = (grown - began, ended - grown)
            captures = self._target.graphs.num_captured > captured_before
            step = Step(len(rows), context, num_nodes, num_tokens, *times, bool(spans), captures, drafted)
            reached = None if drafted is None else functools.partial(_reached, drafted, trees, walks, sampled)
            self._width.spent(step, reached)

    def _sample(
        self, logits: torch.Tensor, draws: verify.Draws, trees: Forest, drafted: Drafted | None
    ) -> verify.Sampled:
        """What follows every node of the pass; `examples/bench/shape.py` has this drawn, for models without sense."""
        return verify.Sampled(logits, draws)

    def _grow(self, slots: list[int]) -> tuple[Drafted | None, Forest]:
        """A tree for each of the rows in `slots`: catch the draft up on true features and let it draft, or roots."""
        rows = [self._rows[slot] for slot in slots]
        roots = [row.tokens[-1] for row in rows]
        if self._draft is None or self._width is None or not rows:
            return None, Forest.of_roots(roots)
        # A step emits one token more than it accepts, so the last token of a row is never worth drafting.
        caps = [row.limit - len(row.tokens) - 1 for row in rows]
        pending = [row.seen - row.draft_len for row in rows]
        arrived = sum(num for num, row in zip(pending, rows, strict=True) if not row.acceptance.target_steps)
        ahead = Ahead(sum(row.seen for row in rows), pending, caps, arrived)
        shape, of = self._width.plan(ahead) or (None, range(0))
        found = self._width.look_up(lambda: [row.history for row in rows], caps)
        candidates = None
        if shape is not None:
            drafts = [slots[r] for r in of]
            state = self._catch_up(self._draft, drafts)
            lengths = [rows[r].draft_len for r in of]
            own_caps = torch.tensor([caps[r] for r in of])
            candidates = forest.grow(self._draft, self._slots.pools[1], drafts, state, lengths, shape, own_caps)
        if candidates is None and found is None:
            return None, Forest.of_roots(roots)
        extend_tokens = sum(pending[r] for r in of)
        candidates = Candidates.none(len(rows)) if candidates is None else candidates.on_host()
        if found is None:
            drafted = Drafted(shape, of, extend_tokens, candidates)
        else:
            if shape is not None:
                candidates = candidates.of_rows(torch.tensor(of), len(rows))
            drafted = Drafted(shape, range(len(rows)), extend_tokens, *candidates.beside(found))
        kept = self._width.keep(drafted, torch.tensor([caps[r] for r in drafted.rows]), ahead)
        return drafted, Forest.of(drafted.candidates, kept, drafted.rows, roots)

    def _catch_up(self, draft: Draft, slots: list[int], hold_back: int = 0) -> torch.Tensor:
        """Write the draft slots of all pending features but each row's last `hold_back`; each row's last output."""
        behind = deque((s, self._rows[s].seen - self._rows[s].draft_len - hold_back) for s in slots)
        last: dict[int, torch.Tensor] = {}
        while behind:  # in passes as bounded as the target's
            chunk, room = [], self._prefill_tokens
            while behind and room:
                slot, num = behind.popleft()
                chunk.append((slot, min(num, room)))
                if num > room:
                    behind.appendleft((slot, num - room))
                room -= chunk[-1][1]
            out = self._extend(draft, chunk)
            if not behind and not last:
                return out
            out = out.clone()  # the next chunk may overwrite it
            last |= {slot: state for (slot, _), state in zip(chunk, out, strict=True)}
        return torch.stack([last[slot] for slot in slots])

    def _extend(self, draft: Draft, chunk: list[tuple[int, int]]) -> torch.Tensor:
        """Write the next (slot, number) draft slots from pending features; the last output of each, [len(chunk), H]."""
        short = [each for each in chunk if each[1] <= MAX_NODES]
        tiles, spans = None, []
        if short:
            begins = [self._rows[slot].draft_len for slot, _ in short]
            tiles = Tiles.chains([slot for slot, _ in short], begins, [num for _, num in short])
        packed = [*short, *(each for each in chunk if each[1] > MAX_NODES)]
        next_tokens: list[int] = []
        features: list[torch.Tensor] = []
        for slot, num in packed:
            row, start = self._rows[slot], len(next_tokens)
            if num > MAX_NODES:
                spans.append(Span(start, start + num, slot, row.draft_len))
            next_tokens += row.tokens[row.draft_len + 1 : row.draft_len + 1 + num]
            features += row.take_pending(num)
        out = draft.extend(self._ids(next_tokens), torch.cat(features), tiles, spans, self._slots.pools[1])
        return out if packed == chunk else out[self._ids([packed.index(each) for each in chunk])]

    def _bound_pending(self) -> None:
        """Let the draft catch up on everything but each row's last slot, whose output is where drafting starts."""
        if self._draft is None:
            return
        going_on = ((slot, row) for slot, row in enumerate(self._rows) if row.finish is None)
        behind = {slot: row.seen - row.draft_len for slot, row in going_on}
        if sum(behind.values()) * self._draft.feature_width * self._draft.dtype.itemsize > PENDING_BYTES:
            self._catch_up(self._draft, [slot for slot, num in behind.items() if num > 1], hold_back=1)

    def _chunk(self, start: int) -> list[Span]:
        """The next stretch of the prompts that are being read, oldest rows first, packed from `start` on."""
        room = max(1, self._prefill_tokens // 4) if start else self._prefill_tokens
        spans: list[Span] = []
        reading = (slot for slot, row in enumerate(self._rows) if row.unread)
        for slot in sorted(reading, key=lambda s: self._rows[s].admitted):
            num = min(room, self._rows[slot].unread)
            if num == 0:
                break
            spans.append(Span(start, start + num, slot, self._rows[slot].seen))
            start, room = start + num, room - num
        return spans

    def _keep(
        self, slots: Sequence[int], trees: Forest, walks: verify.Walks, spans: list[Span], features: torch.Tensor
    ) -> None:
        """Keep the keys, values and features [N, sum H] of accepted nodes and of what was read."""
        row, depth = np.nonzero(walks.node_RD >= 0)
        node = walks.node_RD[row, depth]
        place = node - trees.start_R[row]
        moved = place != depth
        if moved.any():
            prefix = np.array([self._rows[slot].seen for slot in slots])[row[moved]]
            columns = (np.array(slots)[row[moved]], prefix + place[moved], prefix + depth[moved])
            self._slots.pools[0].compact(*(self._upload(column) for column in columns))
        rows = [self._rows[slot] for slot in (*slots, *(span.slot for span in spans))]
        nums = [*walks.lengths().tolist(), *(span.stop - span.start for span in spans)]
        if self._draft is not None:
            nodes = np.concatenate([node, *(np.arange(span.start, span.stop) for span in spans)])
            # Either way a copy: the next pass overwrites what this one returned.
            features = features.clone() if len(nodes) == len(features) else features[self._upload(nodes)]
            for each, own in zip(rows, torch.split(features, nums), strict=True):
                each.hold(own, beside_prompts=bool(spans))
        for each, num in zip(rows, nums, strict=True):
            each.seen += num

    def _count(self, rows: list[Row], trees: Forest, walks: verify.Walks, drafted: Drafted | None) -> None:
        """Append what the step gave `rows`, and count what speculation did for it."""
        if not rows:
            return
        own_N = trees.candidate_N >= 0
        if drafted is not None:
            own_N &= trees.candidate_N < drafted.num_drafted
        deepest = np.maximum.reduceat(np.where(own_N, trees.depth_N, 0), trees.start_R)
        drafted_R = np.add.reduceat(own_N, trees.start_R, dtype=np.int64)
        accepted_R = ((walks.node_RD >= 0) & own_N[walks.node_RD]).sum(1)
        counts = [each.tolist() for each in (trees.counts() - 1, drafted_R, accepted_R, deepest, walks.lengths())]
        for row, num, num_drafted, accepted, levels, length, tokens in zip(
            rows, *counts, walks.token_RD.tolist(), strict=True
        ):
            stats, position = row.acceptance, row.num_output
            stats.target_steps += 1
            num_kept = min(length - 1, self._append(row, tokens[:length]))
            stats.drafted(num_drafted, levels, min(accepted, num_kept))
            stats.looked_up(num - num_drafted, num_kept - min(accepted, num_kept))
            stats.note(position, num_drafted, min(accepted, num_kept), num_kept - min(accepted, num_kept))

    def _append(self, row: Row, tokens: list[int]) -> int:
        num_kept = row.append(tokens, self._target.eos_token_ids, self._decode)
        self.num_tokens += num_kept
        return num_kept

    def _collect(self) -> list[Completion]:
        ended = [slot for slot, row in enumerate(self._rows) if row.finish is not None]
        return [self._completion(self._slots.remove(slot)) for slot in reversed(ended)]

    def _completion(self, row: Row) -> Completion:
        return row.completion(self._target.eos_token_ids, self._decode)

    def _ids(self, values: Sequence[int]) -> torch.Tensor:
        return self._upload(np.array(values, np.int64))

    def _upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        return upload(values, self._target.device)


def _draws(rows: Sequence[Row], trees: Forest) -> verify.Draws:
    """How to draw what follows the nodes of `trees`, and the prompts of the rows that stand behind those with trees."""
    begun = np.arange(len(trees.start_R), len(rows))
    return verify.Draws(
        [row.request.sampling for row in rows],
        np.array([row.key for row in rows], np.uint64),
        np.array([row.num_output for row in rows], np.int64),
        np.concatenate([trees.row_N, begun]),
        np.concatenate([trees.depth_N, 0 * begun]),
    )


def _reached(drafted: Drafted, trees: Forest, walks: verify.Walks, sampled: verify.Sampled) -> Reached:
    """Every drafted child of the root and of accepted nodes."""
    kept_N = np.zeros(len(trees.row_N), bool)
    kept_N[walks.node_RD[walks.node_RD >= 0]] = True
    child = np.flatnonzero((trees.depth_N > 0) & kept_N[trees.parent_N])
    row = np.searchsorted(np.array(drafted.rows), trees.row_N[child])
    return Reached(row, trees.candidate_N[child], sampled.chances(trees.parent_N[child], trees.token_N[child]))
