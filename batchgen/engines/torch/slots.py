"""Who runs: rows in slots 0..R-1 of the KV pools, and rows that wait for one.

Rows are admitted by what they need now, not by what they may become; when room runs out the youngest gives its slot up
and resumes later, from its tokens.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from batchgen_kernels.tree_attention import MAX_NODES

if TYPE_CHECKING:
    from batchgen.engines.torch.draft import Draft
    from batchgen.engines.torch.kvcache import Pool
    from batchgen.engines.torch.rows import Row
    from batchgen.engines.torch.target import Target

# Steps without trouble after which one row more may run, once memory has run out.
CALM_STEPS = 256


class Slots:
    """Up to `capacity` running rows over a pool of each of `models`, the target first, within `memory_bytes` in all.

    rows: the running rows, by slot
    waiting: those that wait, in the order of their turns
    pools: of target and draft, of the target alone without one
    num_preempted: how often a row gave its slot up
    """

    def __init__(self, capacity: int, max_tokens: int, memory_bytes: int, models: list[Target | Draft]) -> None:
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.num_preempted = 0
        self._capacity, self._max_tokens, self._memory_bytes = capacity, max_tokens, memory_bytes
        self._models = models
        self._limit, self._calm = capacity, 0
        self.pools: list[Pool] = []
        self._empty_pools()

    def _empty_pools(self) -> None:
        self.pools = [model.pool() for model in self._models]

    def admit(self) -> list[Row]:
        """Give slots to rows in their turn while there are any and memory lasts; returns rows that can never run."""
        rejected = []
        while self.waiting and len(self.rows) < self._limit:
            row = self.waiting[0]
            if (problem := self._problem(row)) is not None:
                row.finish, row.error = "error", problem
                row.admitted = row.first_token = time.perf_counter()
                rejected.append(self.waiting.popleft())
                continue
            # A tree's worth of growth beyond the need, lest the row be preempted at once.
            if self.rows and not self._fits(len(self.rows) + 1, max(self._longest(), len(row.tokens)) + MAX_NODES):
                break  # its turn comes when a running row has ended
            if row.first_token is None:
                row.admitted = time.perf_counter()
            self.rows.append(self.waiting.popleft())
        return rejected

    def _problem(self, row: Row) -> tuple[str, str] | None:
        num_prompt = len(row.request.prompt_token_ids)
        if num_prompt == 0:
            return "empty_prompt", "the prompt has no tokens"
        if num_prompt >= self._max_tokens:
            return "prompt_too_long", f"{num_prompt} prompt tokens; the model takes {self._max_tokens} in all"
        if not self._fits(1, row.limit):
            needed, there = self.num_bytes(1, row.limit), self._memory_bytes
            return "out_of_memory", f"a KV cache of {row.limit} tokens takes {needed} bytes; there are {there}"
        return None

    def num_bytes(self, num_rows: int, num_tokens: int) -> int:
        """Bytes of all pools for `num_rows` rows of `num_tokens` tokens, each with room for a tree."""
        return sum(pool.num_bytes(num_rows, num_tokens + MAX_NODES) for pool in self.pools)

    def _fits(self, num_rows: int, num_tokens: int) -> bool:
        return self.num_bytes(num_rows, num_tokens) <= self._memory_bytes

    def _longest(self) -> int:
        return max(len(row.tokens) for row in self.rows)

    def make_room(self) -> None:
        """Make the pools hold what the rows need for a step; while that does not fit, the youngest row waits."""
        while len(self.rows) > 1 and not self._fits(len(self.rows), self._longest()):
            self._preempt()
        rows, longest = len(self.rows), self._longest()
        if all(pool.slots >= rows and pool.length >= longest + MAX_NODES for pool in self.pools):
            return
        # Growing copies: at best there is room for all that wait and for all that they may become.
        everyone = min(self._limit, rows + len(self.waiting))
        at_last = max(row.limit for row in (*self.rows, *self.waiting))
        ways = [(everyone, at_last), (rows, at_last), (everyone, longest), (rows, longest)]
        slots, tokens = next((way for way in ways if self._fits(*way)), ways[-1])
        for pool in self.pools:
            pool.resize(slots, tokens + MAX_NODES, rows=rows, tokens=longest)

    def _preempt(self) -> None:
        slot = max(range(len(self.rows)), key=lambda s: self.rows[s].admitted)
        row = self.remove(slot)
        row.forget_cache()
        self.waiting.appendleft(row)
        self.num_preempted += 1

    def remove(self, slot: int) -> Row:
        """Take a row out, closing the hole with the last row."""
        row, last = self.rows[slot], self.rows.pop()
        if slot < len(self.rows):
            self.rows[slot] = last
            for pool, num_tokens in zip(self.pools, (last.seen, last.draft_len), strict=False):
                pool.move(len(self.rows), slot, num_tokens)
        return row

    def calm(self) -> None:
        """A step went well."""
        self._calm += 1
        if self._calm % CALM_STEPS == 0:
            self._limit = min(self._capacity, self._limit + 1)

    def shrink(self, error: Exception) -> None:
        """Memory ran out: go on with half the rows. A row that does not fit alone ends with the error."""
        if len(self.rows) == 1:
            self.rows[0].finish = "error"
            self.rows[0].error = ("out_of_memory", f"the machine has no memory for this row alone: {error}")
        else:
            self._limit, self._calm = max(1, len(self.rows) // 2), 0
            while self.rows:  # the pass broke off anywhere: no cache is trusted
                self._preempt()
        self._empty_pools()

    def without_draft(self) -> None:
        """Let the draft's pool go, and what rows held back for it."""
        del self.pools[1:], self._models[1:]
        for row in (*self.rows, *self.waiting):
            row.pending = []

    def clear(self) -> None:
        """Forget all rows, and let the pools go."""
        self.rows.clear()
        self.waiting.clear()
        self._empty_pools()
