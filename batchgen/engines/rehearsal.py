"""An engine without a model: rehearse a job's data, storage and recovery at no cost.

Text is a deterministic function of the request, so that an interrupted and an undisturbed job can be compared; tokens
are its UTF-8 bytes. Failures are scripted by row id. It makes no drafts, hence its rows have no acceptance.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import os
import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from batchgen.errors import SpecError
from batchgen.generate import first_stop
from batchgen.record import Acceptance, Completion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.record import Request

WORDS = ("a", "row", "is", "read", "and", "answered", "by", "nobody", "before", "any", "model", "runs", "on", "it")


@dataclasses.dataclass(frozen=True, slots=True)
class Script:
    """What a rehearsal does beside answering; `engine.options` in the job file.

    `step_s`: seconds a step takes. `tokens_per_step`: tokens every running row gains in it. `fail`: patterns of row ids
    (as in a shell) that end as errors. `kill`: of those that kill the process in their first step.
    """

    step_s: float = 0.0
    tokens_per_step: int = 16
    fail: tuple[str, ...] = ()
    kill: tuple[str, ...] = ()

    @staticmethod
    def of(options: Mapping[str, Any]) -> Script:
        """The script in a job file's `engine.options`.

        Raises:
            SpecError: an option does not exist or has another type.
        """
        kinds = {"step_s": (int, float), "tokens_per_step": (int,), "fail": (list, tuple)}
        kinds["kill"] = kinds["fail"]
        problems = [
            f"engine.options.{name}: the rehearsal engine has no such option; it has {', '.join(kinds)}"
            for name in options
            if name not in kinds
        ]
        problems += [
            f"engine.options.{name}: found {options[name]!r}, expected {' or '.join(k.__name__ for k in kind)}"
            for name, kind in kinds.items()
            if name in options and not isinstance(options[name], kind)
        ]
        if not problems:
            if options.get("tokens_per_step", 1) < 1:
                found = options["tokens_per_step"]
                problems.append(f"engine.options.tokens_per_step: found {found}, expected 1 or more")
            if options.get("step_s", 0) < 0:
                problems.append(f"engine.options.step_s: found {options['step_s']}, expected 0 or more seconds")
            for name in ("fail", "kill"):
                if not all(isinstance(pattern, str) for pattern in options.get(name, ())):
                    problems.append(f"engine.options.{name}: expected a list of row id patterns, as text")
        if problems:
            raise SpecError(*problems)
        patterns = {name: tuple(options.get(name, ())) for name in ("fail", "kill")}
        return Script(**{**options, **patterns})


@dataclasses.dataclass(slots=True)
class _Running:
    request: Request
    token_ids: list[int]
    submitted: float
    admitted: float
    first_token: float | None = None
    num_done: int = 0
    num_steps: int = 0


class RehearsalEngine:
    """The `generate.Engine` of kind rehearsal."""

    name = "rehearsal"

    def __init__(self, *, batch_size: int, script: Script) -> None:
        self.capacity = batch_size
        self.running = self.num_tokens = 0
        self._script = script
        self._waiting: deque[tuple[Request, float]] = deque()
        self._rows: list[_Running] = []

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._waiting) + len(self._rows)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append((request, time.perf_counter()))

    def report(self) -> dict[str, Any]:
        """Nothing to report."""
        return {}

    def stop_speculating(self) -> None:
        """Nothing to stop."""

    def close(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._rows.clear()

    def step(self) -> list[Completion]:
        """Let every running row gain some bytes of its answer."""
        while self._waiting and len(self._rows) < self.capacity:
            request, submitted = self._waiting.popleft()
            self._rows.append(_Running(request, list(answer(request).encode()), submitted, time.perf_counter()))
        self.running = len(self._rows)
        if self._script.step_s:
            time.sleep(self._script.step_s)
        if any(_named(row.request, self._script.kill) for row in self._rows):
            os.kill(os.getpid(), signal.SIGKILL)
        ended = []
        for row in self._rows:
            if row.first_token is None:
                row.first_token = time.perf_counter()
            else:
                row.num_steps += 1
            end = min(len(row.token_ids), row.request.sampling.max_tokens)
            gained = min(self._script.tokens_per_step, end - row.num_done)
            row.num_done += gained
            self.num_tokens += gained
            if row.num_done == end:
                ended.append(row)
        self._rows = [row for row in self._rows if row not in ended]
        return [self._completion(row) for row in ended]

    def _completion(self, row: _Running) -> Completion:
        request, now = row.request, time.perf_counter()
        if _named(request, self._script.fail):
            failed = Completion(request.key, request.sample, [], "", "error", Acceptance())
            return dataclasses.replace(failed, error_type="scripted", error="engine.options.fail names this row")
        token_ids = row.token_ids[: request.sampling.max_tokens]
        text = bytes(token_ids).decode(errors="ignore")
        cut = first_stop(text, request.sampling.stop)
        if cut is not None:
            text = text[:cut]
            token_ids = list(text.encode())
        whole = cut is not None or len(token_ids) == len(row.token_ids)
        assert row.first_token is not None
        return Completion(
            request.key,
            request.sample,
            token_ids,
            text,
            "stop" if whole else "length",
            Acceptance(target_steps=row.num_steps),
            queue_s=row.admitted - row.submitted,
            prefill_s=row.first_token - row.admitted,
            decode_s=now - row.first_token,
        )


def _named(request: Request, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(request.row_id, pattern) for pattern in patterns)


def answer(request: Request) -> str:
    """The whole text that a request is answered with, before any limit."""
    facts = (request.prompt_token_ids, request.sampling.seed, request.row_id, request.sample)
    digest = hashlib.sha256(repr(facts).encode()).digest()
    words = " ".join(WORDS[byte % len(WORDS)] for byte in digest[: 8 + digest[0] % 24])
    return f"Rehearsal of {request.row_id}, sample {request.sample}: {words}."
