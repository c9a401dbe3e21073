"""Continuous batching with speculation: admit, prefill, then draft, verify and commit for all running rows each step.

Per row, between steps: `tokens` holds prompt and output; the last token is the *root*, sampled but not yet seen by the
target. The target's pool holds positions 0 .. len(tokens) - 2. The draft's pool holds its first `draft_len` slots, and
`features` the target features of the slots from there up to the root's, which the next step writes before it drafts.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from batchgen.engines.torch import forest, verify
from batchgen.engines.torch.kvcache import Tile
from batchgen.generate import first_stop
from batchgen.record import Acceptance, Completion
from batchgen_kernels.tree_attention import MAX_NODES, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.target import Target
    from batchgen.record import FinishReason, Request


@dataclasses.dataclass(slots=True)
class _Running:
    """One request in a slot; see the module's docstring for what holds between steps."""

    request: Request
    tokens: list[int]
    limit: int  # length of prompt and output at which the row ends
    key: int
    submitted: float
    admitted: float
    acceptance: Acceptance
    first_token: float = 0.0
    features: torch.Tensor | None = None
    draft_len: int = 0
    finish: FinishReason | None = None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def next_draw(self, ahead: int = 0) -> verify.Draw:
        """How to draw the next token, or the one `ahead` tokens after it."""
        return verify.Draw(self.request.sampling, self.key, self.num_output + ahead)


