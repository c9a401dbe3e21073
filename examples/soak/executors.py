"""The quickstart in process, on a local Ray with two workers and on a cluster of two nodes: are the rows the same?

    python examples/soak/executors.py --json FILE

Each is one command, which is printed; the cluster's two nodes are simulated on this machine. In float32, where tokens
depend on nothing but the row. Needs a checkout, installed with its extra `ray`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from results import write

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
ROW = ("row_id", "sample", "messages", "completion", "completion_token_ids", "finish_reason", "status")


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """The address of a Ray of two nodes with a core each."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", NODES], env=os.environ | LOOPBACK, text=True, **pipes) as nodes:
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        yield nodes.stdout.readline().strip()
        nodes.stdin.close()


def rows(output: Path, *changes: str) -> tuple[pl.DataFrame, float]:
    """What the quickstart writes to `output`, and the seconds that it takes."""
    settings = ["model.dtype=float32", f"output.path={output}", *changes]
    command = ["batchgen", "submit", "jobs/quickstart.yaml", *(word for s in settings for word in ("--set", s))]
    print(" ".join(command), flush=True)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=os.environ | LOOPBACK, stderr=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        sys.exit(f"it ended with exit code {done.returncode}")
    return pl.read_parquet(output / "*.parquet").sort("row_id", "sample"), time.monotonic() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as name, cluster() as address:
        two = "workers.count=2"
        executors = {"in process": [], "local Ray": [two], "two nodes": [two, f"workers.address={address}"]}
        found = {at: rows(Path(name) / at.replace(" ", "-"), *changes) for at, changes in executors.items()}
    first, _ = found["in process"]
    facts = [
        {
            "executor": at,
            "rows": table.height,
            "workers": table["worker"].n_unique(),
            "different": sum(a != b for a, b in zip(table.select(ROW).rows(), first.select(ROW).rows(), strict=True)),
            "seconds": round(seconds, 1),
        }
        for at, (table, seconds) in found.items()
    ]
    for fact in facts:
        print(json.dumps(fact))
    write(args.json, facts, args, "cpu")
    sys.exit(any(fact["different"] for fact in facts))


if __name__ == "__main__":
    main()
