"""Our kernels never shadow Hugging Face's `kernels`, and both packages come from one tree.

An importable `kernels` of ours makes transformers import it in place of Hugging Face's and fail at every model load.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import batchgen
import batchgen_kernels

ROOT = Path(__file__).parents[1]


def test_kernels_is_not_importable_from_this_tree():
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    for command in ([sys.executable, "-c", code], [sys.executable, "-c", f"import batchgen, batchgen_kernels; {code}"]):
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        # A folder without __init__.py has no origin and yields to any regular package; ours must stay such a folder.
        assert found == "None" or not Path(found).is_relative_to(ROOT)
    assert not (ROOT / "kernels/__init__.py").exists()


def test_both_packages_come_from_one_tree():
    ours, kernels = Path(batchgen.__file__).parents[1], Path(batchgen_kernels.__file__).parents[1]
    assert kernels in (ours, ours / "kernels"), "reinstall: kernels of another install would run"
