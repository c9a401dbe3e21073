"""How well heads draft, on the three evaluation sets, by a greedy chain of 4 (jobs/judge.yaml).

    python examples/train_head/judge.py examples/smollm2 outputs/head
    python examples/train_head/judge.py outputs/head --set engine.kind=vllm --json judged.json

prints for each head and set the acceptance length and how often the token at each depth was accepted, of the passes
that drafted so deep: near its end we draft a row no deeper than it may still write, and vLLM drafts beyond. The length
is 1 + the sum of these. The rows stand below `--to`, for `batchgen report` to look closer; what was judged before is
not judged again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from batchgen import acceptance, job, models, spec
from batchgen.store import connect

ROOT = Path(__file__).parents[2]
SETS = ("mt_bench", "eagle_gsm8k", "eagle_humaneval")


def judge(head: str, to: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Acceptance of one head on each set."""
    found = []
    # A head may change in its folder, and with it its acceptance, though not the rows' tokens.
    facts = [models.fetch(head).identity, *sorted(overrides), str(ROOT)]
    which = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]
    for name in SETS:
        prompts = ROOT / f"examples/prompts/{name}.parquet"
        output = f"{to.rstrip('/')}/{which}/{name}"
        own = [f"input.path={prompts}", f"model.draft={head}", f"output.path={output}"]
        asked = spec.load(str(ROOT / "jobs/judge.yaml"), [*overrides, *own])
        job.submit(asked)
        everything = acceptance.by(connect(output, asked.output.storage_options), output, [])[0]
        length = 1 + sum(everything.by_depth)
        about = {"head": head, "set": name, "engine": asked.engine.kind, "rows": everything.rows}
        found.append(
            about | {"acceptance_length": round(length, 3), "by_depth": [round(x, 3) for x in everything.by_depth]}
        )
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("heads", nargs="+", help="folders of heads, as in model.draft")
    options.add_argument("--to", default="outputs/judged", help="folder for the rows")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of batchgen submit")
    options.add_argument("--json", type=Path, help="file for the results")
    args = options.parse_args()
    results = []
    for head in args.heads:
        for row in judge(head, args.to, args.set):
            depths = " ".join(f"{share:.3f}" for share in row["by_depth"])
            print(f"{row['head']:30} {row['set']:16} {row['acceptance_length']:.2f}   {depths}", flush=True)
            results.append(row)
    if args.json:
        args.json.write_text(json.dumps({"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
