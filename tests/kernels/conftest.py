"""Kernels run on this machine's GPU, or else on CPU tensors under Triton's interpreter.

Triton decides at its own import, and at that of each kernel, whether kernels are interpreted. So the variable is set
here, all kernels are imported, and it is taken back: the rest of the process, and what it starts, must not see it. The
tests' fixture `device` then switches the interpreter on, in Triton and in our dispatch, and off after each module.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

import batchgen_kernels
from batchgen_kernels import dispatch

HAVE_TRITON = importlib.util.find_spec("triton") is not None
KERNELS = sorted(p.stem for p in Path(batchgen_kernels.__file__).parent.glob("triton_*.py"))

# Nothing to compare a reference with; the references are still what the engine's own tests run.
collect_ignore_glob = [] if HAVE_TRITON else ["test_*.py"]

if HAVE_TRITON:
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("batchgen_kernels.interpreter").repair()
        for name in KERNELS:
            importlib.import_module(f"batchgen_kernels.{name}")


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
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.cdiv, InterpretedFunction):
        pytest.fail("something imported triton before tests/kernels/conftest.py could set TRITON_INTERPRET")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(dispatch, "interpreted", True)
        yield torch.device("cpu")
