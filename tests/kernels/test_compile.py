"""The interpreter accepts what the compiler may not: without a GPU, kernels are at least compiled for one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

H100_SHARED_BYTES = 227 * 1024


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile and run them here")
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="Triton brings ptxas for these only"
)
def test_every_kernel_compiles_for_an_h100_without_spilling(tmp_path):
    script = Path(__file__).with_name("compile_sm90.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    folder = Path(__file__).parents[2] / "kernels/batchgen_kernels"
    ours = {line for p in folder.glob("triton_*.py") for line in p.read_text().splitlines() if "_kernel(" in line}
    assert {f"def {kernel['kernel']}(" for kernel in kernels} == {line for line in ours if line.startswith("def ")}
    for kernel in kernels:
        assert kernel["stack_bytes"] <= 64, f"{kernel}: registers spill"
        assert kernel["shared_bytes"] <= H100_SHARED_BYTES
        assert kernel["tensor_cores"] == (kernel["kernel"] == "tree_attend_kernel")
