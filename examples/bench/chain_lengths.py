"""vLLM's tokens per second without drafts, with chains of fixed lengths and with `tree: auto`, in one run.

    python examples/bench/chain_lengths.py --rows 1,8,32,64 --json examples/bench/results/chain-lengths-cpu.json

For each number of rows every mode is a vLLM engine of that batch size, of which one computes at a time
(`results.interleave`). Rows are greedy and run to the same length, twice as many as run at once; the clock starts when
all that run have their first token, and stops when the first place stays empty: a batch that drains says more of how
acceptance is spread than of a step. `auto` has decoded `--warm-steps` steps twice before, as the first two jobs on a
machine do, and was then started anew with what it had learned, as the next one is. Two processes of the very same
engine differ by some percent for as long as they live (mode `again` is plain once more), so differences that small need
`--starts`: all engines are then started anew so many times, in turned order. Needs vLLM beside batchgen.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import interleave, pooled, write
from speculation import mixed_prompts
from transformers import AutoTokenizer

from batchgen import engines, models, spec
from batchgen.record import Request, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = Path(__file__).parents[1]


def engine(mode: str, rows: int, args: argparse.Namespace, folder: str) -> Any:
    """A vLLM engine of `rows` rows that drafts by `mode`: `plain`, `again`, `chain-K` or `auto`."""
    tree = {"plain": "=off", "again": "=off", "auto": "=auto"}.get(mode) or f".depth={mode.removeprefix('chain-')}"
    asked = [
        "engine.kind=vllm",
        f"engine.device={args.device}",
        f"model.dtype={args.dtype}",
        f"model.draft={EXAMPLES / 'smollm2'}",
        f"speculation.tree{tree}",
        f"batch_size={rows}",
        f"engine.options.gpu_memory_utilization={args.memory}",
        "engine.options.max_model_len=2048",
        "engine.options.enable_prefix_caching=false",
    ]
    job = spec.load(str(EXAMPLES.parent / "jobs/quickstart.yaml"), asked)
    target, draft = models.fetch(job.model.target), models.fetch(str(EXAMPLES / "smollm2"))
    built: Any = engines.build(job, target, None if mode in ("plain", "again") else draft, str, Path(folder))
    built._end_token_ids = frozenset()  # noqa: SLF001  # every row runs to its length
    return built


def decode(running: Any, prompts: Sequence[list[int]], max_tokens: int) -> dict[str, float]:
    """Run two rows of each prompt to their ends, as many at once as there are prompts."""
    for i, prompt in enumerate([*prompts, *prompts]):
        running.submit(Request(i, str(i), 0, prompt, Sampling(max_tokens=max_tokens)))
    done = []
    while sum(bool(row.token_ids) for row in running._rows.values()) < len(prompts):  # noqa: SLF001
        done += running.step()
    began, before = time.perf_counter(), running.num_tokens
    while running.unfinished >= len(prompts):
        done += running.step()
    seconds, tokens = time.perf_counter() - began, running.num_tokens - before
    while running.unfinished:
        done += running.step()
    steps = sum(c.acceptance.target_steps for c in done)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "steps": steps / len(prompts),
        "acceptance_length": sum(len(c.token_ids) - 1 for c in done) / steps,
        "drafted_per_step": sum(c.acceptance.draft_tokens for c in done) / steps,
    }


def turn(running: Any, groups: Sequence[Sequence[list[int]]], max_tokens: int) -> dict[str, float]:
    """Decode one group of prompts after the other; means."""
    runs = [decode(running, group, max_tokens) for group in groups]
    facts = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
    return {"tokens_per_s": facts.pop("tokens") / facts.pop("seconds")} | facts


def compare(rows: int, prompts: list[list[int]], args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """All modes at one number of rows."""
    modes = args.modes.split(",")
    # One row says little: it takes several prompts one after the other.
    groups = [prompts[i : i + rows] for i in range(0, max(rows, 8), rows)]
    for _ in range(2 if "auto" in modes else 0):
        early, steps = engine("auto", rows, args, folder), 0.0
        while steps < args.warm_steps:
            steps += turn(early, groups, args.max_tokens)["steps"] * len(groups)
        early.close()
    starts, learned = [], {}
    for start in range(args.starts):
        running = {mode: engine(mode, rows, args, folder) for mode in (modes if start % 2 == 0 else reversed(modes))}

        def once(mode: str, running: dict[str, Any] = running) -> dict[str, float]:
            return turn(running[mode], groups, args.max_tokens)

        starts.append(interleave(once, modes, args.turns, rows=rows))
        learned = running["auto"].report() if "auto" in modes else {}
        for each in running.values():
            each.close()
    return pooled(starts) + ([{"rows": rows, "mode": "auto"} | learned] if learned else [])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", default="1,8,32,64", help="numbers of running rows, up to 64")
    options.add_argument("--modes", default="plain,chain-1,chain-2,chain-3,auto")
    options.add_argument("--max-tokens", type=int, default=48)
    options.add_argument("--prompt-tokens", type=int, default=48, help="of each prompt the last so many")
    options.add_argument("--turns", type=int, default=2, help="turns of each mode, of which the median counts")
    options.add_argument("--starts", type=int, default=1, help="of every engine, each with so many turns")
    options.add_argument("--warm-steps", type=int, default=300)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--device", default="cpu")
    options.add_argument("--memory", type=float, default=0.12, help="of the machine's, for each engine's KV cache")
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    path = models.fetch("demo:smollm2-135m").path
    prompts = [prompt[-args.prompt_tokens :] for prompt in mixed_prompts(AutoTokenizer.from_pretrained(path))]
    with tempfile.TemporaryDirectory() as folder:
        results = [fact for rows in map(int, args.rows.split(",")) for fact in compare(rows, prompts, args, folder)]
    write(args.json, results, args, args.device)


if __name__ == "__main__":
    main()
