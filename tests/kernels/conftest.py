"""Kernels run on this machine's GPU, or else on CPU tensors under Triton's interpreter.

Triton decides at its own import, and at that of each kernel, whether kernels are interpreted. So the variable is set
here, all kernels are imported, and it is taken back: the rest of the process, and what it starts, must not see it. The
tests' fixture `device` then switches the interpreter on, in Triton and in our dispatch, and off after each module.

Where something imported triton earlier (transformers' models do, by way of torch._dynamo, and with them the engine's
tests), it is too late: test_own_process.py then runs this folder in a process of its own, in place of the others.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import batchgen_kernels
from batchgen_kernels import dispatch

HAVE_TRITON = importlib.util.find_spec("triton") is not None
KERNELS = sorted(p.stem for p in Path(batchgen_kernels.__file__).parent.glob("triton_*.py"))
TESTS = {p.name for p in Path(__file__).parent.glob("test_*.py")}
OWN_PROCESS = {"test_own_process.py"}

if not HAVE_TRITON:
    # Nothing to compare the references with; they are still what the engine's own tests run.
    collect_ignore = sorted(TESTS)
elif torch.cuda.is_available() or "triton" not in sys.modules or dispatch.interpreted:
    collect_ignore = sorted(OWN_PROCESS)
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("batchgen_kernels.interpreter").repair()
        for name in KERNELS:
            importlib.import_module(f"batchgen_kernels.{name}")
else:
    collect_ignore = sorted(TESTS - OWN_PROCESS)


@pytest.fixture(scope="module", autouse=True)
def _threads():
    """One core: tests here are small, and machines share their cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def device():
    """Where kernels run; while a module uses it, operations dispatch to kernels."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(dispatch, "interpreted", True)
        yield torch.device("cpu")
