"""The benchmarks of the torch engine run, at sizes that say nothing of speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "examples/bench"
MODES = ["--modes", "plain,chain-2,auto", "--turns", "1"]
RUNS = {
    "speculation.py": ["--rows", "4", "--prompts", "4", "--max-tokens", "6", "--learning", "0", *MODES],
    "drained.py": ["--rows", "2", "--batch-size", "2", *MODES],
    "shape.py": ["--shape", "tiny", "--device", "cpu", "--rows", "2", "--context", "8", "--max-tokens", "12", *MODES],
    "limits.py": ["--rows", "2", "--prompts", "3", "--max-tokens", "12"],
}


@pytest.mark.parametrize("script", RUNS)
def test_a_benchmark_runs_and_writes_what_it_found(script, tmp_path):
    file = tmp_path / "found.json"
    subprocess.run([sys.executable, BENCH / script, *RUNS[script], "--json", file], check=True, capture_output=True)
    found = json.loads(file.read_text())
    assert found["device"]
    assert found["versions"]["torch"]
    results = found["results"]
    if script == "limits.py":
        reached, *by_rows, _ = results
        assert 0 < reached["acceptance_by_depth"][0] < 1
        assert all(1 <= each["oracle"] < each["perfect"] for each in by_rows)
        # With lookups no step gives less, but those that give more read more as well.
        assert all(each["copying"] > 0.95 * each["oracle"] for each in by_rows)
        return
    assert [each["mode"] for each in results] == ["plain", "chain-2", "auto"]
    assert all(each["tokens_per_s"] > 0 for each in results)
    plain, chain, _ = results
    assert plain["acceptance_length"] == 1 < chain["acceptance_length"] <= 3
    assert plain["nodes_per_row"] == 0 < chain["nodes_per_row"] <= 2
