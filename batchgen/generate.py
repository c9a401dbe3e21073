"""What an engine promises: requests in, completions out.

The worker knows engines only through `Engine`, so that a job runs the same on the torch engine, on vLLM and on the
rehearsal engine, and one conformance suite (tests/engines/test_conformance.py) holds all of them to the promises below.
An engine never drops a request and never raises for one: what it cannot generate comes back as a completion whose
finish reason is "error".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.record import Completion, Request


class Engine(Protocol):
    """A target model, with or without its draft head, that generates many requests at once."""

    name: str
    """Kind, as it stands in the output's `engine` column."""

    capacity: int
    """A caller keeps the engine full by holding `unfinished` at `capacity`: its batch size, and what it queues."""

    num_tokens: int
    """Completion tokens generated so far, those of unfinished requests included."""

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned as completions."""

    @property
    def running(self) -> int:
        """Requests that took part in the last step."""

    def submit(self, request: Request) -> None:
        """Queue a request. Its tokens depend on its prompt, sampling and noise key, not on what runs beside it."""

    def step(self) -> list[Completion]:
        """Advance every running request by at least one token; return those that ended, in no particular order."""

    def report(self) -> dict[str, Any]:
        """What speculation was expected to do and what it did, for the job's summary; empty where nothing was tuned."""

    def stop_speculating(self) -> None:
        """Decode plainly from here on: same tokens, no drafts."""

    def close(self) -> None:
        """Give the device memory back. Unfinished requests are forgotten."""


class Capture(Protocol):
    """A target model that reads finished rows and gives its hidden states."""

    max_tokens: int
    """Tokens of the longest row that it reads."""

    def states(self, rows: Sequence[Sequence[int]]) -> list[Any]:
        """For each row of S token ids a tensor [S, L, H] on the CPU, in the order of the rows and of the L layers."""

    def close(self) -> None:
        """Give the device memory back."""


def stop_reach(stop: Sequence[str]) -> int:
    """How many of a completion's last tokens hold every stop string that the newest one completes."""
    # A token is at least one byte.
    return max((len(string.encode()) for string in stop), default=0) + 8


def reaches_stop(token_ids: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str]) -> bool:
    """Whether the last of `token_ids`, the last `stop_reach` of a completion, completes a stop string.

    None before it has done so.
    """
    return first_stop(decode(token_ids), stop) is not None


def completed_text(
    token_ids: Sequence[int], ends: frozenset[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> str:
    """The text of a completion, without the token of `ends` that ended it and from no stop string on."""
    text = decode(token_ids[:-1] if token_ids and token_ids[-1] in ends else token_ids)
    cut = first_stop(text, stop)
    return text if cut is None else text[:cut]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins in `text`, None when there is none."""
    found = [at for string in stop if (at := text.find(string)) >= 0]
    return min(found) if found else None
