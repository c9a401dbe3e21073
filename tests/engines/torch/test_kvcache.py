"""Pools of keys and values: what they cost, what they keep, and how much memory there is for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engines.torch.kvcache import Pool, container_bytes, out_of_memory

SIZES = st.tuples(st.integers(1, 20), st.integers(1, 600))


def pool() -> Pool:
    return Pool(2, 1, 4, torch.float32, torch.device("cpu"))


@given(SIZES, SIZES, st.data())
def test_a_resized_pool_keeps_what_rows_use_and_costs_what_it_says(before, after, data):
    cache = pool()
    cache.resize(*before)
    cache.k.uniform_()
    cache.v.uniform_()
    old_k, old_v = cache.k, cache.v
    rows, tokens = (data.draw(st.integers(0, min(pair))) for pair in zip(before, after, strict=True))
    cache.resize(*after, rows=rows, tokens=tokens)
    assert cache.slots >= after[0]
    assert cache.length >= after[1]
    assert cache.k.nbytes + cache.v.nbytes == cache.num_bytes(*after)
    assert torch.equal(cache.k[:, :rows, :, :tokens], old_k[:, :rows, :, :tokens])
    assert torch.equal(cache.v[:, :rows, :, :tokens], old_v[:, :rows, :, :tokens])


def test_one_row_is_not_charged_for_eight():
    assert pool().num_bytes(1, 256) == 2 * 2 * 256 * 4 * 4  # k and v, layers, tokens, head_dim, float32
    assert pool().num_bytes(9, 256) == 16 * pool().num_bytes(1, 256)


def test_a_container_may_take_what_it_has_left(tmp_path):
    assert container_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 200\ninactive_file 150\n")
    assert container_bytes(tmp_path) == 450
    (tmp_path / "memory.current").write_text("1200\n")
    assert container_bytes(tmp_path) == 0


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_memory_that_ran_out_is_known_by_whoever_says_so(error, memory):
    assert out_of_memory(error) == memory
