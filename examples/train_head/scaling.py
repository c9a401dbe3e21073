"""How much a head gains from more data: heads trained on nested shares of a set, judged, and plotted.

    python examples/train_head/scaling.py jobs/train.yaml --to outputs/scaling --epochs 3

The job is submitted and its hidden states are captured; for each share its rows are exported (chosen by hash, so that a
smaller share is part of a larger one), a head is trained for `--epochs`, and judged on the three evaluation sets
(judge.py). What is done is not done again. What follows `--` goes to `speculators train`. `--to` gets scaling.json and
scaling.png, which takes matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from judge import SETS, judge

from batchgen import spec, write
from batchgen.store import connect

HERE = Path(__file__).parent


def run(*command: str) -> None:
    """Run a command of ours, or end with its exit code."""
    print("+", *command, flush=True)
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(job: str, share: float, target: str, to: Path, trainer: list[str]) -> Path:
    """The head that was trained on a share of the job's rows as they are now, with these settings."""
    output = spec.load(job, []).output
    parts = write.parts(connect(output.path, output.storage_options), output.path)
    settings = hashlib.sha256(" ".join([target, *trainer, *sorted(parts.values())]).encode()).hexdigest()[:8]
    data, head = to / f"set-{share:g}", to / f"head-{share:g}-{settings}"
    if not (head / "config.json").exists():
        sample = [] if share == 1 else ["--sample", str(share)]
        form = ["--form", "speculators-states", "--to", str(data), "--hold-out", "0.05"]
        run("-m", "batchgen", "export", job, *form, *sample)
        run(str(HERE / "train.py"), "--target", target, "--data", str(data), "--to", str(head), "--", *trainer)
    return head


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Acceptance length against target tokens, a line for each set."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in SETS:
        rows = [row for row in results if row["set"] == name]
        axes.plot([row["target_tokens"] for row in rows], [row["acceptance_length"] for row in rows], "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of the target's own in the set, a twentieth of them held out")
    axes.set_ylabel("acceptance length, greedy chain of 4")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("job", help="the job file of training prompts")
    options.add_argument("--to", type=Path, required=True, help="folder for sets, heads and results")
    options.add_argument("--target", default="demo:smollm2-135m")
    options.add_argument("--shares", default="0.125,0.25,0.5,1")
    options.add_argument("--epochs", type=int, default=3)
    border = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, trainer = options.parse_args(sys.argv[1:border]), sys.argv[border + 1 :]
    args.to.mkdir(parents=True, exist_ok=True)
    for command in ("submit", "features"):
        run("-m", "batchgen", command, args.job)
    results = []
    for share in map(float, args.shares.split(",")):
        head = train(args.job, share, args.target, args.to, [f"--epochs={args.epochs}", *trainer])
        facts = json.loads((args.to / f"set-{share:g}" / "export.json").read_text())
        about = {"head": head.name, "share": share, "set_rows": facts["rows"], "target_tokens": facts["target_tokens"]}
        results += [row | about for row in judge(str(head), str(args.to / "judged"), [f"model.target={args.target}"])]
        (args.to / "scaling.json").write_text(json.dumps({"results": results}, indent=1) + "\n")
    plot(results, args.to / "scaling.png")
    print(f"results: {args.to / 'scaling.json'}, {args.to / 'scaling.png'}")


if __name__ == "__main__":
    main()
