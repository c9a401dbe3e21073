"""Time every kernel on this machine's GPU: `python kernels/bench.py [--json FILE] [--only OP]`.

Each kernel is first compared with its reference in float64, its outputs full of NaN beforehand; a wrong kernel is not
timed. Then it is timed beside its plain-torch reference, that reference under torch.compile, and what libraries have.
A time is the median over replays of a CUDA graph with the L2 cache flushed before each, so neither launch gaps nor a
warm cache flatter anybody; forms that a graph cannot hold (they wait for the device) are marked "eager" and timed with
their gaps. Achieved bandwidth is the bytes that must move, over the time, and is set against that of a large copy in
the same run. `floor` is what an almost empty graph takes: differences below it mean nothing.
"""
# ruff: noqa: T201 -- a script, beside the package and not in it

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import functools
import importlib
import json
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from batchgen_kernels import attend, compaction, norm, rope, sample, swiglu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BF16 = torch.bfloat16
NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Model:
    """The shapes of one decoder."""

    name: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv: int
    head_dim: int
    vocab: int
    layers: int


MODELS = [
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256, 32),
    Model("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, 30),
]


@dataclasses.dataclass
class Case:
    """One operation at one shape: `forms` by name; `error` is the kernel's against float64, of 1 allowed."""

    op: str
    shape: str
    num_bytes: int
    error: Callable[[], float]
    forms: dict[str, Callable[[], Any]]


def library(label: str, module: str, name: str, use: Callable[[Any], Any]) -> dict[str, Callable[[], Any]]:
    """A form that calls `use` on `name` of `module`, or none where that library is not installed."""
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return {}
    return {label: functools.partial(use, found)}


def poison(*shape: int, device: torch.device) -> None:
    """Leave NaN in the memory that the allocator gives the next tensor of this size."""
    torch.full(shape, NAN, dtype=BF16, device=device)


def off(found: torch.Tensor, exact: torch.Tensor, allowed: float) -> float:
    """Largest error over `allowed` times the largest exact value; infinite where one is NaN and the other is not."""
    if not torch.equal(found.isnan(), exact.isnan()):
        return float("inf")
    found, exact = found.double().nan_to_num(), exact.nan_to_num()
    return float((found - exact).abs().max() / exact.abs().max() / allowed)


def norm_case(m: Model, device: torch.device, n: int) -> Case:
    """Residual sum and norm."""
    x, residual = torch.randn(2, n, m.hidden, dtype=BF16, device=device)
    weight = torch.rand(m.hidden, dtype=BF16, device=device)
    in_place = x.clone(), residual.clone()

    def error() -> float:
        # The sum is rounded to the model dtype by definition: the exact norm is that of the rounded sum.
        exact = norm.rms_norm_reference((x + residual).double(), weight.double(), 1e-5)[0]
        out = torch.full_like(x, NAN)
        return off(norm.rms_norm(x, weight, 1e-5, residual, out_NH=out)[0], exact, 2**-7)

    compiled = torch.compile(norm.rms_norm_reference, dynamic=False)
    forms: dict[str, Callable[[], Any]] = {
        "kernel": lambda: norm.rms_norm(x, weight, 1e-5, residual),
        "reference": lambda: norm.rms_norm_reference(x, weight, 1e-5, residual),
        "torch.compile": lambda: compiled(x, weight, 1e-5, residual),
        "F.rms_norm": lambda: functional.rms_norm(x + residual, (m.hidden,), weight, 1e-5),
        **library("flashinfer, in place", "flashinfer.norm", "fused_add_rmsnorm", lambda f: f(*in_place, weight, 1e-5)),
        **library(
            "liger",
            "liger_kernel.ops.rms_norm",
            "LigerRMSNormFunction",
            lambda f: f.apply(x + residual, weight, 1e-5, 0.0, "llama", False),
        ),
    }
    return Case("rms_norm", f"N={n} H={m.hidden}", 4 * x.nbytes, error, forms)


