"""One running request, from admission to its completion."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from batchgen.generate import completed_text, reaches_stop, stop_reach
from batchgen.record import Acceptance, Completion
from batchgen.speculation.lookup import History

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from batchgen.record import FinishReason, Request


@dataclasses.dataclass(slots=True)
class Row:
    """A request in a slot.

    `tokens` holds prompt and output. The target's pool holds the first `seen` of them. A row decodes when all but the
    last, the *root*, are in the pool; before that its prompt is being read. The draft's pool holds `draft_len` slots,
    and `pending` the target features of the slots from there up to `seen`, for the draft to catch up on, views of what
    all rows were given; the last of them may be `beside_prompts`.
    """

    request: Request
    tokens: list[int]
    limit: int  # length of prompt and output at which the row ends
    key: int
    submitted: float
    admitted: float
    acceptance: Acceptance = dataclasses.field(default_factory=Acceptance)
    first_token: float | None = None
    seen: int = 0
    draft_len: int = 0
    pending: list[torch.Tensor] = dataclasses.field(default_factory=list)
    beside_prompts: bool = False
    finish: FinishReason | None = None
    error: tuple[str, str] | None = None
    history: History = dataclasses.field(init=False)
    reach: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.reach = stop_reach(self.request.sampling.stop)
        self.history = History(self.tokens)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def unread(self) -> int:
        """Tokens that the target must still read before the row decodes."""
        return len(self.tokens) - (self.num_output > 0) - self.seen

    def hold(self, features: torch.Tensor, *, beside_prompts: bool) -> None:
        """Keep the features of n further slots [n, sum H] for the draft, a view of what a step gave all rows.

        Of a step that read prompts, what is not taken until the next ones come is copied: a row would keep them alive.
        """
        if self.pending and self.beside_prompts:
            self.pending[-1] = self.pending[-1].clone()
        self.pending.append(features)
        self.beside_prompts = beside_prompts

    def take_pending(self, num: int) -> list[torch.Tensor]:
        """The features of the next `num` draft slots, [n, sum H] each; these count as written from here on."""
        self.draft_len += num
        taken = []
        while num:
            first = self.pending.pop(0)
            if len(first) > num:
                self.pending.insert(0, first[num:].clone())
                first = first[:num]
            taken.append(first)
            num -= len(taken[-1])
        return taken

    def forget_cache(self) -> None:
        """Give the slots up: what was read and generated stays, and is read again when the row resumes."""
        self.seen = self.draft_len = 0
        self.pending = []

    def append(
        self, tokens: Sequence[int], eos_token_ids: frozenset[int], decode: Callable[[Sequence[int]], str]
    ) -> int:
        """Append tokens until the row ends; returns how many were kept and sets `finish` when it did."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
        sampling = self.request.sampling
        for i, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if (
                token in eos_token_ids
                or token in sampling.stop_token_ids
                or (
                    sampling.stop
                    and reaches_stop(self.tokens[-min(self.reach, self.num_output) :], sampling.stop, decode)
                )
            ):
                self.finish = "stop"
            elif len(self.tokens) >= self.limit:
                self.finish = "length"
            if self.finish is not None:
                return i
        return len(tokens)

    def completion(self, eos_token_ids: frozenset[int], decode: Callable[[Sequence[int]], str]) -> Completion:
        """What the request came to; `finish` is set."""
        assert self.finish is not None
        now = time.perf_counter()
        token_ids = self.tokens[len(self.request.prompt_token_ids) :]
        ends = eos_token_ids.union(self.request.sampling.stop_token_ids)
        first = now if self.first_token is None else self.first_token
        return Completion(
            self.request.key,
            self.request.sample,
            token_ids,
            completed_text(token_ids, ends, self.request.sampling.stop, decode),
            self.finish,
            self.acceptance,
            error_type=None if self.error is None else self.error[0],
            error=None if self.error is None else self.error[1],
            queue_s=self.admitted - self.submitted,
            prefill_s=first - self.admitted,
            decode_s=now - first,
        )
