from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from batchgen_kernels import dispatch

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from batchgen_kernels import attend, compaction, norm, rope, sample, swiglu
x = torch.ones(2, 8)
norm.rms_norm(x, x[0], 1e-5, x)
swiglu.swiglu(x)
i = torch.zeros(2, dtype=torch.int64)
pool = torch.zeros(1, 1, 4, 2)
q = rope.rope_and_store(x, x[:, :2], x[:, :2], pool, pool.clone(), i, i + torch.arange(2), 2)
attend.tree_attend(q, pool, pool, i[:1], i[:1], i[:1] + 2, i[:1], i + 1, 1.0, 4, 1, None, i)
compaction.compact(pool[None], pool[None].clone(), i[:1], i[:1] + 2, i[:1])
print(sample.gumbel_argmax(x, x[:, 0], x[:, 0] - 9, i, i).tolist())
"""


def test_everything_runs_on_a_cpu_without_triton():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.startswith("[")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the whole process is asked to interpret")
def test_tests_of_kernels_leave_other_tests_on_the_references():
    # This module does not ask for the fixture `device`, as no test elsewhere does.
    assert "TRITON_INTERPRET" not in os.environ
    assert not dispatch.on_triton(torch.zeros(1))


def test_float64_is_the_reference_s(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", True)
    assert dispatch.on_triton(torch.zeros(1))
    assert not dispatch.on_triton(torch.zeros(1, dtype=torch.float64))
