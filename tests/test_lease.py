"""One run per output: by processes that live, are killed, stopped past their lease and woken, and that race."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from faultproxy import Fault

from batchgen.errors import CorruptOutputError, DrainedError, LeaseHeldError, LeaseLostError
from batchgen.lease import Lease, verify
from batchgen.store import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faultproxy import FaultProxy

Anywhere = tuple[str, dict[str, Any]]

TTL_S = 2.0
# Holds a lease, says so, and goes on until it is killed or finds that it lost it.
HOLDER = """
import json, sys, time
from batchgen.errors import LeaseLostError
from batchgen.lease import Lease
from batchgen.store import connect
folder, options, ttl_s = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
with Lease.take(connect(folder, options), folder, ttl_s=ttl_s) as lease:
    print(lease.epoch, flush=True)
    while True:
        time.sleep(0.05)
        lease.check()
"""


@contextlib.contextmanager
def holder(anywhere: Anywhere, ttl_s: float = TTL_S) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the folder's lease, and its epoch."""
    folder, options = anywhere
    command = [sys.executable, "-c", HOLDER, folder, json.dumps(options), str(ttl_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_epochs_grow_and_what_is_released_is_free_at_once(anywhere: Anywhere) -> None:
    folder, options = anywhere
    store = connect(folder, options)
    for epoch in (1, 2, 3):
        began = time.monotonic()
        with Lease.take(store, folder, ttl_s=60) as lease:
            assert lease.epoch == epoch
            lease.check()
            verify(store, folder, epoch)
        assert time.monotonic() - began < 30
    with Lease.take(store, folder, ttl_s=60), pytest.raises(LeaseLostError, match="taken over by process"):
        verify(store, folder, 3)


def test_a_holder_that_lives_is_not_taken_over(anywhere: Anywhere) -> None:
    store = connect(*anywhere)
    store.find(anywhere[0])  # a client of S3 takes its time to start
    with holder(anywhere, ttl_s=12) as (process, _):
        began = time.monotonic()
        with pytest.raises(LeaseHeldError, match=rf"held by process {process.pid} on .*, since 20\d\d-"):
            Lease.take(store, anywhere[0], ttl_s=12)
        assert time.monotonic() - began < 12, "seen by its first beat"


def test_a_killed_process_of_this_machine_is_taken_over_at_once(anywhere: Anywhere) -> None:
    store = connect(*anywhere)
    with holder(anywhere, ttl_s=60) as (process, epoch):
        process.kill()
        process.wait()
        began = time.monotonic()
        with Lease.take(store, anywhere[0], ttl_s=60) as lease:
            assert time.monotonic() - began < 30, "waited for the dead process' time to run out"
            assert lease.epoch == epoch + 1


def test_a_killed_process_of_another_machine_is_taken_over_after_its_time(tmp_path) -> None:
    store, folder = connect(str(tmp_path)), str(tmp_path)
    with holder((folder, {})) as (process, _):
        process.kill()
        process.wait()
    url = f"{folder}/__batchgen/lease.json"
    store.put(url, json.dumps(json.loads(store.read(url)) | {"process": "another-boot pid:[1] 7 7"}).encode())
    began = time.monotonic()
    with Lease.take(store, folder, ttl_s=TTL_S) as lease:
        assert time.monotonic() - began >= TTL_S
        assert lease.epoch == 2


def test_who_stood_still_is_taken_over_and_writes_no_more_when_it_wakes(anywhere: Anywhere) -> None:
    store = connect(*anywhere)
    with holder(anywhere) as (process, epoch):
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with Lease.take(store, anywhere[0], ttl_s=TTL_S) as lease:
            assert time.monotonic() - began >= TTL_S
            assert lease.epoch == epoch + 1
            with pytest.raises(LeaseLostError):
                verify(store, anywhere[0], epoch)
            process.send_signal(signal.SIGCONT)
            _, err = process.communicate(timeout=30)
            assert process.returncode != 0
            assert "LeaseLostError" in err
            time.sleep(TTL_S / 2)
            lease.check()
            verify(store, anywhere[0], lease.epoch)


def test_of_many_takers_one_wins(anywhere: Anywhere) -> None:
    with Lease.take(connect(*anywhere), anywhere[0], ttl_s=TTL_S):
        pass
    ready, over = threading.Barrier(8), threading.Event()

    def take(_: int) -> int:
        store = connect(*anywhere)
        ready.wait()
        try:
            with Lease.take(store, anywhere[0], ttl_s=TTL_S) as lease:
                over.wait(60)
                return lease.epoch
        except LeaseHeldError:
            return 0
        finally:
            losers.append(1)
            if len(losers) == 7:
                over.set()

    losers: list[int] = []
    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(take, range(8))) == [0] * 7 + [2]


def test_waiting_for_a_sign_of_life_can_be_broken_off(tmp_path) -> None:
    store, folder = connect(str(tmp_path)), str(tmp_path)
    with holder((folder, {})) as (process, _):
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(DrainedError, match="nothing was begun"):
            Lease.take(store, folder, ttl_s=TTL_S, draining=lambda: True)


@pytest.mark.parametrize("status", [503, None])
def test_who_lost_only_the_answer_still_holds_it(gcs_folder: Anywhere, faults: FaultProxy, status: int | None) -> None:
    folder, _ = gcs_folder
    store = connect(folder, {"endpoint_url": faults.url})
    faults.faults = [Fault("^POST", "applied", status=status)]
    with Lease.take(store, folder, ttl_s=TTL_S) as lease:
        faults.faults = [Fault("^POST", "applied", times=2, status=status)]
        time.sleep(TTL_S * 2)
        assert faults.faults[0].times == 0, "beats met the faults"
        lease.check()
        verify(store, folder, 1)
    assert json.loads(store.read(f"{folder}/__batchgen/lease.json"))["released"]


def test_a_store_that_fails_for_a_while_costs_no_lease(gcs_folder: Anywhere, faults: FaultProxy) -> None:
    """Longer than the lease lasts, for the holder and for one who waits for it."""
    folder, _ = gcs_folder
    store = connect(folder, {"endpoint_url": faults.url})
    with Lease.take(store, folder, ttl_s=TTL_S) as lease, ThreadPoolExecutor(1) as thread:
        faults.faults = [Fault("", "status", times=10_000)]
        other = thread.submit(Lease.take, connect(folder, {"endpoint_url": faults.url}), folder, ttl_s=TTL_S)
        time.sleep(2 * TTL_S)
        lease.check()
        faults.faults = []
        with pytest.raises(LeaseHeldError):
            other.result(60)
        lease.check()
        verify(store, folder, 1)


def test_what_is_no_lease_is_named(tmp_path) -> None:
    store, folder = connect(str(tmp_path)), str(tmp_path)
    store.put(f"{folder}/__batchgen/lease.json", b"{}")
    with pytest.raises(CorruptOutputError, match=r"lease\.json: not a lease as batchgen writes it .*; remove it"):
        Lease.take(store, folder, ttl_s=TTL_S)
