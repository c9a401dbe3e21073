"""What runs inside vLLM's own process: stop strings where tokens are made, and the draft length of every step.

vLLM finds stop strings in the process that feeds it, while its engine runs on: tokens that nobody wants are drafted and
counted, and the row's own counts are lost. Found by the scheduler they end a row as a stop token does. vLLM looks the
draft length of a step up by the number of rows (`num_speculative_tokens_per_batch_size`, `Scheduler.schedule`); where
the job leaves it open, that table is written here, from what steps take and what is accepted (`speculation.chain`).

vLLM loads a class of this module by its dotted name, `Ours` on a CPU and `OursAsync` on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from batchgen.generate import reaches_stop, stop_reach
from batchgen.speculation.chain import LONGEST, ChainLengths

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

# `SamplingParams.extra_args` of our requests, and `additional_config` of the engine, hold theirs under this name.
OURS = "batchgen"
SAVE_SECONDS = 5.0


class _Mixin(Scheduler):
    """Over either of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        asked = self.vllm_config.additional_config.get(OURS, {})
        self._tokenizer: Any = None
        self._lengths: ChainLengths | None = None
        self._file = Path(asked["lengths"]) if "lengths" in asked else None
        if self._file is not None:
            self._lengths = _load(self._file)
            self._lengths.started(drafts=self.num_spec_tokens > 0)
        self._since = self._saved = time.monotonic()
        self._in_flight = self._planned = 0
        # Others draft for each row what was asked for, but at its end.
        self._ragged = self.vllm_config.speculative_config and self.vllm_config.speculative_config.method == "ngram"

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Choose the draft length, then schedule as ever."""
        if not self._in_flight:
            self._since = time.monotonic()
        self._in_flight += 1
        rows = len(self.running) or len(self.waiting)
        if self._lengths is not None and self.num_spec_tokens and rows:
            length = self._lengths.next(min(rows, self.max_num_running_reqs))
            self.dynamic_sd_lookup = [length] * (self.max_num_running_reqs + 1)
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """Learn from the step, then go on as ever."""
        now = time.monotonic()
        if self._lengths is not None:
            self._learn(self._lengths, scheduler_output, model_runner_output, now - self._since)
        self._since = now  # where a step was scheduled meanwhile, its time begins here
        self._in_flight -= 1
        return super().update_from_output(scheduler_output, model_runner_output)

    def shutdown(self) -> None:
        """Keep what was learned."""
        self._save()
        super().shutdown()

    def add_request(self, request: Request) -> None:
        """A request may say that from now on nothing is drafted."""
        if _asked(request).get("speculate") is False:
            self._save()
            self._lengths = None
            self.dynamic_sd_lookup = [0] * (self.max_num_running_reqs + 1)
        super().add_request(request)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        stop = _asked(request).get("stop", ())
        if not stop:
            return new_token_ids, stopped
        output, reach = request.output_token_ids, stop_reach(stop)
        for num in range(1, len(new_token_ids) + 1):
            last = len(output) - len(new_token_ids) + num
            if reaches_stop(output[max(0, last - reach) : last], stop, self._decode):
                del new_token_ids[num:]
                request.status = RequestStatus.FINISHED_STOPPED
                return new_token_ids, True
        return new_token_ids, stopped

    def _decode(self, ids: Any) -> str:
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.vllm_config.model_config.model, local_files_only=True, trust_remote_code=False
            )
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _learn(self, lengths: ChainLengths, scheduled: SchedulerOutput, ran: ModelRunnerOutput, seconds: float) -> None:
        drafts, num_scheduled = scheduled.scheduled_spec_decode_tokens, scheduled.num_scheduled_tokens
        if not self.num_spec_tokens:
            if all(num == 1 for num in num_scheduled.values()):
                lengths.seen_without(len(num_scheduled), seconds)
            self._save_in_time()
            return
        # What this step verifies was drafted at the end of the one before it.
        planned, self._planned = self._planned, scheduled.num_spec_tokens_to_schedule
        # A row that was preempted has output, too, and reads all of it again.
        decoding = [
            each
            for each, num in num_scheduled.items()
            if num <= 1 + len(drafts.get(each, ())) and each in self.requests and self.requests[each].num_output_tokens
        ]
        for request_id in decoding:
            sampled = ran.sampled_token_ids[ran.req_id_to_index[request_id]]
            drafted = planned if self._ragged else len(drafts.get(request_id, ()))
            if sampled and drafted:
                lengths.judged(drafted, min(len(sampled) - 1, drafted))
        if planned == self._planned and 2 * len(decoding) > len(num_scheduled):
            prompt_tokens = sum(num_scheduled.values()) - sum(num_scheduled[each] for each in decoding)
            lengths.seen(len(num_scheduled), planned, seconds, prompt_tokens)
        self._save_in_time()

    def _save_in_time(self) -> None:
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self._lengths is None or self._file is None:
            return
        with contextlib.suppress(OSError):  # a full disk costs a measurement, not a job
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(f".{os.getpid()}")
            temporary.write_text(self._lengths.as_json())
            temporary.replace(self._file)


class Ours(_Mixin):
    """vLLM's scheduler, and ours."""


class OursAsync(_Mixin, AsyncScheduler):
    """vLLM's scheduler of a GPU, which plans a step while the one before it runs, and ours."""


def _asked(request: Request) -> dict[str, Any]:
    """What one of our requests says beside what vLLM knows; nothing of requests that vLLM makes to warm up."""
    params = request.sampling_params
    asked: dict[str, Any] = ((params.extra_args if params else None) or {}).get(OURS, {})
    return asked


def _load(file: Path) -> ChainLengths:
    try:
        found = ChainLengths.of_json(file.read_text())
    except (OSError, ValueError, TypeError, KeyError):
        return ChainLengths(LONGEST)
    return found if found.longest == LONGEST else ChainLengths(LONGEST)
