"""Storage that fails: what is outlived, what is given up, and what is said."""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from faultproxy import Fault, FaultProxy

from batchgen.errors import StoreError
from batchgen.store import Store, connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Anywhere = tuple[str, dict[str, Any]]

UPLOAD = r"^POST /upload/"
DOWNLOAD = r"^GET /download/"


@pytest.fixture
def faulty(faults: FaultProxy, gcs_folder: Anywhere) -> tuple[str, Store]:
    """A fresh folder behind the fault proxy, and a store that gives up after a few seconds."""
    store = connect(gcs_folder[0], {"endpoint_url": faults.url})
    store.budget_s = 20.0
    return gcs_folder[0], store


@pytest.mark.parametrize(
    ("verb", "fault"),
    [
        ("put", Fault(UPLOAD, "status", times=2)),
        ("put", Fault(UPLOAD, "applied", status=None)),
        ("create", Fault(UPLOAD, "status", times=2)),
        ("create", Fault(UPLOAD, "status", status=429)),
        ("create", Fault(UPLOAD, "status", status=408)),
        ("create", Fault(UPLOAD, "status", status=502)),  # gcsfs makes a requests.ProxyError of it
        (
            "create",
            Fault(UPLOAD, "status", status=400, body=b'{"error": {"message": "Provided MD5 hash \\"x\\" ..."}}'),
        ),
        ("create", Fault(UPLOAD, "reset", times=2)),
        ("create", Fault(UPLOAD, "applied")),
        ("create", Fault(UPLOAD, "applied", status=None)),
        ("create", Fault(UPLOAD, "truncate")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.do}-{value.status}",
)
def test_a_write_outlives_faults(faulty: tuple[str, Store], faults: FaultProxy, verb: str, fault: Fault) -> None:
    folder, store = faulty
    faults.faults = [dataclasses.replace(fault)]
    assert getattr(store, verb)(f"{folder}/x", b"mine") is {"put": None, "create": True}[verb]
    assert faults.faults[0].times == 0, "the fault did not happen"
    assert store.retries == fault.times
    assert store.read(f"{folder}/x") == b"mine"


@pytest.mark.parametrize("do", ["status", "reset", "truncate"])
def test_reads_and_listings_outlive_faults(faulty: tuple[str, Store], faults: FaultProxy, do: Any) -> None:
    folder, store = faulty
    for i in range(3):
        store.put(f"{folder}/{i}", b"0123456789")
    listing = r"^GET /storage/v1/b/batchgen-tests/o"

    def after(match: str, times: int = 1) -> None:
        assert sum(fault.times for fault in faults.faults) == 0
        faults.faults = [Fault(match, do, times=times)]

    after(DOWNLOAD, 2)
    assert store.read(f"{folder}/0") == b"0123456789"
    after(listing)
    assert len(store.find(folder)) == 3
    after(listing)
    assert len(store.find(folder, recursive=False)) == 3
    after(listing)
    assert len(store.glob(f"{folder}/*")) == 3
    after(f"{listing}/")  # gcsfs asks for the object and for a folder at once, and needs no answer to the latter
    assert store.info(f"{folder}/0").size_bytes == 10
    after(DOWNLOAD)
    assert store.tails(list(store.find(folder).values()), 4) == [b"6789"] * 3
    after(DOWNLOAD)
    with store.open(f"{folder}/2") as file:
        assert file.read(5) == b"01234"
    after("^DELETE")
    store.delete([f"{folder}/0", f"{folder}/1"])
    assert list(store.find(folder)) == [f"{folder}/2"]
    # aiohttp itself repeats a GET, once, when a connection that it had kept open turns out to be closed.
    # So it does where the close of a cut answer overtakes its headers.
    assert store.retries == 9 or (do != "status" and 0 < store.retries < 9)


def test_a_create_that_lost_its_answer_and_then_the_race_is_not_told_it_won(
    faulty: tuple[str, Store], faults: FaultProxy
) -> None:
    folder, store = faulty
    store.put(f"{folder}/x", b"theirs")
    faults.faults = [Fault(UPLOAD, "reset")]
    assert not store.create(f"{folder}/x", b"mine")


def test_many_deletes_of_which_some_always_fail_come_to_an_end(faulty: tuple[str, Store], faults: FaultProxy) -> None:
    folder, store = faulty
    for i in range(40):
        store.create(f"{folder}/{i}", b"x")
    faults.faults = [Fault("^DELETE", "reset", skip=5 * i) for i in range(1000)]
    store.remove(folder)
    assert store.find(folder) == {}


def test_a_delete_that_was_applied_is_not_missed(faulty: tuple[str, Store], faults: FaultProxy) -> None:
    folder, store = faulty
    store.put(f"{folder}/x", b"")
    faults.faults = [Fault("^DELETE", "applied")]
    store.delete([f"{folder}/x"])
    assert store.find(folder) == {}


@pytest.mark.parametrize(
    ("verb", "do", "cause"),
    [
        ("put", "status", "HTTP 503"),
        ("create", "status", "HTTP 503"),
        ("read", "status", "HTTP 503"),
        ("find", "status", "HTTP 503"),
        ("info", "status", "HTTP 503"),
        ("create", "reset", "ClientOSError|ServerDisconnected"),
        ("read", "reset", "ClientOSError|ServerDisconnected"),
    ],
)
def test_storage_that_stays_down_is_an_error_within_the_budget(  # pytest passes by name
    faulty: tuple[str, Store], faults: FaultProxy, caplog: pytest.LogCaptureFixture, verb: str, do: Any, cause: str
) -> None:
    folder, store = faulty
    faults.faults = [Fault(".", do, times=10**6)]
    store.budget_s, start = 0.8, time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(StoreError, match=rf"^{verb} {folder}/x: .*({cause}).*; gave up after \d+ tries in [01] s$"),
    ):
        getattr(store, verb)(f"{folder}/x", *([b"data"] if verb in {"put", "create"} else []))
    assert time.monotonic() - start < 2
    assert store.retries == len(caplog.records) > 0
    assert {record.name for record in caplog.records} == {"batchgen.store"}
    assert caplog.messages[0].startswith(f"{verb} {folder}/x: ")


