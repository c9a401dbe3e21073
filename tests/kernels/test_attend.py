from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from batchgen_kernels.attend import MAX_COUNTS, num_splits, tree_attend, tree_attend_reference

NAN = float("nan")

# Averages of standard normal values. float32: up to 400 terms in another order, each product 2^-24 off. bfloat16:
# weights and output are rounded to 2^-9 of themselves, with values up to 4 or so.
CLOSE = {torch.float32: 4e-6, torch.bfloat16: 2**-5}


class Case:
    """A ragged batch of trees over poisoned pools: what no query may read is NaN."""

    def __init__(self, seed, num_kv, group, head_dim, max_count, rows, dtype, device, longest=200, full=False):
        g = torch.Generator().manual_seed(seed)

        def integers(low, high, n=rows):
            return torch.randint(low, high, (n,), generator=g)

        self.count = torch.where(torch.rand(rows, generator=g) < 0.2, 0, integers(1, max_count + 1))
        if full:
            self.count[:] = max_count
        self.prefix = torch.where(torch.rand(rows, generator=g) < 0.2, 0, integers(0, longest))
        gaps = integers(0, 3)  # packed tokens that belong to no tile
        self.start = torch.cumsum(torch.cat((gaps[:1], self.count[:-1] + gaps[1:])), 0)
        num_tokens = int(self.start[-1] + self.count[-1]) + 2
        self.slot = torch.randperm(rows + 2, generator=g)[:rows]
        self.bits = torch.zeros(num_tokens, dtype=torch.int64)
        self.position = torch.zeros(num_tokens, dtype=torch.int64)
        length = int(self.prefix.max()) + 64 - int(integers(0, 20, 1))
        self.q = torch.randn(num_tokens, num_kv * group, head_dim, generator=g)
        self.k, self.v = torch.full((2, rows + 2, num_kv, length, head_dim), NAN)
        for slot, start, count, prefix in self.rows():
            columns = min(64, length - prefix)
            parents, masks = torch.rand(columns, generator=g), []
            for c in range(columns):  # bit c and those of an earlier node
                masks.append(1 << c | (masks[int(parents[c] * c)] if c else 0))
            # A level of a draft tree may use any columns, the last and its sign bit among them.
            nodes = torch.randperm(columns, generator=g)[:count].sort().values.tolist()
            nodes = nodes + [columns - 1] * (count - len(nodes))
            for t, node in enumerate(nodes):
                mask = masks[node]
                self.bits[start + t] = mask - (1 << 64) if mask >> 63 else mask
                self.position[start + t] = prefix + mask.bit_count() - 1
            seen = [c for c in range(columns) if any(masks[n] >> c & 1 for n in nodes)]
            at = torch.tensor([*range(prefix), *(prefix + c for c in seen)])
            for pool in (self.k, self.v):
                pool[slot, :, at] = torch.randn(num_kv, len(at), head_dim, generator=g)
        for name in ("q", "k", "v"):
            setattr(self, name, getattr(self, name).to(dtype))
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))
        self.scale = head_dim**-0.5

    def rows(self):
        columns = (self.slot, self.start, self.count, self.prefix)
        return [row for row in zip(*(c.tolist() for c in columns), strict=True) if row[2]]

    def kernel(self, max_count, splits, window=None, only=None):
        count = self.count
        if only is not None:
            count = torch.where(torch.arange(len(count), device=count.device) == only, count, 0)
        out = torch.full_like(self.q, NAN)
        found = tree_attend(
            self.q, self.k, self.v, self.slot, self.start, count, self.prefix, self.bits, self.scale,
            max_count, splits, window, self.position, out,
        )  # fmt: skip
        assert found is out
        return out

    def reference(self, window=None):
        return tree_attend_reference(
            self.q, self.k, self.v, self.slot, self.start, self.count, self.prefix, self.bits, self.scale,
            window, self.position, torch.full_like(self.q, NAN),
        )  # fmt: skip

    def sdpa(self, window=None):
        """Each row by torch's own attention in float64 over a dense mask, the bits read one by one."""
        out = torch.full_like(self.q, NAN, dtype=torch.float64)
        for slot, start, count, prefix in self.rows():
            mask = torch.zeros(count, self.k.shape[2], dtype=torch.bool)
            for t in range(count):
                mask[t, :prefix] = True
                if window is not None:
                    mask[t, : max(0, int(self.position[start + t]) - window + 1)] = False
                bits = int(self.bits[start + t]) & 0xFFFFFFFFFFFFFFFF
                for c in range(64):
                    if bits >> c & 1:
                        mask[t, prefix + c] = True
            q = self.q[start : start + count].double().transpose(0, 1)
            k, v = self.k[slot].double().nan_to_num(), self.v[slot].double().nan_to_num()
            o = scaled_dot_product_attention(
                q[None], k[None], v[None], mask.to(q.device), scale=self.scale, enable_gqa=True
            )
            out[start : start + count] = o[0].transpose(0, 1)
        return out


shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([16, 48, 64, 128]))


@given(
    st.integers(0, 9999),
    shapes,
    st.sampled_from([n for n in MAX_COUNTS if n <= 32]),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([None, 70, 128]),
)
@settings(max_examples=30)
def test_kernel_and_reference_are_dense_attention(device, seed, shape, max_count, rows, dtype, splits, window):
    case = Case(seed, *shape, max_count, rows, dtype, device)
    exact = case.sdpa(window)
    # Poison in the pools shows as NaN in the output, poison left in the output as NaN where the others have none.
    close = {"rtol": 0, "atol": CLOSE[dtype], "equal_nan": True}
    torch.testing.assert_close(case.reference(window).double(), exact, **close)
    torch.testing.assert_close(case.kernel(max_count, splits, window).double(), exact, **close)


@pytest.mark.parametrize(
    ("group", "head_dim"),
    [
        (4, 64),  # 64 nodes of 4 heads are two blocks of rows
        (3, 128),  # and of 3 heads one and a half
    ],
)
def test_full_tiles_of_64_nodes(device, group, head_dim):
    case = Case(7, 1, group, head_dim, 64, 2, torch.float32, device, longest=80, full=True)
    torch.testing.assert_close(case.kernel(64, 2).double(), case.sdpa(), rtol=0, atol=4e-6, equal_nan=True)


def test_the_reference_in_float64_is_dense_attention():
    case = Case(3, 2, 3, 32, 8, 4, torch.float64, torch.device("cpu"))
    for window in (None, 70):
        torch.testing.assert_close(case.reference(window), case.sdpa(window), rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_does_not_depend_on_the_others_of_its_batch(device, splits):
    case = Case(11, 2, 3, 64, 8, 4, torch.float32, device)
    together = case.kernel(8, splits)
    for r, (start, count) in enumerate(zip(case.start.tolist(), case.count.tolist(), strict=True)):
        alone = case.kernel(8, splits, only=r)
        assert torch.equal(alone[start : start + count], together[start : start + count])
        assert int((~alone.isnan()).all(-1).all(-1).sum()) == count


def test_a_larger_variant_computes_the_same(device):
    # One graph may serve smaller trees than it was captured for.
    case = Case(13, 2, 4, 64, 4, 3, torch.float32, device)
    for max_count in (8, 16):
        torch.testing.assert_close(case.kernel(max_count, 1), case.kernel(4, 1), rtol=0, atol=4e-6, equal_nan=True)


def test_a_prefix_shorter_than_its_splits(device):
    case = Case(17, 1, 2, 32, 4, 3, torch.float32, device, longest=3)
    torch.testing.assert_close(case.kernel(4, 16).double(), case.sdpa(), rtol=0, atol=4e-6, equal_nan=True)


def test_num_splits_fills_the_gpu_twice_or_not_at_all():
    assert num_splits(64, 8, 132) == 1  # 512 programs
    assert num_splits(25, 8, 132) == 1  # 200, one and a half waves
    assert num_splits(24, 8, 132) == 2
    assert num_splits(1, 8, 132) == 33
    assert num_splits(1, 3, 132) == 88
