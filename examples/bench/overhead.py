"""What a job costs beside a bare loop over its engine: reading, rendering, journalling, writing and reading back.

    python examples/bench/overhead.py --engine vllm --json examples/bench/results/overhead-vllm.json

One engine, started once, does the same rows by turns: in a loop that only submits and steps (vLLM's own `add_request`
and `step`, or ours), and as a job from Parquet to Parquet, whose clock runs until its parts are read back. Greedy and
plain; nothing is cached between turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from results import write

from batchgen import job, report, spec
from batchgen.lease import Lease
from batchgen.record import Request, Sampling
from batchgen.worker import Worker

if TYPE_CHECKING:
    from batchgen.job import Job

EXAMPLES = Path(__file__).parents[1]
SETS = ("mt_bench", "eagle_gsm8k", "eagle_humaneval")


def table(rows: int) -> pa.Table:
    """`rows` chats of the committed prompts, of every set in turn and with ids of their own."""
    sets = [pq.read_table(EXAMPLES / f"prompts/{name}.parquet")["messages"].to_pylist() for name in SETS]
    chats = [messages for together in zip(*sets, strict=False) for messages in together]
    return pa.table({"id": [str(i) for i in range(rows)], "messages": [chats[i % len(chats)] for i in range(rows)]})


def loop(engine: Any, prompts: list[list[int]], sampling: Sampling) -> float:
    """Tokens per second of submitting and stepping, and nothing else."""
    began, tokens = time.perf_counter(), 0
    if engine.name == "vllm":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm = engine._engine  # noqa: SLF001  # the bare thing is what is measured
        for i, prompt in enumerate(prompts):
            asked = SamplingParams(
                temperature=0.0,
                max_tokens=sampling.max_tokens,
                stop_token_ids=sorted(engine._end_token_ids),  # noqa: SLF001
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            llm.add_request(f"loop {i}", {"prompt_token_ids": prompt}, asked)
        while llm.has_unfinished_requests():
            tokens += sum(len(done.outputs[0].token_ids) for done in llm.step() if done.finished)
    else:
        for i, prompt in enumerate(prompts):
            engine.submit(Request(i, str(i), 0, prompt, sampling))
        while engine.unfinished:
            tokens += sum(len(done.token_ids) for done in engine.step())
    return tokens / (time.perf_counter() - began)


def whole_job(prepared: Job, engine: Any, out: str) -> float:
    """Tokens per second of a job into the fresh folder `out`, from taking its lease to its summary."""
    began = time.perf_counter()
    made = dataclasses.replace(prepared, spec=prepared.spec.model_copy(update={"output": spec.OutputSpec(path=out)}))
    with Lease.take(made.sink, made.output, ttl_s=made.spec.checkpoint.lease_seconds) as lease:
        tally = Worker(made.task(lease.epoch), engine, made.kit.renderer, made.kit.screen).run(made.todo)
    summary = report.summarise(made.sink, made.output, made.plan, 1)
    assert not summary.problems, summary.problems
    return tally.completion_tokens / (time.perf_counter() - began)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", default="torch", choices=["torch", "vllm"])
    options.add_argument("--rows", type=int, default=256)
    options.add_argument("--max-tokens", type=int, default=32)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--turns", type=int, default=2)
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table(args.rows), f"{folder}/prompts.parquet")
        asked = {
            "input.path": f"{folder}/prompts.parquet",
            "input.keep": "[]",
            "model.draft": "null",
            "engine.kind": args.engine,
            "speculation.tree": "off",
            "sampling.max_tokens": args.max_tokens,
            "batch_size": args.batch_size,
            "output.path": f"{folder}/out",
        }
        if args.engine == "vllm":
            asked |= {"engine.options.enable_prefix_caching": "false", "engine.options.max_model_len": "2048"}
        made = job.prepare(
            spec.load(str(EXAMPLES.parent / "jobs/quickstart.yaml"), [f"{k}={v}" for k, v in asked.items()])
        )
        engine: Any = made.kit.engine(Path(folder))
        sampling = Sampling(max_tokens=args.max_tokens)
        chats = table(args.rows)["messages"].to_pylist()
        tokenizer = made.kit.renderer._tokenizer  # noqa: SLF001
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
        loop(engine, prompts[: args.batch_size], sampling)
        loops, jobs, ratios = [loop(engine, prompts, sampling)], [], []
        for turn in range(args.turns):
            jobs.append(whole_job(made, engine, f"{folder}/out-{turn}"))
            loops.append(loop(engine, prompts, sampling))
            ratios.append(jobs[-1] / statistics.harmonic_mean(loops[-2:]))
        fact = {
            "engine": args.engine,
            "rows": args.rows,
            "job_tokens_per_s": round(statistics.median(jobs), 3),
            "loop_tokens_per_s": round(statistics.median(loops), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        }
        print(json.dumps(fact))
        write(args.json, [fact], args, "cpu")
        engine.close()


if __name__ == "__main__":
    main()