def test_a_server_that_never_answers_is_given_up(faulty: tuple[str, Store], faults: FaultProxy) -> None:
    folder, store = faulty
    store.put(f"{folder}/x", b"1")
    faults.faults = [Fault(DOWNLOAD, "delay", times=10, delay_s=3)]
    store.budget_s = 1.0
    with pytest.raises(StoreError, match=r"FSTimeoutError"):
        store.read(f"{folder}/x")


@pytest.mark.parametrize("verb", ["put", "read"])
@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refusal_is_one_line_at_once(faulty: tuple[str, Store], faults: FaultProxy, verb: str, status: int) -> None:
    folder, store = faulty
    message = b'{"error": {"message": "robot@acme lacks storage.objects.create"}}'
    faults.faults = [Fault(".", "status", times=9, status=status, body=message)]
    with pytest.raises(StoreError, match=rf"^{verb} {folder}/x: .*robot@acme lacks storage\.objects\.create.*$"):
        getattr(store, verb)(f"{folder}/x", *([b""] if verb == "put" else []))
    assert store.retries == 0


S3_DENIES = b"<Error><Code>AccessDenied</Code><Message>me is not authorized to perform: s3:PutObject</Message></Error>"


@pytest.fixture
def on_s3(s3: dict[str, Any]) -> Iterator[tuple[str, Store, FaultProxy]]:
    """A fresh folder behind a fault proxy before a server that speaks S3."""
    with FaultProxy(s3["endpoint_url"]).serve() as proxy:
        folder = f"s3://batchgen-tests/{uuid.uuid4().hex}"
        store = connect(folder, s3 | {"endpoint_url": proxy.url})
        store.budget_s = 20.0
        yield folder, store, proxy


@pytest.mark.parametrize(
    "fault",
    [
        Fault("", "status", times=2),
        Fault("", "status", status=500),
        Fault("", "status", status=429),
        Fault("", "status", status=408),
        Fault("", "reset"),
        Fault("", "applied"),
        Fault("", "applied", status=None),
        Fault("", "truncate"),
    ],
    ids=lambda fault: f"{fault.do}-{fault.status}",
)
def test_s3_is_asked_again_and_each_time_is_counted(on_s3: tuple[str, Store, FaultProxy], fault: Fault) -> None:
    """The libraries below would repeat by themselves, unseen."""
    folder, store, proxy = on_s3
    answers = {"create": (b"mine",), "swap": (b"mine", b"new"), "read": (), "info": (), "find": ()}
    for verb, more in answers.items():
        url = folder if verb == "find" else f"{folder}/x"
        proxy.faults = [dataclasses.replace(fault)]
        before = store.retries
        answer = getattr(store, verb)(url, *more)
        assert proxy.faults[0].times == 0, f"{verb}: the fault did not happen"
        # aiohttp repeats, once, what met a closed connection; an answer without a body cannot be cut.
        assert store.retries - before == fault.times or fault.do in {"reset", "truncate"} or fault.status is None, verb
        assert answer in (True, b"new", store.info(f"{folder}/x"), {f"{folder}/x": store.info(f"{folder}/x")}), verb


def test_s3_that_has_another_write_under_way_is_asked_again(on_s3: tuple[str, Store, FaultProxy]) -> None:
    """As it is where an answer was lost and the request repeated before the first one was through."""
    folder, store, proxy = on_s3
    for status, code in ((409, "ConditionalRequestConflict"), (400, "RequestTimeout"), (400, "BadDigest")):
        body = f"<Error><Code>{code}</Code><Message>again</Message></Error>".encode()
        proxy.faults = [Fault("PUT", "status", status=status, body=body)]
        assert store.create(f"{folder}/{code}", b"mine")
    assert store.retries == 3


@pytest.mark.parametrize(("status", "expected"), [(403, "not authorized|Forbidden"), (401, "HTTP 401")])
def test_s3_that_refuses_is_not_asked_again(on_s3: tuple[str, Store, FaultProxy], status: int, expected: str) -> None:
    folder, store, proxy = on_s3
    proxy.faults = [Fault("", "status", times=9, status=status, body=S3_DENIES)]
    for verb, more in {"put": (b"",), "read": ()}.items():
        with pytest.raises(StoreError, match=rf"^{verb} {folder}/x: .*({expected})"):
            getattr(store, verb)(f"{folder}/x", *more)
    assert store.retries == 0


def test_s3_without_credentials_says_so(
    on_s3: tuple[str, Store, FaultProxy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    folder, _, proxy = on_s3
    with pytest.raises(StoreError, match="Unable to locate credentials"):
        connect(folder, {"endpoint_url": proxy.url}).read(f"{folder}/x")
