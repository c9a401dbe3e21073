"""Prompts on the Hugging Face Hub (hf://): read as they are now, through faults, or clearly refused.

Each test asks a server on loopback from a process of its own: huggingface_hub reads HF_HUB_OFFLINE when it is imported.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
import yaml
from faultproxy import Fault, FaultProxy
from hub import Hub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATASET = "hf://datasets/acme/prompts"


def parquet(*prompts: str) -> bytes:
    sink = io.BytesIO()
    pl.DataFrame({"prompt": prompts}).write_parquet(sink)
    return sink.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {"README.md": b"words", "data/a.parquet": parquet("One?", "Two?"), "data/b.parquet": parquet("Three?")}
    with Hub({"datasets/acme/prompts": files, "datasets/acme/gated": {}}).serve() as server:
        yield server


def job_file(folder: Path, path: str, endpoint: str) -> Path:
    sections: dict[str, Any] = {
        "input": {"path": path, "prompt": "prompt", "storage_options": {"endpoint": endpoint}},
        "engine": {"kind": "rehearsal"},
        "model": {"target": "demo:smollm2-135m"},
        "output": {"path": str(folder / "out")},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def batchgen(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "batchgen", *arguments]
    online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(command, env=os.environ | online | env, capture_output=True, text=True, check=False)


def rows(folder: Path) -> list[str]:
    return pl.read_parquet(folder / "out/*.parquet")["row_id"].to_list()


@pytest.mark.parametrize("path", ["/data", "/data/*.parquet", "@main/**/*.parquet"])
def test_a_dataset_is_an_input_whatever_its_storage_does(tmp_path: Path, hub: Hub, path: str) -> None:
    proxy = FaultProxy(hub.url)
    proxy.faults = [
        Fault("GET /api/datasets", "status", status=503),
        Fault("GET /api/datasets/.*tree", "reset"),
        Fault("GET /datasets/.*a.parquet", "status", status=429),
        Fault("GET /datasets/.*a.parquet", "truncate"),
        Fault("GET /datasets/.*b.parquet", "reset"),
    ]
    with proxy.serve():
        done = batchgen("submit", str(job_file(tmp_path, DATASET + path, proxy.url)))
    assert done.returncode == 0, done.stderr
    assert [fault.times for fault in proxy.faults] == [0] * 5
    assert done.stderr.count("trying again") >= 3
    below = "data/" if path.startswith("@") else ""
    assert rows(tmp_path) == [f"{below}a.parquet#0", f"{below}a.parquet#1", f"{below}b.parquet#0"]


def test_the_next_submit_does_what_is_new_and_no_other_version_of_what_was_done(tmp_path: Path, hub: Hub) -> None:
    files, job = hub.repositories["datasets/acme/prompts"], str(job_file(tmp_path, f"{DATASET}/data", hub.url))
    assert batchgen("submit", job).returncode == 0
    files["data/c.parquet"] = parquet("Four?")
    assert batchgen("submit", job).returncode == 0
    assert rows(tmp_path) == ["a.parquet#0", "a.parquet#1", "b.parquet#0", "c.parquet#0"]
    files["data/a.parquet"] = parquet("One!", "Two!")
    changed = batchgen("submit", job)
    assert changed.returncode == 73
    assert re.search(r"holds rows 0-2 of hf://datasets/acme/prompts/data/a.parquet, which has changed", changed.stderr)


@pytest.mark.parametrize(
    ("path", "expected", "code"),
    [
        ("hf://datasets/acme/nothing", "no such repository or revision, or not for you: set HF_TOKEN", 1),
        ("hf://datasets/acme/gated/data", "no such repository or revision, or not for you: set HF_TOKEN", 1),
        ("hf://datasets/acme/prompts@v2", "no such repository or revision", 1),
        (f"{DATASET}/more", f"no Parquet file at {DATASET}/more", 2),
    ],
)
def test_what_the_hub_does_not_give_is_said(tmp_path: Path, hub: Hub, path: str, expected: str, code: int) -> None:
    done = batchgen("plan", str(job_file(tmp_path, path, hub.url)))
    assert (done.returncode, expected in done.stderr) == (code, True), done.stderr


def test_offline_is_said_at_once(tmp_path: Path, hub: Hub) -> None:
    done = batchgen("plan", str(job_file(tmp_path, DATASET, hub.url)), HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert hub.url not in done.stderr


def test_output_on_the_hub_is_refused(tmp_path: Path, hub: Hub) -> None:
    job = job_file(tmp_path, DATASET, hub.url)
    done = batchgen("submit", str(job), "--set", "output.path=hf://datasets/acme/out")
    assert "output.path: rows are safe only where a create is atomic" in done.stderr
    assert done.returncode == 2