def swiglu_case(m: Model, device: torch.device, n: int) -> Case:
    """Gated activation."""
    x = torch.randn(n, 2 * m.intermediate, dtype=BF16, device=device)
    gate, up = (half.contiguous() for half in x.chunk(2, 1))

    def error() -> float:
        exact = swiglu.swiglu.__wrapped__(x.double())
        poison(*exact.shape, device=device)
        return off(swiglu.swiglu(x), exact, 2**-7)

    compiled = torch.compile(swiglu.swiglu.__wrapped__, dynamic=False)
    forms: dict[str, Callable[[], Any]] = {
        "kernel": lambda: swiglu.swiglu(x),
        "reference": lambda: swiglu.swiglu.__wrapped__(x),
        "torch.compile": lambda: compiled(x),
        **library("flashinfer", "flashinfer.activation", "silu_and_mul", lambda f: f(x)),
        **library("liger", "liger_kernel.ops.swiglu", "LigerSiLUMulFunction", lambda f: f.apply(gate, up)),
    }
    return Case("swiglu", f"N={n} I={m.intermediate}", x.nbytes * 3 // 2, error, forms)


def rope_case(m: Model, device: torch.device, n: int) -> Case:
    """RoPE and the scatter to the pools, one layer."""
    qkv = torch.randn(n, (m.num_heads + 2 * m.num_kv) * m.head_dim, dtype=BF16, device=device)
    cos, sin = torch.randn(2, n, m.head_dim, dtype=BF16, device=device)
    token = torch.arange(n, device=device)
    place = (token % 64, token // 64 + 100, m.num_heads)
    shape = (2, 64, m.num_kv, 256, m.head_dim)
    k, v = torch.full(shape, NAN, dtype=BF16, device=device)

    def error() -> float:
        k64, v64 = torch.full(shape, NAN, dtype=torch.float64, device=device)
        exact = rope.rope_and_store.__wrapped__(qkv.double(), cos.double(), sin.double(), k64, v64, *place)
        poison(*exact.shape, device=device)
        found = rope.rope_and_store(qkv, cos, sin, k, v, *place)
        return max(off(found, exact, 2**-7), off(k, k64, 2**-7), off(v, v64, 2**-7))

    forms: dict[str, Callable[[], Any]] = {
        "kernel": lambda: rope.rope_and_store(qkv, cos, sin, k, v, *place),
        "reference (eager)": lambda: rope.rope_and_store.__wrapped__(qkv, cos, sin, k, v, *place),
    }
    return Case("rope_and_store", f"N={n} heads={m.num_heads}/{m.num_kv}", 2 * qkv.nbytes, error, forms)


def compaction_case(m: Model, device: torch.device, accepted: int) -> Case:
    """64 rows that each accepted some nodes of a tree, all layers."""
    k, v = torch.randn(2, m.layers, 64, m.num_kv, 512, m.head_dim, dtype=BF16, device=device)
    step = torch.arange(accepted, device=device).repeat(64)
    moves = (torch.arange(64, device=device).repeat_interleave(accepted), 303 + 2 * step, 301 + step)

    def error() -> float:
        ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
        compaction.compact(*ours, *moves)
        compaction.compact.__wrapped__(*theirs, *moves)
        return 0.0 if all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) else float("inf")

    forms: dict[str, Callable[[], Any]] = {
        "kernel": lambda: compaction.compact(k, v, *moves),
        "reference (eager)": lambda: compaction.compact.__wrapped__(k, v, *moves),
    }
    num_bytes = 8 * len(step) * m.layers * m.num_kv * m.head_dim
    return Case("compact", f"64 rows, {accepted} moves, {m.layers} layers", num_bytes, error, forms)


def sample_case(m: Model, device: torch.device, n: int, kind: str) -> Case:
    """Draws of the nodes of 64 trees."""
    logits = 3 * torch.randn(n, m.vocab, dtype=BF16, device=device)
    heat = torch.full((n,), 0.0 if kind == "greedy" else 0.7, device=device)
    threshold = torch.full((n,), -float("inf"), device=device)
    if kind == "top-k 50":
        threshold = (logits.float() / heat[:, None]).topk(50).values[:, -1].contiguous()
    rest = (heat, threshold, *torch.randint(0, 2**32, (2, n), device=device))

    def error() -> float:
        # Two tokens may tie to within the rounding of a logarithm, once in a long while.
        differ = sample.gumbel_argmax(logits, *rest) != sample.gumbel_argmax.__wrapped__(logits, *rest)
        return float(differ.sum()) / 1.5

    forms: dict[str, Callable[[], Any]] = {
        "kernel": lambda: sample.gumbel_argmax(logits, *rest),
        "reference (eager)": lambda: sample.gumbel_argmax.__wrapped__(logits, *rest),
        "argmax alone": lambda: logits.argmax(1),
    }
    if kind == "sampled":
        forms["softmax, multinomial (eager)"] = lambda: torch.multinomial((logits.float() / 0.7).softmax(1), 1)
    return Case("gumbel_argmax", f"N={n} V={m.vocab} {kind}", logits.nbytes, error, forms)


def attend_case(m: Model, device: torch.device, rows: int, context: int, count: int) -> Case:
    """One layer's attention, of chains, which causal libraries can be compared on; a kernel does not know."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    splits, scale, length = attend.num_splits(rows, m.num_kv, num_sms), m.head_dim**-0.5, context + count
    k, v = torch.randn(2, rows, m.num_kv, context + 64, m.head_dim, dtype=BF16, device=device)
    q = torch.randn(rows * count, m.num_heads, m.head_dim, dtype=BF16, device=device)
    slot = torch.arange(rows, device=device)
    row = (slot, slot * count, torch.full_like(slot, count), torch.full_like(slot, context))
    bits = torch.tensor([(2 << t) - 1 for t in range(count)], device=device).repeat(rows)
    position = torch.arange(context, length, device=device).repeat(rows)
    out = torch.empty_like(q)

    def kernel() -> torch.Tensor:
        return attend.tree_attend(q, k, v, *row, bits, scale, count, splits, None, position, out)

    def error() -> float:
        out.fill_(NAN)
        wide = (q.double(), k.double(), v.double())
        return off(kernel(), attend.tree_attend_reference(*wide, *row, bits, scale, None, position), 2**-6)

    mask = torch.zeros(rows, 1, count, length, dtype=BF16, device=device)
    causal = torch.ones(count, count, dtype=torch.bool, device=device).tril()
    mask[..., context:].masked_fill_(~causal, -float("inf"))
    q_RTHD = q.view(rows, count, m.num_heads, m.head_dim)
    q_RHTD = q_RTHD.transpose(1, 2)
    # Heads of a group as further rows, as batchgen_kernels.tree_attention packs them, so that SDPA repeats no keys.
    packed, packed_mask = q_RHTD.reshape(rows, m.num_kv, -1, m.head_dim), mask.repeat(1, 1, m.num_heads // m.num_kv, 1)
    seen = k[:, :, :length], v[:, :, :length]
    lengths = torch.full((rows,), length, dtype=torch.int32, device=device)
    sdpa = functional.scaled_dot_product_attention
    forms: dict[str, Callable[[], Any]] = {
        "kernel": kernel,
        "SDPA, dense mask": lambda: sdpa(q_RHTD, *seen, mask, scale=scale, enable_gqa=True),
        "SDPA, dense mask, packed": lambda: sdpa(packed, *seen, packed_mask, scale=scale),
        **library(
            "flash-attn, a chain",
            "flash_attn",
            "flash_attn_with_kvcache",
            lambda f: f(
                q_RTHD, k.transpose(1, 2), v.transpose(1, 2), cache_seqlens=lengths, softmax_scale=scale, causal=True
            ),
        ),
    }
    num_bytes = 4 * rows * length * m.num_kv * m.head_dim + 2 * q.nbytes
    return Case("tree_attend", f"R={rows} context={context} T={count} splits={splits}", num_bytes, error, forms)


# Decoding passes of 64 and 512 tokens, and a chunk of prompt; full batches, and small ones, which split their columns.
CASES: dict[str, tuple[Callable[..., Case], list[tuple[Any, ...]]]] = {
    "rms_norm": (norm_case, [(64,), (512,), (4096,)]),
    "swiglu": (swiglu_case, [(64,), (512,), (4096,)]),
    "rope_and_store": (rope_case, [(64,), (512,), (4096,)]),
    "compact": (compaction_case, [(1,), (3,), (6,)]),
    "gumbel_argmax": (sample_case, [(64, "greedy"), (64, "sampled"), (256, "sampled"), (256, "top-k 50")]),
    "tree_attend": (
        attend_case,
        [(*at, count) for at in ((64, 512), (64, 1536), (64, 4096), (8, 1536), (1, 4096)) for count in (1, 4, 8, 16)],
    ),
}


def times_us(form: Callable[[], Any], *, graph: bool, repeats: int = 40) -> list[float]:
    """Sorted times of `repeats` runs, each after a flush of the L2 cache."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            form()
    torch.cuda.current_stream().wait_stream(side)
    run = form
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            form()
        run = captured.replay
    event = functools.partial(torch.cuda.Event, enable_timing=True)
    events = [(event(), event()) for _ in range(repeats)]
    for start, stop in events:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return sorted(1000 * start.elapsed_time(stop) for start, stop in events)


def copy_gbps() -> float:
    """Bytes read and written a second, in 1e9, by the copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(times_us(lambda: target.copy_(source), graph=True)) / 1000


def measure(case: Case, copy: float) -> Iterator[dict[str, Any]]:
    """Check the kernel, then time every form."""
    error = case.error()
    if not error <= 1:
        sys.exit(f"{case.op} {case.shape}: the kernel is wrong, {error:.3g} times the error that is allowed")
    for name, form in case.forms.items():
        times = times_us(form, graph="eager" not in name)
        us = statistics.median(times)
        gbps = case.num_bytes / us / 1000
        yield {
            "op": case.op,
            "shape": case.shape,
            "form": name,
            "us": round(us, 2),
            "p10_us": round(times[len(times) // 10], 2),
            "p90_us": round(times[-1 - len(times) // 10], 2),
            "gbps": round(gbps, 1),
            "of_copy": round(gbps / copy, 3),
            "error_of_allowed": round(error, 3),
        }


def facts() -> dict[str, Any]:
    """What the numbers were measured on."""
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in ("torch", "triton", "flash_attn", "flashinfer-python", "liger_kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return {"device": torch.cuda.get_device_name(), "date": date, "versions": versions}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write device, versions, date and all rows to this file")
    parser.add_argument("--only", choices=CASES, action="append", help="these operations (may be repeated)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.py times GPU kernels and finds no CUDA device; `pytest tests/kernels` runs them on a CPU")
    torch.manual_seed(0)
    device = torch.device("cuda")
    tiny = torch.zeros(1, device=device)
    floor = statistics.median(times_us(lambda: tiny.add_(1), graph=True))
    copy = copy_gbps()
    report = {**facts(), "floor_us": round(floor, 2), "copy_gbps": round(copy, 1)}
    print(*(f"{name}: {value}" for name, value in report.items()), sep="\n")
    rows = []
    for model in MODELS:
        print(f"\n{model.name}")
        for op in options.only or CASES:
            make, shapes = CASES[op]
            for shape in shapes:
                for row in measure(make(model, device, *shape), copy):
                    rows.append({"model": model.name, **row})
                    print(
                        "{op:15} {shape:40} {form:30} {us:10.1f} us {gbps:8.0f} GB/s {of_copy:6.1%} of copy".format(
                            **row
                        )
                    )
    if options.json:
        options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
