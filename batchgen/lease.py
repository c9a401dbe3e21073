"""One run per output folder: a record in the store that its holder keeps changing while it lives.

Clocks are not compared. Who wants the lease watches the record on his own monotonic clock: one that changes has a live
holder, one that stands still for its `ttl_s`, is released, or names a dead process of this very machine may be taken
over by compare-and-swap, so by one taker only. `epoch` grows with each holder and never begins anew, because the record
is released, not removed. It fences: journal claims and parts carry it, and a worker that was stopped past the lease's
end and wakes up finds another epoch before it claims or commits (`verify`). What slips between that look and the write
meets create-only parts. Tried with kill -9 and SIGSTOP on GCS, S3 and disk.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Self

from batchgen.errors import (
    BatchgenError,
    CorruptOutputError,
    DrainedError,
    LeaseHeldError,
    LeaseLostError,
    StoreError,
)
from batchgen.store import STATE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from batchgen.store import Store

log = logging.getLogger("batchgen.lease")

# GCS takes about one write a second of one object; a holder that lives is seen to within 4 s.
BEATS_PER_TTL = 6
_POLL_S = 0.5


class _GoneError(StoreError):
    """There is no record where there was one."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Record:
    """What is stored. `nonce` makes every beat's bytes its own; `since` is for people."""

    holder: str
    process: str
    epoch: int
    since: str
    ttl_s: float
    released: bool = False
    nonce: str = ""

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self) | {"nonce": uuid.uuid4().hex}, indent=1).encode()

    @property
    def who(self) -> str:
        return f"{self.holder}, since {self.since}"


class Lease:
    """The right to write to one output folder, from `take` to the end of the `with` block; beats on its own thread."""

    def __init__(self, store: Store, url: str, record: _Record, data: bytes) -> None:
        # A beat has to be over before the next: what one could not do, the next one tries again.
        self._store = dataclasses.replace(store, budget_s=record.ttl_s / BEATS_PER_TTL, retries=0)
        self._patience_s = store.budget_s
        self._url, self._record, self._data = url, record, data
        self._error: Exception | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, store: Store, output_url: str, *, ttl_s: float, draining: Callable[[], bool] = lambda: False) -> Self:
        """Take the folder's lease; waits up to the last holder's `ttl_s` for a sign of life.

        Raises:
            LeaseHeldError: another run holds it.
            DrainedError: `draining` became true while waiting.
        """
        url = _url(output_url)
        while True:
            old, before = _read(store, url)
            if before and not before.released and not _gone(before):
                _watch(store, url, old, before, draining)
            record = _Record(
                holder=f"process {os.getpid()} on {platform.node() or 'a machine without a name'}",
                process=_process(os.getpid()),
                epoch=before.epoch + 1 if before else 1,
                since=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                ttl_s=ttl_s,
            )
            data = record.to_json()
            if store.swap(url, old, data) if before else store.create(url, data):
                if before and not before.released:
                    log.info("took over from %s: it gave no sign of life", before.who)
                return cls(store, url, record, data)

    @property
    def epoch(self) -> int:
        """Grows with every holder; what this one writes carries it."""
        return self._record.epoch

    @property
    def retries(self) -> int:
        """Requests that beats repeated."""
        return self._store.retries

    def check(self) -> None:
        """Nothing, while the lease is held as far as this process knows.

        Raises:
            LeaseLostError: another run took over.
            StoreError: the store could not be told for minutes that this run lives, or the record is gone.
        """
        if self._error is not None:
            raise self._error

    def _beat_on(self) -> None:
        told, data = time.monotonic(), self._record.to_json()
        while not self._over.wait(self._record.ttl_s / BEATS_PER_TTL):
            try:
                # With the same bytes until they are there: a beat that arrived and was not answered is known again.
                self._swap(data)
            except StoreError as error:
                if isinstance(error, _GoneError) or time.monotonic() - told > self._patience_s:
                    self._error = error
                    return
            except Exception as error:  # noqa: BLE001  # `check` raises it
                self._error = error
                return
            else:
                told, data = time.monotonic(), self._record.to_json()

    def _swap(self, data: bytes) -> None:
        if not self._store.swap(self._url, self._data, data):
            raise _taken(_read(self._store, self._url)[1], self._url)
        self._data = data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(self._record.ttl_s)
        # One that storage failed, or that others hold by now, is not ours to give back.
        if self._error or isinstance(error, StoreError) or self._thread.is_alive():
            return
        try:
            self._swap(dataclasses.replace(self._record, released=True).to_json())
        except BatchgenError as failed:
            log.warning("the lease could not be given back; the next run may have to wait: %s", failed)


def verify(store: Store, output_url: str, epoch: int) -> None:
    """See that `epoch` is still the lease's, before something final is written under it.

    Raises:
        LeaseLostError: another run took over.
        StoreError: the record is gone.
    """
    url = _url(output_url)
    _, record = _read(store, url)
    if record is None or record.epoch != epoch:
        raise _taken(record, url)


def _url(output_url: str) -> str:
    return f"{output_url.rstrip('/')}/{STATE_FOLDER}/lease.json"


def _read(store: Store, url: str) -> tuple[bytes, _Record | None]:
    try:
        data = store.read(url)
    except FileNotFoundError:
        return b"", None
    try:
        return data, _Record(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise CorruptOutputError(f"{url}: not a lease as batchgen writes it ({error}); remove it") from error


def _watch(store: Store, url: str, old: bytes, before: _Record, draining: Callable[[], bool]) -> None:
    """Return once the record stood still for its time, or was released."""
    seen = time.monotonic()
    while (left := seen + before.ttl_s - time.monotonic()) > 0:
        if draining():
            raise DrainedError(f"drained while waiting for {before.who} to show whether it lives; nothing was begun")
        time.sleep(min(_POLL_S, left))
        asked = time.monotonic()
        now, record = _read(store, url)
        if record is None or record.released:
            return
        if now != old:
            raise LeaseHeldError(f"{url}: held by {record.who}; run the same command again when that one has ended")
        if time.monotonic() - asked > before.ttl_s / BEATS_PER_TTL:
            seen = time.monotonic()  # storage is slow for the holder, too


def _taken(record: _Record | None, url: str) -> BatchgenError:
    """What to say of a lease that is not ours; one that is gone was taken by no run, but by somebody who tidied up."""
    if record is None:
        return _GoneError(f"{url}: is gone, removed by somebody, maybe with its bucket; this run writes no more")
    return LeaseLostError(f"{url}: taken over by {record.who}; this run writes no more")


def _process(pid: int) -> str:
    """A name that no other process has: of another machine, another container, or of this number before or after."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Behind the command in parentheses: the state, and as the 22nd field when it started, in ticks since boot.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        dead = state in {"Z", "X"}  # killed, and its parent did not ask for it yet
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} {pid} {'dead' if dead else fields[18]}"
    except OSError:
        return ""


def _gone(record: _Record) -> bool:
    """Whether the holder was a process of this machine and container, and is no more."""
    *here, pid, _ = record.process.split() or ["", ""]
    if not here or here != _process(os.getpid()).split()[:2]:
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, which may have this number after it
        pass
    found = _process(int(pid))  # empty where /proc hides other users' processes
    return found not in {"", record.process}
