"""Products with packed weights: what each way of packing gives, for inputs of every form that layers hand over."""

from __future__ import annotations

import pytest
import torch

from batchgen.engines import native_bfloat16
from batchgen.engines.torch.linear import Weight, compute_dtype, multiplies_bfloat16

SHAPES = ((3, 64), (1, 64), (0, 64), (2, 5, 64))
# Without such instructions bfloat16 is never packed as it is.
needs_native = pytest.mark.skipif(not native_bfloat16(), reason="needs AVX-512 or AMX")
NATIVE = pytest.param(torch.bfloat16, True, marks=needs_native)


@pytest.mark.parametrize(("dtype", "two_bytes"), [(torch.float32, True), (torch.float32, False), NATIVE])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 7, 96, 20_000])
def test_packed_products_are_those_of_the_numbers_that_were_packed(dtype, two_bytes, bias, outputs):
    torch.manual_seed(0)
    weight = torch.randn(outputs, 64).bfloat16()
    b = torch.randn(outputs).bfloat16() if bias else None
    packed = Weight(weight.to(dtype), None if b is None else b.to(dtype), two_bytes=two_bytes)
    inputs = [torch.randn(shape) for shape in SHAPES]
    inputs += [torch.randn(64, 6).t(), torch.randn(5, 128)[:, ::2], torch.randn(5, 128)[:, :64]]
    for x in inputs:
        with torch.inference_mode():
            y = packed(x.to(dtype))
        exact = x.to(dtype).double() @ weight.double().t() + (0 if b is None else b.double())
        assert y.dtype is dtype
        assert y.shape == exact.shape
        # Of numbers around 8, float32 sums are off in the sixth place and a bfloat16 one in the third.
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-4 if dtype is torch.float32 else 0.2)


def test_float32_numbers_are_not_rounded():
    weight = torch.full((4, 8), 1 + 2**-20)
    with torch.inference_mode():
        assert (Weight(weight)(torch.ones(1, 8)) == 8 * (1 + 2**-20)).all()


def test_activations_are_of_the_dtype_whose_products_are_faster():
    cpu = torch.device("cpu")
    assert compute_dtype(torch.bfloat16, cpu) is (torch.bfloat16 if multiplies_bfloat16() else torch.float32)
    assert native_bfloat16() or not multiplies_bfloat16()
    assert compute_dtype(torch.float32, cpu) is torch.float32
