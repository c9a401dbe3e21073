"""The soak of examples/soak, for a minute: real processes of real jobs killed at random over a bucket that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "examples/soak"


@pytest.mark.slow
def test_jobs_that_are_killed_at_random_end_with_the_rows_of_an_undisturbed_one(tmp_path: Path) -> None:
    options = ["--kills", "3", "--rows", "400", "--store", "gcs", "--faults", "0.1", "--seed", "1"]
    command = [sys.executable, str(SOAK / "kill.py"), *options, "--json", str(tmp_path / "soak.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [fact] = json.loads((tmp_path / "soak.json").read_text())["results"]
    assert fact["kills"] == 3
    assert fact["requests_failed"] > 10
    assert (fact["lost"], fact["doubled"], fact["different"]) == (0, 0, 0)
