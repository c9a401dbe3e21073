"""What a run did so far, counted for people who watch; the truth is in the files (`report`)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchgen.record import Completion


class Rates:
    """What follows from the counts of a run or of its parts."""

    __slots__ = ()
    answers: int
    completion_tokens: int
    target_steps: int
    draft_tokens: int
    accepted_tokens: int

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens (alpha), None when nothing was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per target pass after prefill, the bonus token included; None without passes."""
        return (self.completion_tokens - self.answers) / self.target_steps if self.target_steps else None


@dataclasses.dataclass(slots=True)
class Tally(Rates):
    """One worker's counts, or those of several (`together`).

    `answers` are more than `ok` where rows are conversations. `resumed` counts the output rows that were found in
    journals, `standing` those that stay of parts that are replaced, `retries` the storage requests that were repeated.
    `reasons` has the error rows by their type, `redacted` the personal data that was masked by its kind.
    """

    ok: int = 0
    error: int = 0
    skipped: int = 0
    resumed: int = 0
    standing: int = 0
    parts: int = 0
    retries: int = 0
    answers: int = 0
    completion_tokens: int = 0
    target_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    running: int = 0
    generated_tokens: int = 0
    generating_s: float = 0.0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    redacted: dict[str, int] = dataclasses.field(default_factory=dict)
    speculation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Output rows that this run recorded or found."""
        return self.ok + self.error + self.skipped + self.resumed + self.standing

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of generation, those of unfinished rows included; None before the first."""
        return self.generated_tokens / self.generating_s if self.generating_s else None

    def count(self, completion: Completion, before: Sequence[Completion] = ()) -> None:
        """Add one finished sample, with the answers `before` its last one."""
        if completion.finish_reason == "error":
            self.failed(completion.error_type or "engine")
            return
        self.ok += 1
        for answer in (*before, completion):
            self.answers += 1
            self.completion_tokens += len(answer.token_ids)
            self.target_steps += answer.acceptance.target_steps
            self.draft_tokens += answer.acceptance.draft_tokens
            self.accepted_tokens += answer.acceptance.accepted_tokens

    def failed(self, error_type: str) -> None:
        """Add one error row."""
        self.error += 1
        self.reasons[error_type] = self.reasons.get(error_type, 0) + 1


def together(tallies: Iterable[Tally]) -> Tally:
    """The sum of workers that run at the same time: their tokens per second add up."""
    total, rate = Tally(), 0.0
    reports = []
    for tally in tallies:
        for name in _COUNTS:
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        for counts, more in ((total.reasons, tally.reasons), (total.redacted, tally.redacted)):
            for name, count in more.items():
                counts[name] = counts.get(name, 0) + count
        rate += tally.tokens_per_s or 0.0
        reports += [tally.speculation] if tally.speculation else []
    total.generating_s = total.generated_tokens / rate if rate else 0.0
    total.speculation = reports[0] if len(reports) == 1 else {"workers": reports} if reports else {}
    return total


_COUNTS = [field.name for field in dataclasses.fields(Tally) if field.type == "int"]
