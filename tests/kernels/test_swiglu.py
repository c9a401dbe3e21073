from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from batchgen_kernels.swiglu import swiglu


@given(
    st.integers(0, 9),
    st.sampled_from([1, 80, 1024, 1536]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
@settings(max_examples=15)
def test_the_kernel_computes_the_reference(device, rows, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    gate_up = (4 * torch.randn(rows, 2 * width, generator=g)).to(device, dtype)
    # exp differs by some ulp; in bfloat16 that may tip the rounding of silu, 2^-8, and with it that of the product.
    close = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(swiglu(gate_up), swiglu.__wrapped__(gate_up), rtol=close, atol=1e-30)


def test_silu_is_rounded_before_the_product(device):
    gate_up = torch.randn(4, 2000, generator=torch.Generator().manual_seed(4)).to(device, torch.bfloat16)
    # Without that rounding a third of the products would differ; with it, only those where exp's last ulp tips one.
    assert (swiglu(gate_up) == swiglu.__wrapped__(gate_up)).float().mean() > 0.98


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy; hardware says inf quietly
def test_large_gates_neither_overflow_nor_vanish(device):
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, -80.0, 1.0, 2.0, 3.0, 4.0]], device=device)
    torch.testing.assert_close(swiglu(gate_up), swiglu.__wrapped__(gate_up), rtol=1e-6, atol=1e-30)
    assert swiglu(gate_up)[0, 1] == 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_transformers(dtype):
    gate, up = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    # torch's silu takes another path for strided halves, an ulp away in float32.
    close = {"rtol": 5e-7 if dtype is torch.float32 else 0, "atol": 0}
    torch.testing.assert_close(swiglu.__wrapped__(torch.cat((gate, up), 1)), ACT2FN["silu"](gate) * up, **close)


def test_the_reference_is_the_formula_in_float64():
    gate, up = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(swiglu.__wrapped__(torch.cat((gate, up), 1)), expected, rtol=1e-12, atol=0)
