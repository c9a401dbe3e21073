"""Continuous batching with speculation: every step advances all running rows, and reads prompts beside them.

One pass of the target carries the trees of the rows that decode and a chunk of the prompts that are being read, so that
arriving rows do not stall running ones. `slots.py` decides which rows run, `rows.Row` says what holds between steps.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from batchgen.engines.torch import forest, verify
from batchgen.engines.torch.kvcache import free_bytes, out_of_memory
from batchgen.engines.torch.layout import Tile, upload
from batchgen.engines.torch.rows import Row
from batchgen.engines.torch.slots import Slots
from batchgen.engines.torch.width import Drafted, FixedTree, Step
from batchgen.speculation.schedule import Ahead
from batchgen_kernels.tree_attention import MAX_NODES, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.target import Target
    from batchgen.engines.torch.width import Width
    from batchgen.record import Completion, Request

# Target features of all rows that may wait for the draft while nothing is drafted. A row that ends before it is drafted
# again has spared the draft its catching up.
PENDING_BYTES = 768 << 20


class TorchEngine:
    """The `generate.Engine` of kind torch.

    `decode` turns token ids into text without special tokens. `width` decides what is drafted and verified: a fixed
    `forest.Shape`, or `width.AutoTree`; None decodes plainly, head or no head. `memory_bytes` bounds the KV pools; None
    means 60 % of what the machine or device has free. `prefill_tokens` prompt tokens make a pass where no row decodes,
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
            memory_bytes = int(0.6 * free_bytes(target.device))
        models: list[Target | Draft] = [target] if self._draft is None else [target, self._draft]
        self._slots = Slots(batch_size, target.max_tokens, memory_bytes, models)
        self._rows = self._slots.rows
        self.running = self.num_tokens = 0
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
        began, before = time.perf_counter(), self.num_tokens
        decoding = [slot for slot, row in enumerate(self._rows) if row.unread == 0]
        rows = [self._rows[slot] for slot in decoding]
        context = sum(row.seen for row in rows)
        drafted, trees = self._grow(decoding)
        grown = time.perf_counter()
        tiles: list[Tile] = []
        token_ids: list[int] = []
        for slot, row, tree in zip(decoding, rows, trees, strict=True):
            positions = [row.seen + depth for depth in tree.depths]
            tiles.append(Tile(len(token_ids), slot, row.seen, tree.bits, list(range(len(tree.tokens))), positions))
            token_ids += tree.tokens
        num_nodes = len(token_ids)
        spans = self._chunk(num_nodes)
        for span in spans:
            token_ids += self._rows[span.slot].tokens[span.prefix : span.prefix + span.stop - span.start]
        # A prompt that was read to its end gives its row's first token; a row that resumes has it already.
        ends = [s for s in spans if self._rows[s.slot].unread == s.stop - s.start and not self._rows[s.slot].num_output]
        # Of prompts only the last token's logits are of use.
        asked = self._ids([*range(num_nodes), *(span.stop - 1 for span in ends)]) if spans else None
        layout = self._target.layout(tiles, spans)
        final, captured, logits = self._target.verify(self._ids(token_ids), layout, self._slots.pools[0], asked)
        draws = [row.next_draw(depth) for row, tree in zip(rows, trees, strict=True) for depth in tree.depths]
        draws += [self._rows[span.slot].next_draw() for span in ends]
        sampled = self._sample(logits, draws, tiles, trees, drafted)
        judged = time.perf_counter()

        def pick(alive: list[int], nodes: list[int]) -> list[int]:
            return sampled.tokens([tiles[r].start + node for r, node in zip(alive, nodes, strict=True)])

        walks = verify.walk(trees, pick)
        first = sampled.tokens(range(num_nodes, num_nodes + len(ends)))
        self._keep(tiles, walks, spans, final if captured is None else captured)
        for row, tree, walked in zip(rows, trees, walks, strict=True):
            self._count(row, tree, walked)
        for span, token in zip(ends, first, strict=True):
            self._append(self._rows[span.slot], [token])
        self._bound_pending()
        ended = time.perf_counter()
        for name, seconds in (("draft", grown - began), ("target", judged - grown), ("host", ended - judged)):
            self.seconds[name] += seconds
        if self._width is not None and self._draft is not None and rows:
            num_tokens = self.num_tokens - before - len(ends)
            times = (grown - began, ended - grown)
            reached = _reached(drafted, tiles, trees, walks, sampled) if drafted is not None else []
            self._width.spent(Step(len(rows), context, num_nodes, num_tokens, *times, bool(spans), drafted), reached)

    def _sample(
        self,
        logits: torch.Tensor,
        draws: list[verify.Draw],
        tiles: list[Tile],
        trees: list[forest.RowTree],
        drafted: Drafted | None,
    ) -> verify.Sampled:
        """What follows every node of the pass; `examples/bench/shape.py` has this drawn, for models without sense."""
        return verify.Sampled(logits, draws)

    def _grow(self, slots: list[int]) -> tuple[Drafted | None, list[forest.RowTree]]:
        """A tree for each of the rows in `slots`: catch the draft up on true features and let it draft, or roots."""
        rows = [self._rows[slot] for slot in slots]
        roots = [row.tokens[-1] for row in rows]
        if self._draft is None or self._width is None or not rows:
            return None, forest.root_only(roots)
        # A step emits one token more than it accepts, so the last token of a row is never worth drafting.
        caps = [row.limit - len(row.tokens) - 1 for row in rows]
        pending = [row.seen - row.draft_len for row in rows]
        arrived = sum(num for num, row in zip(pending, rows, strict=True) if not row.acceptance.target_steps)
        ahead = Ahead(sum(row.seen for row in rows), pending, caps, arrived)
        plan = self._width.plan(ahead)
        trees = forest.root_only(roots)
        if plan is None:
            return None, trees
        shape, drafting = plan
        drafts = [slots[r] for r in drafting]
        state = self._catch_up(self._draft, drafts)
        lengths = [rows[r].draft_len for r in drafting]
        width, own_caps = self._width, torch.tensor([caps[r] for r in drafting])
        pool = self._slots.pools[1]
        drafted = forest.grow(
            self._draft, pool, drafts, state, lengths, shape, lambda level, r: width.accepted(level, own_caps[r])
        )
        candidates = drafted.on_host()
        kept = width.keep(candidates, own_caps, shape, ahead)
        grown = forest.trees(candidates, kept, [roots[r] for r in drafting])
        for r, tree in zip(drafting, grown, strict=True):
            trees[r] = tree
        return Drafted(shape, drafting, sum(pending[r] for r in drafting), candidates), trees

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
            last |= {slot: state for (slot, _), state in zip(chunk, out, strict=True)}
        return torch.stack([last[slot] for slot in slots])

    def _extend(self, draft: Draft, chunk: list[tuple[int, int]]) -> torch.Tensor:
        """Write the next (slot, number) draft slots from pending features; the last output of each, [len(chunk), H]."""
        tiles: list[Tile] = []
        spans: list[Span] = []
        next_tokens: list[int] = []
        features: list[torch.Tensor] = []
        last: list[int] = []
        for slot, num in chunk:
            row = self._rows[slot]
            start, begin = len(next_tokens), row.draft_len
            if num > MAX_NODES:
                spans.append(Span(start, start + num, slot, begin))
            else:
                bits = [(2 << t) - 1 for t in range(num)]
                tiles.append(Tile(start, slot, begin, bits, list(range(num)), [begin + t for t in range(num)]))
            next_tokens += row.tokens[begin + 1 : begin + 1 + num]
            features.append(row.take_pending(num))
            last.append(len(next_tokens) - 1)
        layout = draft.layout(tiles, spans)
        out = draft.extend(self._ids(next_tokens), torch.cat(features), layout, self._slots.pools[1])
        return out[self._ids(last)]

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
        self,
        tiles: list[Tile],
        walks: list[verify.Walk],
        spans: list[Span],
        features: torch.Tensor,
    ) -> None:
        """Keep the keys, values and features [N, sum H] of accepted nodes and of what was read."""
        moves: list[tuple[int, int, int]] = []
        kept: list[tuple[Row, list[int]]] = []
        for tile, walked in zip(tiles, walks, strict=True):
            moves += [(tile.slot, tile.prefix + n, tile.prefix + k) for k, n in enumerate(walked.path, 1) if n != k]
            kept.append((self._rows[tile.slot], [tile.start + node for node in (0, *walked.path)]))
        kept += [(self._rows[span.slot], list(range(span.start, span.stop))) for span in spans]
        if moves:
            self._slots.pools[0].compact(*(self._ids(column) for column in zip(*moves, strict=True)))
        if self._draft is not None:
            nodes = [node for _, nodes in kept for node in nodes]
            if nodes != list(range(len(features))):
                features = features[self._ids(nodes)]
            for (row, _), own in zip(kept, torch.split(features, [len(nodes) for _, nodes in kept]), strict=True):
                row.pending.append(own.clone())  # a view would keep the whole step's alive
        for row, nodes in kept:
            row.seen += len(nodes)

    def _count(self, row: Row, tree: forest.RowTree, walked: verify.Walk) -> None:
        stats, num_drafted = row.acceptance, len(tree.tokens) - 1
        stats.target_steps += 1
        stats.draft_steps += num_drafted > 0
        stats.draft_tokens += num_drafted
        position = row.num_output
        num_kept = min(len(walked.path), self._append(row, walked.tokens))
        stats.note(position, num_drafted, num_kept)
        stats.accepted_per_depth += [0] * (max(tree.depths) - len(stats.accepted_per_depth))
        for depth in range(num_kept):
            stats.accepted_per_depth[depth] += 1

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
        return upload(np.array(values, np.int64), self._target.device)


def _reached(
    drafted: Drafted, tiles: list[Tile], trees: list[forest.RowTree], walks: list[verify.Walk], sampled: verify.Sampled
) -> list[tuple[int, int, float]]:
    """(row of the draft, candidate, chance) of every drafted child of the root and of accepted nodes."""
    places, asked = [], []
    for place, r in enumerate(drafted.rows):
        tree = trees[r]
        for node in (0, *walks[r].path):
            for child in tree.children(node):
                places.append((place, tree.candidates[child - 1]))
                asked.append((tiles[r].start + node, tree.tokens[child]))
    return [(*place, chance) for place, chance in zip(places, sampled.chances(asked), strict=True)]
