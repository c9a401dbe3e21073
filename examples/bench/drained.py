"""A whole job to its last row: tokens per second plain, with fixed trees and with `tree: auto`, in one run.

    python examples/bench/drained.py --json examples/bench/results/drained.json

256 rows of mixed lengths at batch size 64, so that the batch drains from 64 running rows to 1: what pays changes on the
way, and a fixed tree cannot follow. Prompts count, unlike in `speculation.py`. Modes take turns, each between two plain
turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from results import interleave, write
from speculation import MODES, Machine

LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options.add_argument("--device", default="cpu")
    options.add_argument("--rows", type=int, default=256)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--modes", default=",".join(MODES))
    options.add_argument("--turns", type=int, default=1, help="turns of each mode, of which the median counts")
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    machine = Machine(args.dtype, args.device)
    requests = machine.requests(args.rows, LENGTHS)

    def turn(mode: str) -> dict[str, float]:
        engine = machine.engine(mode, args.batch_size)
        for request in requests:
            engine.submit(request)
        began, done = time.perf_counter(), []
        while engine.unfinished:
            done += engine.step()
        seconds = time.perf_counter() - began
        steps = sum(c.acceptance.target_steps for c in done)
        tokens = sum(len(c.token_ids) for c in done)
        verified = sum(c.acceptance.draft_tokens + c.acceptance.lookup_tokens for c in done)
        return {
            "tokens_per_s": tokens / seconds,
            "acceptance_length": (tokens - len(done)) / steps,
            "nodes_per_row": verified / steps,
        }

    about = {"rows": args.rows, "batch_size": args.batch_size}
    results = interleave(turn, args.modes.split(","), args.turns, **about)
    write(args.json, results, args, args.device)


if __name__ == "__main__":
    main()
