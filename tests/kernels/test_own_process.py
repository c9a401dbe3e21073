from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_kernels_in_a_process_of_their_own():
    here = Path(__file__)
    # Should that process also find triton imported, it must not start a third.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--ignore={here}", str(here.parent)]
    done = subprocess.run(command, cwd=here.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