class TorchEngine:
    """The `generate.Engine` of kind torch.

    `decode` turns token ids into text without special tokens. `tree` None decodes plainly, head or no head.
    `memory_bytes` bounds the KV pools; None means 60 % of what the machine or device has free. `prefill_tokens` prompt
    tokens make a pass: enough to be compute-bound, few enough to bound its activations.
    """

    name = "torch"

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        *,
        decode: Callable[[Sequence[int]], str],
        batch_size: int,
        tree: forest.Shape | None = None,
        memory_bytes: int | None = None,
        prefill_tokens: int = 1024,
    ) -> None:
        self.capacity = batch_size
        self._target, self._decode = target, decode
        self._pool = target.pool()
        self._draft = draft if tree is not None else None
        self._draft_pool = draft.pool() if draft is not None else None
        self._tree = tree
        self._prefill_tokens = prefill_tokens
        self._memory_bytes = memory_bytes if memory_bytes is not None else int(0.6 * free_bytes(target.device))
        self._waiting: deque[tuple[Request, float]] = deque()
        self._rows: list[_Running] = []
        self.running = self.num_tokens = 0

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._waiting) + len(self._rows)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append((request, time.perf_counter()))

    def stop_speculating(self) -> None:
        """Decode plainly from here on."""
        self._draft = None

    def close(self) -> None:
        """Forget all rows and give the pools back."""
        self._waiting.clear()
        self._rows.clear()
        self._pool = self._target.pool()
        self._draft_pool = None

    def step(self) -> list[Completion]:
        """Admit and prefill what fits, then advance every running row by one verification."""
        rejected = self._admit()
        self.running = len(self._rows)
        ended = self._collect()
        if self._rows:
            self._decode_step()
            ended += self._collect()
        return rejected + ended

    def _admit(self) -> list[Completion]:
        rejected, admitted = [], []
        while self._waiting and len(self._rows) < self.capacity:
            request, submitted = self._waiting[0]
            now = time.perf_counter()
            limit = min(len(request.prompt_token_ids) + request.sampling.max_tokens, self._target.max_tokens)
            problem = self._problem(request, limit)
            if problem is None and not self._reserve(len(self._rows) + 1, limit):
                break  # its turn comes when a running row has ended
            self._waiting.popleft()
            if problem is not None:
                failed = Completion(request.key, request.sample, [], "", "error", Acceptance(), now - submitted)
                rejected.append(dataclasses.replace(failed, error_type=problem[0], error=problem[1]))
                continue
            key = verify.noise_key(request.sampling.seed, request.row_id, request.sample)
            row = _Running(request, list(request.prompt_token_ids), limit, key, submitted, now, Acceptance())
            self._rows.append(row)
            admitted.append(len(self._rows) - 1)
        if admitted:
            self._prefill(admitted)
        return rejected

    def _num_bytes(self, num_rows: int, limit: int) -> int:
        """Bytes of all pools for `num_rows` rows that end at `limit` tokens, each with room for a tree."""
        pools = [self._pool] + ([self._draft_pool] if self._draft_pool else [])
        return sum(pool.num_bytes(num_rows, limit + MAX_NODES) for pool in pools)

    def _reserve(self, num_rows: int, limit: int) -> bool:
        """Make room for one row more, if the bound allows it; at best for all that wait, since growing copies."""
        if not self._fits(num_rows, limit):
            if num_rows > 1:
                return False
            # Nothing runs: pools that were shaped for other rows make way.
            self._pool = self._target.pool()
            self._draft_pool = self._draft.pool() if self._draft is not None else None
        wanted = min(self.capacity, len(self._rows) + len(self._waiting))
        slots = wanted if self._fits(wanted, limit) else num_rows
        for pool in filter(None, (self._pool, self._draft_pool)):
            pool.reserve(slots, limit + MAX_NODES)
        return True

    def _fits(self, num_rows: int, limit: int) -> bool:
        slots, length = max(num_rows, self._pool.slots), max(limit, self._pool.length - MAX_NODES)
        return self._num_bytes(slots, length) <= self._memory_bytes

    def _problem(self, request: Request, limit: int) -> tuple[str, str] | None:
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            return "empty_prompt", "the prompt has no tokens"
        if num_prompt >= self._target.max_tokens:
            return "prompt_too_long", f"{num_prompt} prompt tokens; the model takes {self._target.max_tokens} in all"
        if self._num_bytes(1, limit) > self._memory_bytes:
            needed = self._num_bytes(1, limit)
            return "out_of_memory", f"a KV cache of {limit} tokens takes {needed} bytes; there are {self._memory_bytes}"
        return None

    def _prefill(self, slots: list[int]) -> None:
        """Run the prompts of the rows in `slots` through target and draft, packed, in chunks; sample first tokens."""
        todo = deque((slot, 0) for slot in slots)
        while todo:
            spans: list[Span] = []
            packed = 0
            while todo and packed < self._prefill_tokens:
                slot, begin = todo.popleft()
                end = min(len(self._rows[slot].tokens), begin + self._prefill_tokens - packed)
                spans.append(Span(packed, packed + end - begin, slot, begin))
                packed += end - begin
                if end < len(self._rows[slot].tokens):
                    todo.appendleft((slot, end))
            self._prefill_pass(spans)

    def _prefill_pass(self, spans: list[Span]) -> None:
        token_ids = self._ids(
            [t for s in spans for t in self._rows[s.slot].tokens[s.prefix : s.prefix + s.stop - s.start]]
        )
        final, captured = self._target.forward(token_ids, self._target.layout([], spans), self._pool)
        ends = [s for s in spans if s.prefix + s.stop - s.start == len(self._rows[s.slot].tokens)]
        if ends:
            at = torch.tensor([s.stop - 1 for s in ends], device=final.device)
            draws = [self._rows[s.slot].next_draw() for s in ends]
            tokens = verify.draw(self._target.logits(final[at]), draws)
        if self._draft is not None:
            self._prefill_draft(self._draft, spans, self._draft.fuse(final, captured))
        for span, token in zip(ends, tokens if ends else [], strict=True):
            self._rows[span.slot].first_token = time.perf_counter()
            self._append(self._rows[span.slot], [token])

    def _prefill_draft(self, draft: Draft, spans: list[Span], features: torch.Tensor) -> None:
        """Write the draft slots whose next token the prompt tells; the last one waits for the first sampled token."""
        known: list[Span] = []
        next_tokens: list[int] = []
        at: list[int] = []
        kept = 0
        for span in spans:
            row, end = self._rows[span.slot], span.prefix + span.stop - span.start
            num = span.stop - span.start
            if end == len(row.tokens):
                num -= 1
                row.features = features[span.stop - 1 : span.stop].clone()
            if num:
                known.append(Span(kept, kept + num, span.slot, span.prefix))
                next_tokens += row.tokens[span.prefix + 1 : span.prefix + 1 + num]
                at += range(span.start, span.start + num)
                kept += num
            row.draft_len = span.prefix + num
        if known:
            assert self._draft_pool is not None
            selected = features[torch.tensor(at, device=features.device)]
            draft.forward(self._ids(next_tokens), selected, draft.layout([], known), self._draft_pool)

    def _decode_step(self) -> None:
        rows = self._rows
        roots = [row.tokens[-1] for row in rows]
        trees = self._grow(self._draft, roots) if self._draft is not None else forest.root_only(roots)
        starts: list[int] = []
        tiles: list[Tile] = []
        token_ids: list[int] = []
        for slot, (row, tree) in enumerate(zip(rows, trees, strict=True)):
            prefix = len(row.tokens) - 1
            starts.append(len(token_ids))
            positions = [prefix + depth for depth in tree.depths]
            tiles.append(Tile(len(token_ids), slot, prefix, tree.bits, list(range(len(tree.tokens))), positions))
            token_ids += tree.tokens
        final, captured = self._target.forward(self._ids(token_ids), self._target.layout(tiles, []), self._pool)
        logits = self._target.logits(final)

        def pick(alive: list[int], nodes: list[int]) -> list[int]:
            at = torch.tensor([starts[r] + node for r, node in zip(alive, nodes, strict=True)], device=final.device)
            ahead = [trees[r].depths[node] for r, node in zip(alive, nodes, strict=True)]
            return verify.draw(logits[at], [rows[r].next_draw(depth) for r, depth in zip(alive, ahead, strict=True)])

        walks = verify.walk(trees, pick)
        self._commit(trees, walks, starts, final, captured)

    def _grow(self, draft: Draft, roots: list[int]) -> list[forest.RowTree]:
        """Catch the draft up on true features, then let it draft."""
        assert self._draft_pool is not None
        assert self._tree is not None
        tiles: list[Tile] = []
        next_tokens: list[int] = []
        features: list[torch.Tensor] = []
        last: list[int] = []
        for slot, row in enumerate(self._rows):
            assert row.features is not None
            num = row.features.shape[0]
            assert row.draft_len + num == len(row.tokens) - 1, "the draft's slots end where the root begins"
            bits = [(2 << t) - 1 for t in range(num)]
            positions = [row.draft_len + t for t in range(num)]
            tiles.append(Tile(len(next_tokens), slot, row.draft_len, bits, list(range(num)), positions))
            next_tokens += row.tokens[row.draft_len + 1 :]
            features.append(row.features)
            last.append(len(next_tokens) - 1)
            row.draft_len += num
            row.features = None
        layout = draft.layout(tiles, [])
        out = draft.forward(self._ids(next_tokens), torch.cat(features), layout, self._draft_pool)
        # A step emits one token more than it accepts, so the last token of a row is never worth drafting.
        caps = [min(self._tree.depth, row.limit - len(row.tokens) - 1) for row in self._rows]
        context = [row.draft_len for row in self._rows]
        state = out[torch.tensor(last, device=out.device)]
        return forest.grow(draft, self._draft_pool, roots, state, context, caps, self._tree)

    def _commit(
        self,
        trees: list[forest.RowTree],
        walks: list[verify.Walk],
        starts: list[int],
        final: torch.Tensor,
        captured: torch.Tensor | None,
    ) -> None:
        """Keep the accepted nodes' keys, values and features; append the new tokens."""
        moves: list[tuple[int, int, int]] = []
        seen: list[int] = []
        for slot, (row, path) in enumerate(zip(self._rows, (w.path for w in walks), strict=True)):
            prefix = len(row.tokens) - 1
            moves += [(slot, prefix + node, prefix + k) for k, node in enumerate(path, 1) if node != k]
            seen += [starts[slot] + node for node in (0, *path)]
        if moves:
            self._pool.compact(*(torch.tensor(column, device=final.device) for column in zip(*moves, strict=True)))
        if self._draft is not None:
            at = torch.tensor(seen, device=final.device)
            fused = self._draft.fuse(final[at], None if captured is None else captured[at])
            for row, features in zip(self._rows, torch.split(fused, [len(w.path) + 1 for w in walks]), strict=True):
                row.features = features
        for row, tree, walked in zip(self._rows, trees, walks, strict=True):
            stats, num_drafted = row.acceptance, len(tree.tokens) - 1
            stats.target_steps += 1
            stats.draft_steps += num_drafted > 0
            stats.draft_tokens += num_drafted
            num_kept = min(len(walked.path), self._append(row, walked.tokens))
            stats.accepted_per_depth += [0] * (max(tree.depths) - len(stats.accepted_per_depth))
            for depth in range(num_kept):
                stats.accepted_per_depth[depth] += 1

    def _append(self, row: _Running, tokens: list[int]) -> int:
        """Append tokens until the row ends; returns how many were kept and sets `row.finish` when it did."""
        sampling = row.request.sampling
        for i, token in enumerate(tokens, 1):
            row.tokens.append(token)
            self.num_tokens += 1
            if (
                token in self._target.eos_token_ids
                or token in sampling.stop_token_ids
                or (sampling.stop and self._stop_string_ends(row))
            ):
                row.finish = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish = "length"
            if row.finish is not None:
                return i
        return len(tokens)

    def _stop_string_ends(self, row: _Running) -> bool:
        # A token is at least one byte, so a stop string that the newest token completes lies within this many tokens.
        reach = max(len(s.encode()) for s in row.request.sampling.stop) + 8
        tail = row.tokens[len(row.request.prompt_token_ids) :][-reach:]
        return first_stop(self._decode(tail), row.request.sampling.stop) is not None

    def _collect(self) -> list[Completion]:
        """Take ended rows out, closing each hole with the last row so that slots stay 0..R-1."""
        ended = []
        for slot in range(len(self._rows) - 1, -1, -1):
            if self._rows[slot].finish is None:
                continue
            ended.append(self._completion(self._rows[slot]))
            last = self._rows.pop()
            if slot < len(self._rows):
                self._rows[slot] = last
                self._pool.move(len(self._rows), slot, len(last.tokens))
                if self._draft_pool is not None:
                    self._draft_pool.move(len(self._rows), slot, last.draft_len)
        return ended

    def _completion(self, row: _Running) -> Completion:
        assert row.finish is not None
        request, now = row.request, time.perf_counter()
        token_ids = row.tokens[len(request.prompt_token_ids) :]
        ends = self._target.eos_token_ids.union(request.sampling.stop_token_ids)
        shown = token_ids[:-1] if token_ids[-1] in ends else token_ids
        text = self._decode(shown)
        cut = first_stop(text, request.sampling.stop)
        return Completion(
            request.key,
            request.sample,
            token_ids,
            text if cut is None else text[:cut],
            row.finish,
            row.acceptance,
            queue_s=row.admitted - row.submitted,
            prefill_s=row.first_token - row.admitted,
            decode_s=now - row.first_token,
        )

    def _ids(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(token_ids, device=self._target.device)


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation could take, in bytes; on a CPU at most what the container may have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    bound = limit.read_text().strip() if limit.exists() else "max"
    return available if bound == "max" else min(available, int(bound))
