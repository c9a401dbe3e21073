"""What a submit would do, from footers and some rows: nothing is generated, and no weights are fetched."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from batchgen import job, read
from batchgen.speculation import costs

if TYPE_CHECKING:
    from batchgen.job import Job
    from batchgen.record import Row, Shard
    from batchgen.spec import Spec

SURVEY_ROWS = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Survey:
    """What `submit` would do; sizes in bytes, estimates None where nothing was measured yet.

    `prompt_tokens` are the token counts of the sampled rows that would be generated, `verdicts` counts the others by
    reason. Rows that repeat others, as `dedupe` says, are not looked for.
    """

    files: int
    rows: int
    shards: int
    shards_todo: int
    rows_todo: int
    sampled: int
    prompt_tokens: list[int]
    verdicts: dict[str, int]
    output_bytes: int
    estimate_s: float | None
    dedupe: str


def survey(spec: Spec) -> Survey:
    """What a submit would do: footers of all files, and the first rows of shards spread over what is left."""
    found = job.prepare(spec, weights=False)
    todo = found.todo
    prompt_tokens: list[int] = []
    verdicts: dict[str, int] = {}
    sampled = 0
    for row in _sample(found, todo):
        sampled += 1
        if row.verdict is not None:
            reason = f"{row.verdict.status}: {row.verdict.error_type}"
            verdicts[reason] = verdicts.get(reason, 0) + 1
        else:
            prompt_tokens.append(len(row.prompt_token_ids or ()))
    rows_todo = sum(shard.num_rows for shard in todo)
    cost = costs.load(job.costs_folder(), job.cost_key(found))
    num_completions = rows_todo * found.sampling.n * (len(prompt_tokens) / sampled if sampled else 0)
    per_row = cost.tokens_per_row if cost else found.sampling.max_tokens
    mean_prompt = sum(prompt_tokens) / len(prompt_tokens) if prompt_tokens else 0
    # Text and ids of prompt and completion, about 4 + 4 bytes a token before and 2.5 after compression.
    output_bytes = int(num_completions * (2.5 * (mean_prompt + per_row) + 60))
    return Survey(
        files=len(found.plan.files),
        rows=found.plan.num_rows,
        shards=len(found.plan.shards),
        shards_todo=len(todo),
        rows_todo=rows_todo,
        sampled=sampled,
        prompt_tokens=prompt_tokens,
        verdicts=verdicts,
        output_bytes=output_bytes,
        dedupe=spec.screen.dedupe,
        estimate_s=num_completions * cost.tokens_per_row / cost.tokens_per_s if cost else None,
    )


def _sample(found: Job, shards: list[Shard]) -> list[Row]:
    """Up to SURVEY_ROWS rows as they would reach the engine, from up to 8 shards."""
    chosen = shards[:: max(1, len(shards) // 8)][:8]
    rows: list[Row] = []
    reader = read.Reader(found.source)
    for shard in chosen:
        part = dataclasses.replace(shard, stop=min(shard.stop, shard.start + SURVEY_ROWS // len(chosen)))
        source = reader.rows(part, found.columns, found.sampling)
        rows += found.kit.renderer.rows(found.kit.screen.rows(source))
    return rows
