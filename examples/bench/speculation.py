"""Tokens per second with and without the draft head, at several batch sizes, in one run.

    python examples/bench/speculation.py --dtype bfloat16 --json examples/bench/results/speculation.json

Plain and speculative decoding take turns on the same rows, so that what else the machine does hits both alike; ratios
are what to read. Needs the demo model, the committed head and the committed prompts; all rows are greedy.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer

from batchgen import models, provenance
from batchgen.engines.torch.draft import Draft
from batchgen.engines.torch.engine import TorchEngine
from batchgen.engines.torch.forest import Shape
from batchgen.engines.torch.target import Target
from batchgen.record import Request, Sampling

HERE = Path(__file__).parents[1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options.add_argument("--device", default="cpu")
    options.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    options.add_argument("--depths", type=int, nargs="+", default=[2, 3, 4], help="chain lengths to try")
    options.add_argument("--max-tokens", type=int, default=64)
    options.add_argument("--repeats", type=int, default=3, help="turns of each, of which the median counts")
    options.add_argument("--prompts", default="eagle_gsm8k")
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    path = models.fetch("demo:smollm2-135m").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = pq.read_table(HERE / f"prompts/{args.prompts}.parquet")["messages"].to_pylist()
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
    device = torch.device(args.device)
    target = Target(path, getattr(torch, args.dtype), device)
    draft = Draft(HERE / "smollm2", target)

    def run(depth: int, rows: int) -> tuple[float, float]:
        """Decode tokens per second after the first tokens, and acceptance length."""
        tree = Shape(depth, 1, depth) if depth else None
        engine = TorchEngine(target, draft if depth else None, decode=tokenizer.decode, batch_size=rows, tree=tree)
        for i in range(rows):
            sampling = Sampling(max_tokens=args.max_tokens)
            engine.submit(Request(i, str(i), 0, prompts[i % len(prompts)], sampling))
        done = engine.step()
        began, before = time.perf_counter(), engine.num_tokens
        while engine.unfinished:
            done += engine.step()
        tokens_per_s = (engine.num_tokens - before) / (time.perf_counter() - began)
        steps = sum(c.acceptance.target_steps for c in done)
        return tokens_per_s, (engine.num_tokens - rows) / steps

    results = []
    for rows in args.rows:
        measured: dict[int, list[tuple[float, float]]] = {depth: [] for depth in (0, *args.depths)}
        for _ in range(args.repeats):
            for depth, runs in measured.items():
                runs.append(run(depth, rows))
        plain = statistics.median(speed for speed, _ in measured[0])
        for depth, runs in measured.items():
            speeds = sorted(speed for speed, _ in runs)
            fact = {
                "rows": rows,
                "chain": depth,
                "tokens_per_s": round(statistics.median(speeds), 1),
                "spread": [round(speeds[0], 1), round(speeds[-1], 1)],
                "acceptance_length": round(runs[0][1], 3),
                "ratio_to_plain": round(statistics.median(speeds) / plain, 3),
            }
            results.append(fact)
            print(json.dumps(fact), flush=True)
    if args.json:
        about = {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "machine": provenance.machine(args.device),
            "versions": provenance.versions(),
            "options": {name: str(value) for name, value in vars(args).items() if name != "json"},
        }
        args.json.write_text(json.dumps(about | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
