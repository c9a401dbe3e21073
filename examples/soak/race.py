"""Two submits of one job at the same moment, many times: one must run, the other exit with 75 within seconds.

    python examples/soak/race.py --races 50 --store gcs --json FILE

Needs a checkout, installed with its extra `test`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import polars as pl
import yaml
from kill import storage, table
from results import write

ROWS = 60


def race(job: Path) -> list[tuple[int, float]]:
    """The exit codes of two submits begun together and the seconds that each took, the first to end first."""
    began = time.monotonic()
    command = [sys.executable, "-m", "batchgen", "submit", str(job)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    ended: dict[int, float] = {}
    while len(ended) < len(both):
        for i, process in enumerate(both):
            if i not in ended and process.poll() is not None:
                ended[i] = time.monotonic() - began
        time.sleep(0.02)
    return [(both[i].returncode, ended[i]) for i in ended]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--races", type=int, default=50)
    options.add_argument("--store", choices=["gcs", "s3", "local"], default="gcs")
    options.add_argument("--faults", type=float, default=0.0, help="share of requests that fail (not on disk)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    wrong, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as name, storage(args, Path(name)) as (base, faulty, direct, _):
        source = Path(name) / "prompts.parquet"
        chats = [[{"role": "user", "content": f"Say {i}."}] for i in range(ROWS)]
        pl.DataFrame({"messages": chats}).write_parquet(source)
        for i in range(args.races):
            sections = {
                "input": {"path": str(source), "messages": "messages"},
                "model": {"target": "demo:smollm2-135m"},
                "engine": {"kind": "rehearsal", "options": {"step_s": 0.3}},
                "batch_size": 8,
                "output": {"path": f"{base}/race-{i}", "storage_options": faulty},
            }
            job = Path(name) / "job.yaml"
            job.write_text(yaml.safe_dump(sections))
            (first, after_s), (second, _) = race(job)
            slowest = max(slowest, after_s)
            found = table(f"{base}/race-{i}", direct)
            wrong += (first, second) != (75, 0) or not found["row_id"].n_unique() == found.height == ROWS
    fact = {"races": args.races, "store": args.store, "wrong": wrong, "loser_s_max": round(slowest, 2)}
    print(json.dumps(fact))
    write(args.json, [fact], args, "cpu")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
