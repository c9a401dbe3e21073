"""Tokens per second plain, with fixed trees and with `tree: auto`, at several numbers of running rows, in one run.

    python examples/bench/speculation.py --rows 1,16,64 --json examples/bench/results/speculation.json

Every mode decodes the same rows, and modes take turns (`results.interleave`): ratios are what to read. The clock
starts when the target has read the prompts, and stops when the first row ends: until then as many rows run as it says
(`drained.py` has what follows, where rows end one by one). Rows that the model ends before `--max-tokens` when it
decodes plainly are left out: one of them would end everyone's turn after a few steps. That the head reads the prompts,
too, is a cost of drafting and counts, at once in a fixed mode, and in `auto` when it first drafts. All rows are greedy.
Needs the demo model, the committed head and the committed prompts.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer

from batchgen import models
from batchgen.engines.torch.draft import Draft
from batchgen.engines.torch.engine import TorchEngine
from batchgen.engines.torch.forest import Shape
from batchgen.engines.torch.measure import measure
from batchgen.engines.torch.target import Target
from batchgen.engines.torch.width import AutoTree
from batchgen.record import Request, Sampling

sys.path.insert(0, str(Path(__file__).parent))
from results import interleave, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.speculation.costs import Costs

EXAMPLES = Path(__file__).parents[1]
SETS = ("mt_bench", "eagle_gsm8k", "eagle_humaneval")
MODES = ("plain", "chain-1", "chain-2", "chain-3", "chain-4", "chain-5", "tree-3x2x4", "tree-4x4x12", "head", "auto")
# As jobs do it, and by what the head drafts alone.
AUTO = ("auto", "head")


class Machine:
    """The demo model, its head and prompts of every kind in turn."""

    def __init__(self, dtype: str, device: str) -> None:
        path = models.fetch("demo:smollm2-135m").path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.target = Target(path, getattr(torch, dtype), torch.device(device))
        self.draft = Draft(EXAMPLES / "smollm2", self.target)
        self._auto: dict[tuple[str, int], AutoTree] = {}
        self._costs: dict[int, Costs] = {}
        self.prompts = mixed_prompts(self.tokenizer)

    def engine(self, mode: str, rows: int) -> TorchEngine:
        """A fresh engine that decodes by `mode`."""
        width = self.auto(mode, rows) if mode in AUTO else fixed_shape(mode)
        draft = None if width is None else self.draft
        return TorchEngine(self.target, draft, decode=self.tokenizer.decode, batch_size=rows, width=width)

    def auto(self, mode: str, rows: int) -> AutoTree:
        """What decides for `rows` rows, with what it has learned: a job decodes for hours, a turn for seconds."""
        if rows not in self._costs:  # of one measurement for both modes, which then correct their own
            self._costs[rows], _ = measure(self.target, self.draft, rows)
        if (mode, rows) not in self._auto:
            costs, on_cpu = copy.deepcopy(self._costs[rows]), self.target.device.type == "cpu"
            lookup = mode == "auto"
            self._auto[mode, rows] = AutoTree(costs, self.target.pass_sizes, lookup=lookup, stops_early=on_cpu)
        return self._auto[mode, rows]

    def requests(self, count: int, max_tokens: Sequence[int]) -> list[Request]:
        """`count` rows over the prompts, of lengths `max_tokens` in turn, shorter where the model ends one."""
        lengths = [max_tokens[i % len(max_tokens)] for i in range(count)]
        prompts = [self.prompts[i % len(self.prompts)] for i in range(count)]
        return [
            Request(i, str(i), 0, p, Sampling(max_tokens=n))
            for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
        ]

    def lasting(self, count: int, max_tokens: int) -> list[Request]:
        """The first `count` rows that the model, decoding plainly, does not end before `max_tokens`."""
        engine, done = self.engine("plain", 64), []
        for request in (asked := self.requests(2 * count, [max_tokens])):
            engine.submit(request)
        while engine.unfinished:
            done += engine.step()
        long = {completion.key for completion in done if len(completion.token_ids) == max_tokens}
        found = [request for request in asked if request.key in long][:count]
        assert len(found) == count, f"{len(found)} of {2 * count} rows have {max_tokens} tokens, {count} are needed"
        return found


def fixed_shape(mode: str) -> Shape | None:
    """The tree of `chain-D` or `tree-DxWxN`; None of other modes."""
    if mode.startswith("chain-"):
        return Shape(int(mode[6:]), 1, int(mode[6:]))
    return Shape(*map(int, mode[5:].split("x"))) if mode.startswith("tree-") else None


def mixed_prompts(tokenizer: Any) -> list[list[int]]:
    """The committed prompts of every set in turn, as token ids."""
    sets = [pq.read_table(EXAMPLES / f"prompts/{name}.parquet")["messages"].to_pylist() for name in SETS]
    mixed = [messages for together in zip(*sets, strict=False) for messages in together]
    return [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in mixed]


def decode(engine: TorchEngine, requests: Sequence[Request]) -> dict[str, float]:
    """Tokens per second of `requests` side by side, until the first one ends, and what speculation did."""
    for request in requests:
        engine.submit(request)
    # All prompts in one pass, so that no row is ahead of the others; the head reads them as in any job.
    chunk, engine._prefill_tokens = engine._prefill_tokens, sum(len(r.prompt_token_ids) for r in requests)  # noqa: SLF001
    done = engine.step()
    engine._prefill_tokens = chunk  # noqa: SLF001
    assert not engine.reading, "not all rows fit into memory"
    began, before = time.perf_counter(), engine.num_tokens
    clocks = dict(engine.seconds)
    while not done:
        done += engine.step()
    seconds, tokens = time.perf_counter() - began, engine.num_tokens - before
    counts = [row.acceptance for row in (*done, *engine._rows)]  # noqa: SLF001  # they do not end here
    steps = sum(count.target_steps for count in counts)
    return {
        "tokens_per_s": tokens / seconds,
        "acceptance_length": sum(count.accepted_tokens + count.accepted_lookup_tokens for count in counts) / steps + 1,
        "nodes_per_row": sum(count.draft_tokens + count.lookup_tokens for count in counts) / steps,
        **{f"{name}_share": (engine.seconds[name] - clocks[name]) / seconds for name in clocks},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options.add_argument("--device", default="cpu")
    options.add_argument("--rows", default="1,2,4,8,16,32,64", help="numbers of running rows")
    options.add_argument("--modes", default=",".join(MODES))
    options.add_argument("--max-tokens", type=int, default=96)
    options.add_argument("--turns", type=int, default=3, help="turns of each mode, of which the median counts")
    options.add_argument("--learning", type=int, default=4, help="turns of auto before all others, as in a longer job")
    # Of few, what is accepted is uncertain by some percent.
    options.add_argument("--prompts", type=int, default=24, help="rows that a mode decodes at least")
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    machine = Machine(args.dtype, args.device)
    results: list[dict[str, Any]] = []
    for rows in map(int, args.rows.split(",")):
        requests = machine.lasting(rows * -(-args.prompts // rows), args.max_tokens)
        groups = [requests[i : i + rows] for i in range(0, len(requests), rows)]

        def turn(mode: str, rows: int = rows, groups: list[list[Request]] = groups) -> dict[str, float]:
            runs = [decode(machine.engine(mode, rows), group) for group in groups]
            speed = statistics.harmonic_mean([run["tokens_per_s"] for run in runs])
            return {name: statistics.fmean(run[name] for run in runs) for name in runs[0]} | {"tokens_per_s": speed}

        modes = args.modes.split(",")
        for mode in [mode for mode in AUTO if mode in modes] * args.learning:
            turn(mode)
        results += interleave(turn, modes, args.turns, rows=rows)
    write(args.json, results, args, args.device)


if __name__ == "__main__":
    main()
