"""A row's whole way on one engine: read, screen, render, generate, record, journal, and at last the part.

Each step is a generator over the one before, and nothing else touches a row. The engine is kept full across shard
borders: the next shard's rows enter while the last rows of this one still run, so that the batch drains only at the
very end. A shard is committed once all its rows are recorded; until then they stand in its journal.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING

from batchgen import engines, models, record, render
from batchgen.attempt import Attempt, Source
from batchgen.errors import (
    AcceptanceError,
    BatchgenError,
    DrainedError,
    InputChangedError,
    LeaseLostError,
    StoreError,
)
from batchgen.record import Piece, Request, Verdict
from batchgen.screen import Screen
from batchgen.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from batchgen.attempt import Task
    from batchgen.generate import Engine
    from batchgen.models import Model
    from batchgen.record import Completion, FinishReason, Row, Shard
    from batchgen.render import Renderer
    from batchgen.spec import Spec

log = logging.getLogger("batchgen.worker")

# Rows that need no engine may come by the million: journals, commits and a wish to drain are seen to this often.
LOOK_SECONDS = 1.0
# How long a worker without work sleeps before it asks again.
IDLE_SECONDS = 0.05
# Drafted tokens after which the acceptance rate is believed: its standard error is then below 0.012.
WARM_UP_DRAFTS = 2000
DIED = Verdict("error", "worker_died", "its worker died three times in a row while it ran this row alone")


@dataclasses.dataclass(frozen=True)
class Kit:
    """What a spec names to generate with, found on this machine; nothing is loaded onto a device yet."""

    spec: Spec
    target: Model | None
    draft: Model | None
    renderer: Renderer
    screen: Screen

    @staticmethod
    def find(spec: Spec, *, weights: bool = True) -> Kit:
        """Fetch models and tokenizer; without `weights`, models on the Hub are only looked up.

        Raises:
            ModelError: one is not there or does not fit.
        """
        limit, screen = spec.screen.max_prompt_tokens, Screen.of(spec.screen)
        if spec.engine.kind == "rehearsal":
            return Kit(spec, None, None, render.PlainRenderer(max_prompt_tokens=limit), screen)
        target = models.fetch(spec.model.target, weights=weights)
        draft = models.fetch(spec.model.draft, weights=weights) if spec.model.draft else None
        special = spec.screen.special_tokens
        # vLLM may be told to take less than the model could.
        room = spec.engine.options.get("max_model_len") if spec.engine.kind == "vllm" else None
        room = room if isinstance(room, int) else None
        limits = {"max_prompt_tokens": limit, "max_model_tokens": room}
        renderer = render.Renderer(target.path, special_tokens=special, **limits)
        return Kit(spec, target, draft, renderer, screen)

    def engine(self, costs: Path) -> Engine:
        """Load the engine; measured costs are kept in the folder `costs`."""
        return engines.build(self.spec, self.target, self.draft, self.renderer.decode, costs)


class Worker:
    """One engine at work on a stream of shards; `run` it once.

    `ended` has the shards and pieces that are finished and `refused` the pieces that are not and cannot be, for the
    caller to take out.
    """

    def __init__(self, task: Task, engine: Engine, renderer: Renderer, screen: Screen) -> None:
        self._task, self._engine, self._renderer, self._screen = task, engine, renderer, screen
        self._source = Source(task)
        self._open: list[Attempt] = []
        self._rows: dict[tuple[str, int, int], tuple[Attempt, Row]] = {}
        self._warned = self._idle = False
        self.tally = Tally()
        self.ended: list[Shard | Piece] = []
        self.refused: list[Piece] = []

    def run(
        self,
        shards: Iterable[Shard | Piece | None],
        *,
        draining: Callable[[], bool] = lambda: False,
        watch: Callable[[Tally], None] = lambda tally: None,
    ) -> Tally:
        """Generate and commit `shards`, None among which means that there may be more later.

        `watch` is called before the first step and after every one; it may call `give` and `take_back`.

        Raises:
            DrainedError: `draining` became true; everything finished is in the journals.
            AcceptanceError: acceptance stayed below `min_acceptance` and the job says to fail.
            LeaseLostError: another run took the output over.
        """
        try:
            self._run(self._requests(shards), draining, watch)
        except (StoreError, LeaseLostError):
            raise  # storage has failed for minutes, asking it for more would only take more; or it is not ours to write
        except BaseException as error:
            # Whatever else ends the run early, what is finished need not be done again.
            for attempt in self._open:
                if isinstance(error, InputChangedError) and attempt.shard.file == error.url:
                    # Whose rows are of which bytes is not known, and the old bytes may be put back one day.
                    attempt.journal.remove()
                    continue
                attempt.journal.flush()
                if attempt.piece is None and isinstance(error, BatchgenError | KeyboardInterrupt):
                    attempt.journal.end()
            raise
        return self.tally

    def spare(self) -> tuple[str, int]:
        """The shard of which a helper could have most rows, by its key, and how many."""
        most = max(self._open, key=lambda attempt: attempt.spare, default=None)
        return (most.shard.key, most.spare) if most else ("", 0)

    def give(self, key: str) -> Piece | None:
        """Give up rows of an open shard for a helper; None when there are none."""
        return next((attempt.give() for attempt in self._open if attempt.shard.key == key), None)

    def take_back(self, piece: Piece, *, finished: bool) -> None:
        """The helper of `piece` has finished it, or is no more."""
        for attempt in self._open:
            if attempt.journal.claim_name == piece.claim and attempt.piece is None:
                attempt.take_back(piece, finished=finished)

    def _run(
        self, requests: Iterator[Request | None], draining: Callable[[], bool], watch: Callable[[Tally], None]
    ) -> None:
        exhausted, next_up = False, None
        store = self._task.sink
        before = self._task.source.retries + store.retries
        watch(self.tally)  # from here on a signal drains: the first step may already end rows
        while not exhausted or self._engine.unfinished:
            if draining():
                self._drain()
            looked = time.monotonic()
            while self._engine.unfinished < self._at_once():
                self._idle = False
                try:
                    next_up = next_up or next(requests)
                except StopIteration:
                    exhausted = True
                    break
                if next_up is None:
                    if self._idle or time.monotonic() - looked > LOOK_SECONDS:
                        break
                elif self._engine.unfinished >= self._at_once():
                    break  # it is the first of a shard of which fewer may run
                else:
                    self._submit(next_up)
                    next_up = None
            self._journal()
            if self._engine.unfinished:
                self._step()
                self._journal()
            elif self._idle:
                self.tally.running = 0
                time.sleep(IDLE_SECONDS)
            self.tally.redacted = dict(self._screen.redacted)
            self.tally.retries = self._task.source.retries + store.retries - before
            watch(self.tally)
        self.tally.speculation = self._engine.report()
        floor, drafted = self._task.min_acceptance, self.tally.draft_tokens
        if floor is not None and drafted < WARM_UP_DRAFTS:
            log.info("speculation.min_acceptance: not judged, %d tokens were drafted of %d", drafted, WARM_UP_DRAFTS)
        assert not self._open, "every shard is committed when nothing is left to generate"

    def _at_once(self) -> int:
        """How many rows may run."""
        return min((attempt.at_once for attempt in self._open if attempt.suspicious), default=self._engine.capacity)

    def _submit(self, request: Request) -> None:
        attempt, _ = self._rows[request.key]  # type: ignore[index]
        attempt.begin((request.row_id, request.sample))
        self._engine.submit(request)

    def _requests(self, shards: Iterable[Shard | Piece | None]) -> Iterator[Request | None]:
        """Every sample that is still to be generated; None where a row or the end of a shard needs no engine."""
        stream = iter(shards)
        while True:
            back = next((attempt for attempt in self._open if attempt.returned), None)
            if back is not None:
                yield from self._samples(back, back.again(back.returned.pop()))
                back.done_again()
                yield None
                continue
            try:
                item = next(stream)
            except StopIteration:
                return
            if item is None:
                self._idle = True
                yield None
                continue
            attempt = self._begin(item)
            if attempt is None:
                continue
            yield from self._samples(attempt, attempt.rows())
            attempt.all_begun()
            yield None

    def _begin(self, item: Shard | Piece) -> Attempt | None:
        """None where there is nothing to do."""
        capacity = self._engine.capacity
        if isinstance(item, Piece):
            attempt = Attempt.join(self._task, item, capacity, self._source)
            self.refused += [] if attempt else [item]
        else:
            attempt = Attempt.claim(self._task, item, capacity, self._source)
            self.ended += [] if attempt else [item]
        if attempt is not None:
            self._open.append(attempt)
            self.tally.standing += attempt.standing
            self.tally.resumed += 0 if attempt.piece else len(attempt.journal.done) - attempt.standing
        return attempt

    def _samples(self, attempt: Attempt, rows: Iterable[Row]) -> Iterator[Request | None]:
        """The samples of `rows` that are not in the journal; the one that may be to blame for a death after others."""
        suspect: Request | None = None
        for row in self._renderer.rows(self._screen.rows(self._left(attempt, rows))):
            for sample in range(self._task.sampling.n):
                key = (row.row_id, sample)
                if key in attempt.journal.done:
                    yield None
                elif row.verdict is not None or key == attempt.journal.condemned:
                    self._refuse(attempt, row, sample)
                    if key == attempt.journal.condemned:
                        attempt.journal.flush()  # what it took so many deaths to find out
                    yield None
                elif key == attempt.journal.suspect:
                    suspect = self._request(attempt, row, sample)
                else:
                    yield self._request(attempt, row, sample)
                if suspect is not None and attempt.others_begun:
                    yield suspect
                    suspect = None
        if suspect is not None:
            yield suspect

    def _left(self, attempt: Attempt, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows that are not wholly in the journal: looking for personal data may cost money."""
        done, samples = attempt.journal.done, range(self._task.sampling.n)
        return (row for row in rows if not all((row.row_id, sample) in done for sample in samples))

    def _request(self, attempt: Attempt, row: Row, sample: int) -> Request:
        assert row.prompt_token_ids is not None
        key = (attempt.shard.key, row.index, sample)
        self._rows[key] = (attempt, row)
        attempt.running += 1
        return Request(key, row.row_id, sample, row.prompt_token_ids, row.sampling)

    def _refuse(self, attempt: Attempt, row: Row, sample: int) -> None:
        """Record a row that is not generated: for its verdict, or because it kills its worker."""
        verdict = row.verdict or DIED
        if verdict.status == "error":
            self.tally.failed(verdict.error_type)
        else:
            self.tally.skipped += 1
        attempt.record(record.refused(row, verdict, sample, **self._names(attempt)))

    def _names(self, attempt: Attempt) -> dict[str, str]:
        return {"engine": self._engine.name, "worker": self._task.worker, "shard": attempt.shard.key}

    def _step(self) -> None:
        began = time.perf_counter()
        completions = self._engine.step()
        self.tally.generating_s += time.perf_counter() - began
        self.tally.running = self._engine.running
        self.tally.generated_tokens = self._engine.num_tokens
        for completion in completions:
            attempt, row = self._rows[completion.key]  # type: ignore[index]
            ended = self._answer(row, completion) if row.ahead else (completion, completion.finish_reason)
            if ended is not None:
                completion, why = ended  # noqa: PLW2901
                del self._rows[completion.key]  # type: ignore[arg-type]
                self.tally.count(completion, [answer.completion for answer in row.answers])
                attempt.running -= 1
                attempt.record(record.finished(row, completion, why, **self._names(attempt)))
        if completions:
            self._gate()

    def _answer(self, row: Row, completion: Completion) -> tuple[Completion, FinishReason] | None:
        """Go on with the conversation, None; or where that cannot be, its last completion and what ends the row."""
        if completion.finish_reason == "error":
            return completion, "error"
        following = self._renderer.next_turn(row, completion)
        if isinstance(following, Verdict) and following.status == "skipped":
            # What was answered stands; for more there is no room.
            return completion, "length"
        if isinstance(following, Verdict):
            kind, why = following.error_type, following.error
            return dataclasses.replace(completion, finish_reason="error", error_type=kind, error=why), "error"
        key, ids = completion.key, following.prompt_token_ids
        assert ids is not None, "a turn was rendered"
        self._rows[key] = self._rows[key][0], following  # type: ignore[index]
        turn = len(following.answers)
        self._engine.submit(Request(key, row.row_id, completion.sample, ids, row.sampling, turn))
        return None

    def _journal(self) -> None:
        """Commit complete shards and journal what has waited long enough."""
        for attempt in list(self._open):
            if attempt.complete:
                if attempt.piece is None:
                    attempt.commit()
                    self.tally.parts += 1
                else:
                    attempt.journal.flush()
                self._open.remove(attempt)
                self.ended.append(attempt.piece or attempt.shard)
            elif attempt.due:
                attempt.journal.flush()

    def _drain(self) -> None:
        kept = sum(len(attempt.journal.done) for attempt in self._open)
        raise DrainedError(
            f"drained: {kept} rows of {len(self._open)} unfinished shards are journalled in {self._task.output}; "
            f"the same command goes on from there"
        )

    def _gate(self) -> None:
        rate, floor = self.tally.acceptance_rate, self._task.min_acceptance
        if floor is None or rate is None or self._warned or self.tally.draft_tokens < WARM_UP_DRAFTS or rate >= floor:
            return
        self._warned = True
        found = f"acceptance rate {rate:.3f} after {self.tally.draft_tokens} drafted tokens"
        rule = f"speculation.min_acceptance {floor}"
        if self._task.below_min == "fail":
            raise AcceptanceError(f"{found} is below {rule}; finished rows are journalled")
        if self._task.below_min == "disable":
            self._engine.stop_speculating()
            log.warning("%s is below %s: decoding plainly from here on", found, rule)
        else:
            log.warning("%s is below %s", found, rule)
