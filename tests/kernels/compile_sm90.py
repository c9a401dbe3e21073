"""Compile every kernel for an H100, on any machine, and print what each takes of it, one JSON object a line.

Launches are made on CPU tensors, for the arguments' types and divisibility; a driver that only names the target stands
in for the GPU's, and every launch stops after compiling. Run by test_compile.py, in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from batchgen_kernels import (
    triton_attend,
    triton_compaction,
    triton_norm,
    triton_rope,
    triton_sample,
    triton_swiglu,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
launch = JITFunction.run
compiled = {}


class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    compiled[kernel.hash] = self.__name__, kernel
    return kernel


def resources(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", text)[1]),
        "shared_bytes": kernel.metadata.shared,
        "tensor_cores": bool(re.search(r"wgmma|mma\.sync", kernel.asm["ptx"])),
    }


def b(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def i(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def attend(heads, num_kv, head_dim, max_count, splits, window):
    rows, tokens = 8, 8 * max_count
    q, pool = b(tokens, heads, head_dim), b(8, num_kv, 512, head_dim)
    r, n = i(rows), i(tokens)
    triton_attend.tree_attend(
        q, pool, pool, r, r, r, r, n, 0.1, max_count, splits, window, n, torch.empty_like(q)
    )  # fmt: skip


def main():
    driver.set_active(Hopper())
    JITFunction.run = compile_only
    # Llama-3.1-8B, at 64 tokens.
    triton_norm.rms_norm(b(64, 4096), b(4096), 1e-5, b(64, 4096), None)
    triton_norm.rms_norm(b(64, 48, 128)[:, :32], b(128), 1e-5, None, None)
    triton_swiglu.swiglu(b(64, 2 * 14336))
    triton_rope.rope_and_store(
        b(64, 48 * 128), b(64, 128), b(64, 128), b(8, 8, 9, 128), b(8, 8, 9, 128), i(64), i(64), 32
    )
    triton_compaction.compact(b(32, 8, 8, 9, 128), b(32, 8, 8, 9, 128), i(64), i(64), i(64))
    triton_sample.gumbel_argmax(b(64, 128256), torch.empty(64), torch.empty(64), i(64), i(64))
    for max_count, splits in ((1, 1), (4, 3), (16, 1), (64, 1)):
        attend(32, 8, 128, max_count, splits, None)
    # SmolLM2-135M, and one token: arguments of 1 become constants of the program.
    attend(9, 3, 64, 8, 1, 4096)
    triton_attend.tree_attend(
        b(1, 9, 64),
        b(8, 3, 512, 64),
        b(8, 3, 512, 64),
        i(1),
        i(1),
        i(1),
        i(1),
        i(1),
        0.1,
        1,
        4,
        None,
        i(1),
        b(1, 9, 64),
    )
    triton_compaction.compact(b(30, 8, 1, 9, 64), b(30, 8, 1, 9, 64), i(1), i(1), i(1))
    triton_sample.gumbel_argmax(b(1, 49152), torch.empty(1), torch.empty(1), i(1), i(1))
    for name, kernel in compiled.values():
        print(json.dumps({"kernel": name, **resources(kernel)}))  # noqa: T201


if __name__ == "__main__":
    main()
