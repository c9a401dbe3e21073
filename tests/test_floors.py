"""Imports only go down. This table is the architecture; the README's picture is drawn from it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {"batchgen_kernels"},
    {"errors", "locate", "urls"},
    {"rules", "record", "filesystems", "hub", "models", "provenance", "speculation"},
    {"spec", "store"},
    {"claim", "columns", "pii"},
    {"plan", "read", "screen", "render", "generate", "journal", "write", "lease", "tally"},
    {"engines", "dedupe", "ownership"},
    {"acceptance", "attempt", "desk", "report", "status"},
    {"worker"},
    {"actors"},
    {"cluster"},
    {"job"},
    {"features", "clean", "survey"},
    {"export"},
    {"terminal"},
    {"cli"},
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}

# What only some rooms may import. Engines, speculation and kernels must run where there is torch and little else.
BARE = {"torch", "transformers", "triton", "safetensors", "numpy", "batchgen_kernels"}
ONLY_IN = {
    "torch": {"engines", "export", "features", "batchgen_kernels", "models", "provenance"},
    "triton": {"batchgen_kernels"},
    "vllm": {"engines"},
    "ray": {"actors", "cluster"},
    "transformers": {"engines", "models", "render"},
    "pydantic": {"spec"},
    "fsspec": {"store", "filesystems"},
    "gcsfs": {"filesystems"},
    "click": {"cli"},
    "rich": {"terminal"},
}


def modules() -> list[Path]:
    return sorted([*ROOT.glob("batchgen/**/*.py"), *ROOT.glob("kernels/batchgen_kernels/**/*.py")])


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "batchgen_kernels" if parts[0] == "kernels" else parts[1]


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, those for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "batchgen":
            there = parts[1]
            if there not in (here, "__version__"):
                assert FLOOR[there] < FLOOR[here], f"{path.name} (floor {FLOOR[here]}) imports {name}"
        elif parts[0] == "batchgen_kernels":
            assert here in ("engines", "batchgen_kernels"), f"{path.name} imports {name}"
        elif parts[0] in ONLY_IN:
            assert here in ONLY_IN[parts[0]], f"{path.name} imports {parts[0]}"


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if room(p) in ("speculation", "batchgen_kernels") or "engines/torch" in p.as_posix()],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_engine_and_kernels_need_torch_and_little_else(path):
    ours = {"batchgen.errors", "batchgen.generate", "batchgen.record", "batchgen.engines", "batchgen.speculation"}
    for name in imported(path):
        top = name.split(".")[0]
        assert top in BARE | sys.stdlib_module_names or ".".join(name.split(".")[:2]) in ours, (
            f"{path.name} imports {name}"
        )


def loaded(statement: str, *, without: tuple[str, ...] = ()) -> set[str]:
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    code = f"import sys; {blocked}{statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_the_command_line_starts_without_anything_heavy():
    assert not loaded("import batchgen.cli") & {"torch", "ray", "transformers", "vllm", "pyarrow", "fsspec", "gcsfs"}


def test_planning_modules_load_no_torch():
    assert not loaded("import batchgen.job") & {"torch", "ray", "transformers", "vllm"}


def test_the_torch_engine_runs_without_our_other_dependencies():
    loaded(
        "import batchgen.engines.torch.engine",
        without=("pyarrow", "polars", "pydantic", "fsspec", "gcsfs", "click", "rich", "tenacity", "platformdirs"),
    )


def test_no_room_is_called_a_junk_drawer():
    assert not {p.stem for p in modules()} & {"utils", "util", "helpers", "helper", "common", "base", "misc", "manager"}
