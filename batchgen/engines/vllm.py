"""vLLM as an engine: every architecture, quantisation and parallelism that it has, chains drafted by what it offers.

vLLM computes in a process of its own, which may die: of memory, of a fault that one row provokes, of a kill. Then it is
started anew, its unfinished rows begin again, and as long as it dies, in halves: so the row that kills it is found.
Acceptance is vLLM's own count of each request (`per_request_spec_decode_metrics`), of engines of version 0.32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from batchgen.engines import vllm_process
from batchgen.errors import EngineError, ModelError
from batchgen.generate import completed_text
from batchgen.record import Acceptance, Completion
from batchgen.speculation.chain import LONGEST, ChainLengths

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from batchgen.record import FinishReason, Request

log = logging.getLogger("batchgen.engines.vllm")

_LENGTHS = {"num_speculative_tokens", "num_speculative_tokens_per_batch_size"}
# How often a row may be alone with a dying engine before it is to blame: processes are killed from outside, too.
LAST_CHANCES = 1
# Seconds between attempts to start an engine that ran before.
RESTART_PAUSES_S = (5, 30)


@dataclasses.dataclass(slots=True)
class _Row:
    """A request under way, begun for the `attempts`-th time."""

    request: Request
    submitted: float
    added: float = 0.0
    attempts: int = 0
    died_alone: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    steps: int = 0


class VllmEngine:
    """Up to `batch_size` requests at once on vLLM.

    `options` are arguments of vLLM's `EngineArgs`. `draft` is loaded as it stands (`torch.weights.for_vllm`). `length`
    tokens are drafted a step; None drafts what pays at each number of rows, and keeps what it learns in the file
    `lengths`; an engine that finds there that drafts hardly pay at `batch_size` rows starts without.
    `end_token_ids` end a completion besides a row's own stop tokens. Sampled tokens depend on a row's own seed only
    where nothing is drafted, and on vLLM's (`seed`) and the batch otherwise.

    Raises:
        SpecError: vLLM has no such option, or refuses its value.
        ModelError: vLLM is not installed, or cannot run the model.
    """

    name = "vllm"

    def __init__(
        self,
        target: Path,
        draft: Path | None,
        *,
        decode: Callable[[Sequence[int]], str],
        end_token_ids: frozenset[int],
        batch_size: int,
        dtype: str,
        device: str,
        options: Mapping[str, Any],
        length: int | None,
        lengths: Path,
        seed: int = 0,
    ) -> None:
        self._batch_size = batch_size
        # vLLM begins its next step before we have seen the last one's rows end: some must wait in its own queue.
        self.capacity = batch_size + max(1, batch_size // 8)
        self._decode, self._end_token_ids = decode, end_token_ids
        self._lengths = lengths
        self._arguments = self._engine_arguments(target, draft, dtype, device, options, length)
        self._arguments["seed"] = seed % 2**31
        self._rows: dict[str, _Row] = {}
        self._held: deque[_Row] = deque()
        self._trials: list[list[_Row]] = []
        self._next_id = self._num_deaths = 0
        self._speculate, self._finished = True, False
        self._device = device
        self._refused: list[Completion] = []
        self.num_tokens = self.running = 0
        self._engine: Any = vllm_process.launch(self._arguments, device)

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        trials = sum(map(len, self._trials))
        return len(self._rows) + len(self._held) + trials + len(self._refused)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        row = _Row(request, time.perf_counter())
        if self._trials or len(self._rows) >= self.capacity:
            self._held.append(row)
        else:
            self._add(row)

    def step(self) -> list[Completion]:
        """Wait for what vLLM's next step gives."""
        completed, self._refused = self._refused, []
        self.running = min(len(self._rows), self._batch_size)
        if self._rows:
            try:
                outputs = self._engine.step()
            except Exception as error:
                if not vllm_process.died(error):
                    raise
                completed += self._revive()
            else:
                for output in outputs:
                    row = self._rows.get(output.request_id)
                    if row is not None:
                        completed += self._take(row, output)
        self._refill()
        return completed

    def report(self) -> dict[str, Any]:
        """The draft lengths that were found to pay, acceptance by position, and whether the head ran at all.

        Empty where the job fixed the length.
        """
        found = self._learned() if self._learns else None
        return {} if found is None else found.report() | {"head": self._arguments["speculative_config"] is not None}

    def stop_speculating(self) -> None:
        """Tell vLLM with the next request to draft no more."""
        self._speculate = False

    def close(self) -> None:
        """End vLLM's process and forget all rows."""
        self._rows.clear()
        self._held.clear()
        self._trials.clear()
        self._refused.clear()
        self._shut_down()

    def _learned(self) -> ChainLengths | None:
        try:
            return ChainLengths.of_json(self._lengths.read_text())
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _engine_arguments(
        self,
        target: Path,
        draft: Path | None,
        dtype: str,
        device: str,
        options: Mapping[str, Any],
        length: int | None,
    ) -> dict[str, Any]:
        speculative = vllm_process.speculative_config(options)
        arguments = vllm_process.arguments_of(
            target, dtype=dtype, batch_size=self._batch_size, device=device, options=options
        )
        scheduler = "Ours" if device == "cpu" else "OursAsync"
        arguments["scheduler_cls"] = f"batchgen.engines.vllm_scheduler.{scheduler}"
        if draft is not None:
            speculative = {"method": "eagle3"} | speculative | {"model": str(draft)}
        self._learns = bool(speculative) and length is None and not _LENGTHS & speculative.keys()
        if self._learns:
            arguments["additional_config"] = {"batchgen": {"lengths": str(self._lengths)}}
            known = self._learned()
            if known is not None and known.without_pays(self._batch_size):
                log.info("drafts hardly pay at %d rows here: vLLM runs without (%s)", self._batch_size, self._lengths)
                length = 0
        if not speculative or length == 0:
            arguments["speculative_config"] = None
            return arguments
        arguments["per_request_spec_decode_metrics"] = "detailed"
        arguments["speculative_config"] = speculative
        if length is not None:
            speculative["num_speculative_tokens"] = length
        elif self._learns:
            speculative["num_speculative_tokens"] = LONGEST
            # vLLM captures CUDA graphs for the lengths of its table; the scheduler's own takes its place.
            speculative["num_speculative_tokens_per_batch_size"] = _every_length(self._batch_size)
        return arguments

    def _add(self, row: _Row) -> None:
        from vllm.exceptions import VLLMValidationError

        row.attempts += 1
        row.added, row.token_ids, row.steps = time.perf_counter(), [], 0
        name = str(self._next_id)
        self._next_id += 1
        try:
            self._engine.add_request(
                name, {"prompt_token_ids": row.request.prompt_token_ids}, self._parameters(row.request)
            )
        except (ValueError, VLLMValidationError) as error:  # a prompt that vLLM's limits do not take
            self._refused.append(self._failed(row, "refused", vllm_process.first_line(error)))
            return
        except Exception as error:
            if not vllm_process.died(error):
                raise
            row.attempts -= 1
            self._rows[name] = row
            return  # the next step sees it
        self._rows[name] = row

    def _parameters(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        ours: dict[str, Any] = {"stop": list(sampling.stop)} if sampling.stop else {}
        if not self._speculate:
            ours["speculate"] = False
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            max_tokens=sampling.max_tokens,
            # Beside drafts vLLM's sampler keeps to no request's seed, and dies of one on a CPU.
            seed=None if self._arguments["speculative_config"] else _seed(request),
            stop_token_ids=sorted(self._end_token_ids.union(sampling.stop_token_ids)),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"batchgen": ours} if ours else None,
        )

    def _take(self, row: _Row, output: Any) -> list[Completion]:
        [sample] = output.outputs
        new = list(sample.token_ids)
        row.token_ids += new
        row.steps += bool(new)
        self.num_tokens += len(new)
        if not output.finished:
            return []
        if sample.finish_reason == "abort":
            return []  # vLLM's process was told to end: its death is the next thing it says
        del self._rows[output.request_id]
        if sample.finish_reason not in ("stop", "length"):
            return [self._failed(row, "engine", f"vLLM ended the row: {sample.finish_reason}")]
        self._num_deaths, self._finished = 0, True
        return [self._completion(row, sample, output.metrics)]

    def _completion(self, row: _Row, sample: Any, times: Any) -> Completion:
        sampling = row.request.sampling
        ends = self._end_token_ids.union(sampling.stop_token_ids)
        finish: FinishReason = sample.finish_reason
        return Completion(
            row.request.key,
            row.request.sample,
            row.token_ids,
            completed_text(row.token_ids, ends, sampling.stop, self._decode),
            finish,
            _acceptance(row.steps - 1, sample.spec_decode_metrics),
            attempts=row.attempts,
            queue_s=row.added - row.submitted + max(0.0, times.scheduled_ts - times.queued_ts),
            prefill_s=max(0.0, times.first_token_ts - times.scheduled_ts),
            decode_s=max(0.0, times.last_token_ts - times.first_token_ts),
        )

    def _failed(self, row: _Row, error_type: str, error: str) -> Completion:
        request = row.request
        return Completion(
            request.key,
            request.sample,
            [],
            "",
            "error",
            Acceptance(),
            attempts=row.attempts,
            error_type=error_type,
            error=error,
        )

    def _refill(self) -> None:
        """Once a trial has ended well the next one begins; without trials, rows that waited."""
        while not self._rows and self._trials:
            for row in self._trials.pop():
                self._add(row)
        while self._held and not self._trials and len(self._rows) < self.capacity:
            self._add(self._held.popleft())

    def _revive(self) -> list[Completion]:
        """Start vLLM anew and begin its rows again, in halves; a row that was alone with it is what killed it."""
        rows = list(self._rows.values())
        self._rows.clear()
        log.warning("vLLM's process died with %d rows; starting it anew", len(rows))
        self._shut_down()
        self._num_deaths += 1
        # Finding one row among all takes so many; that none at all finished meanwhile is not a row's fault.
        if self._num_deaths > 2 * (self.capacity.bit_length() + LAST_CHANCES + 1):
            raise EngineError(
                f"vLLM died {self._num_deaths} times and finished no row in between; what it printed says why. "
                f"Finished rows are journalled"
            )
        failed = []
        if len(rows) > 1:
            half = (len(rows) + 1) // 2
            self._trials += [rows[half:], rows[:half]]
        elif rows[0].died_alone < LAST_CHANCES or not self._finished:
            # Where nothing was ever finished, it is not known to be this row's fault: the others go first.
            rows[0].died_alone += 1
            self._trials.insert(0, rows)
        else:
            failed.append(self._failed(rows[0], "engine_died", "vLLM's process died whenever it ran this row alone"))
        self._engine = self._start_again()
        return failed

    def _start_again(self) -> Any:
        """Start vLLM where it ran before; what it held may take a while to be free."""
        for pause_s in RESTART_PAUSES_S:
            try:
                return vllm_process.launch(self._arguments, self._device)
            except ModelError as error:
                log.warning("%s; trying again in %d s", error, pause_s)
                time.sleep(pause_s)
        return vllm_process.launch(self._arguments, self._device)

    def _shut_down(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()


def _every_length(batch_size: int) -> list[list[int]]:
    """A table that has each length from the longest down to none, as far as there are numbers of rows."""
    lengths = range(LONGEST, -1, -1)[:batch_size]
    table = [[rows, rows, length] for rows, length in enumerate(lengths, 1)]
    table[-1][1] = batch_size
    return table


def _acceptance(steps: int, counted: Any) -> Acceptance:
    """Of `RequestSpecDecodeMetrics`; accepted tokens that the row's end then cut off are counted, as vLLM does."""
    if counted is None:
        return Acceptance(target_steps=steps)
    acceptance = Acceptance()
    for drafted, accepted in zip(counted.per_step_drafted, counted.per_step_accepted, strict=True):
        acceptance.drafted(drafted, drafted, accepted)
    # A prompt of which all but one token was cached is read by a step that vLLM fills with drafts.
    acceptance.target_steps = max(steps, acceptance.draft_steps)
    # Of steps without drafts vLLM tells nothing, so where there were some, positions are not known.
    if acceptance.draft_steps == acceptance.target_steps:
        position = 1
        for drafted, accepted in zip(counted.per_step_drafted, counted.per_step_accepted, strict=True):
            acceptance.note(position, drafted, accepted)
            position += accepted + 1
    return acceptance


def _seed(request: Request) -> int | None:
    """A seed of the row's own; greedy rows need none."""
    if request.sampling.temperature == 0.0:
        return None
    return int.from_bytes(hashlib.sha256(request.noise.encode()).digest()[:7], "big")
