"""Object storage: every table, journal segment, part and report is read and written through a `Store`, by full URL.

Three verbs write, each in one atomic operation: `put` replaces, `create` refuses to replace, `swap` replaces what it
knows; a reader sees the whole object or none. There is no writable stream: an exception inside `with fs.open(url,
"wb")` publishes a truncated file on GCS, S3 and disk alike. Output on storage without an atomic create (hf://, http://)
is refused. Every verb is repeated on transient faults for `budget_s` in all, here and nowhere below, so that each retry
is counted and logged (storage options never are). What is not there is a `FileNotFoundError` from `read`, `info`,
`open` and `tails`; any other failure is a `StoreError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import importlib.util
import io
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import fsspec
import tenacity
from fsspec.asyn import AsyncFileSystem

from batchgen import filesystems, urls
from batchgen.errors import InputChangedError, InputError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

# Everything in an output folder that is not a part. Two underscores, because `datasets.load_dataset(folder)` skips
# folders that start with two and pyarrow those with one: with one, `datasets` loads job.json in place of the parts.
STATE_FOLDER = "__batchgen"

_T = TypeVar("_T")
_log = logging.getLogger("batchgen.store")
_GCS, _S3, _AZURE, _HUB = "gs", "s3", "az", "hf"


def connect(url: str, options: Mapping[str, Any] | None = None) -> Store:
    """The store that holds `url`; `options` go to the fsspec file system and are never logged.

    GCS needs no credentials when `endpoint_url` is given or STORAGE_EMULATOR_HOST is set, unless `options` name some.

    Raises:
        InputError: no file system for the URL's scheme, or its package is not installed.
        StoreError: the file system refuses its options or its surroundings.
    """
    scheme = urls.scheme(url)
    if urls.holds_secret(url):
        raise InputError(
            f"{scheme}://...: a URL with a password or signature would stand in logs and output; {_REMEDY}"
        )
    settings = {"skip_instance_cache": True, "use_listings_cache": False, **(options or {})}
    failures: tuple[type[Exception], ...] = (OSError, ValueError, ImportError)
    try:
        kind, more = _KINDS[scheme]() if scheme in _KINDS and _at_hand(scheme) else (_kind(url, scheme), ())
        failures += more
        if scheme == _GCS:
            settings = filesystems.gcs_settings(settings) | settings
        return Store(scheme, kind(**settings), failures, (url, options))
    except failures as error:
        raise StoreError(f"{url}: cannot connect: {filesystems.cause(error)}") from error
    except TypeError as error:
        raise InputError(f"{url}: cannot connect: {filesystems.cause(error)}; see storage_options") from error


def _hub() -> tuple[type[Any], tuple[type[Exception], ...]]:
    from batchgen import hub

    return hub.Hub, (hub.FAILURE,)


# Under which names storage tells one version of an object from another.
_VERSIONS = ("version", "generation", "ETag", "etag", "blob_id", "xet_hash", "Last-Modified", "mtime", "created")
_REMEDY = "leave it to the library's own credentials, or to storage_options"
_KINDS: dict[str, Callable[[], tuple[type[Any], tuple[type[Exception], ...]]]] = {
    "": lambda: (filesystems.Disk, ()),
    "memory": lambda: (filesystems.Memory, ()),
    _GCS: filesystems.gcs,
    _S3: filesystems.s3,
    _AZURE: filesystems.azure,
    _HUB: _hub,
}


def _at_hand(scheme: str) -> bool:
    """Whether the package that our own class is made of is installed; fsspec says best what is missing."""
    package = {_S3: "s3fs", _AZURE: "adlfs"}.get(scheme)
    return package is None or importlib.util.find_spec(package) is not None


def _kind(url: str, scheme: str) -> type[Any]:
    """The file system of another scheme than our own; which are at hand is the machine's matter, not the storage's."""
    try:
        return cast("type[Any]", fsspec.get_filesystem_class(scheme))
    except (ValueError, ImportError) as error:
        missing = getattr(error.__cause__, "name", None)
        remedy = f"; pip install {missing}" if missing else ""
        raise InputError(f"{url}: cannot connect: {filesystems.cause(error)}{remedy}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One stored object; `version` changes with it: GCS' generation, S3's and Azure's ETag, git's id, size and time."""

    url: str
    size_bytes: int
    version: str


@dataclasses.dataclass(eq=False)
class Store:
    """One place to store things, made by `connect`; safe to share between threads.

    Pickled, it is how to connect again (`origin`, which may hold secrets), so a process that it is sent to has its own.
    `budget_s` bounds the time of one verb, retries included; `retries` counts the retries of all verbs so far.
    """

    scheme: str
    fs: Any = dataclasses.field(repr=False)
    failures: tuple[type[Exception], ...] = dataclasses.field(repr=False)
    origin: tuple[str, Mapping[str, Any] | None] = dataclasses.field(repr=False)
    budget_s: float = 300.0
    retries: int = 0
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return connect, self.origin

    def spelled(self, url: str) -> str:
        """`url` as `find` and `glob` spell what is there: local paths are absolute; no slash at the end."""
        bare = self._path(url).rstrip("/")
        if self.scheme == "memory":
            bare = bare.removeprefix("/")
        return f"{self.scheme}://{bare}" if self.scheme else bare

    def put(self, url: str, data: bytes) -> None:
        """Store `data` at `url`, in place of what was there; durable on return."""
        self._write("put", url, data, mode="overwrite")

    def create(self, url: str, data: bytes) -> bool:
        """Store `data` at `url` unless something is there; True when the object now holds exactly `data`.

        A request whose answer was lost is repeated and then meets its own object, so a conflict is settled by reading
        back. Two callers with equal bytes are thus both told True: put a nonce into `data` where only one may win.
        """
        try:
            self._write("create", url, data, mode="create")
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                return self.read(url) == data
            return False
        return True

    def swap(self, url: str, old: bytes, new: bytes) -> bool:
        """Store `new` at `url` if `old` is there; True when the object now holds exactly `new`.

        As with `create`, two callers with equal bytes are both told True: put a nonce into `new`.
        """
        with contextlib.suppress(FileNotFoundError):
            entry = self.info(url)
            # Read after the version: if these are `old` and the version still holds when writing, it had these bytes.
            now = self.read(url)
            if now != old:
                return now == new
            try:
                self._write("swap", url, new, mode="overwrite", **self._if_still(entry, old))
            except FileExistsError:
                return self.read(url) == new
            return True
        return False

    def read(self, url: str) -> bytes:
        """The whole object."""
        path = self._path(url)
        return self._retry("read", url, lambda limit: cast("bytes", self.fs.cat_file(path, **limit)))

    def find(self, folder: str, *, recursive: bool = True) -> dict[str, Entry]:
        """All objects below `folder`, or right in it, by URL, sorted; a folder that does not exist is empty."""
        path = self._path(folder).rstrip("/")

        def look(limit: dict[str, float]) -> dict[str, Entry]:
            if recursive:
                infos = self.fs.find(path, detail=True, **limit)
            else:
                infos = {info["name"]: info for info in self.fs.ls(path, detail=True, **limit)}
            return self._entries({name: info for name, info in infos.items() if name.startswith(path + "/")})

        with contextlib.suppress(FileNotFoundError):
            return self._retry("find", folder, look)
        return {}

    def glob(self, pattern: str) -> dict[str, Entry]:
        """All objects that match `pattern` (fsspec's `*`, `?`, `[]`, `**`) by URL, sorted."""
        path = self._path(pattern)
        with contextlib.suppress(FileNotFoundError):
            if not glob.has_magic(path):
                entry = self.info(pattern)
                return {entry.url: entry}
            return self._retry("glob", pattern, lambda limit: self._entries(self.fs.glob(path, detail=True, **limit)))
        return {}

    def info(self, url: str) -> Entry:
        """Size and version of one object; a folder is not one."""
        path = self._path(url)
        found = self._retry("info", url, lambda limit: self._entries({path: self.fs.info(path, **limit)}))
        if not found:
            raise FileNotFoundError(errno.ENOENT, "info: a folder, not an object", url)
        return next(iter(found.values()))

    def delete(self, urls: Iterable[str]) -> None:
        """Remove objects; those that are not there are removed already."""
        paths = {self._path(url): url for url in urls}
        # At once where the library can; but its `rm` would expand a name with a `*` in it as a pattern.
        batch = [path for path in paths if isinstance(self.fs, AsyncFileSystem) and not glob.has_magic(path)]
        if batch:
            with contextlib.suppress(FileNotFoundError):
                self._retry("delete", f"{paths[batch[0]]} and {len(batch) - 1} more", self._remover(list(batch)))
        for path in paths.keys() - set(batch):
            with contextlib.suppress(FileNotFoundError):
                self._retry("delete", paths[path], lambda limit, path=path: self.fs.rm_file(path, **limit))  # type: ignore[misc]

    def _remover(self, paths: list[str]) -> Callable[[dict[str, float]], None]:
        """Removes `paths`, when called again those that are left: among a hundred requests one may fail every time."""

        def act(limit: dict[str, float]) -> None:
            try:
                self.fs.rm(paths, **limit)
            except self.failures:
                with contextlib.suppress(*self.failures):
                    there = {
                        path
                        for folder in {path.rpartition("/")[0] for path in paths}
                        for path in self.fs.find(folder, **limit)
                    }
                    paths[:] = [path for path in paths if path in there]
                if paths:
                    raise

        return act

    def remove(self, folder: str) -> None:
        """Remove everything below `folder`, on disk also the folder and what killed writers left there."""
        self.delete(self.find(folder))
        if isinstance(self.fs, filesystems.Disk):
            shutil.rmtree(self._path(folder), ignore_errors=True)  # somebody may be writing there again

    def unfinished(self, folder: str) -> list[str]:
        """What killed writers left below `folder`, an hour old or more: files on disk, elsewhere nothing is left."""
        if not isinstance(self.fs, filesystems.Disk):
            return []
        found: list[str] = self.fs.unfinished(self._path(folder), older_s=3600)
        return found

    @contextlib.contextmanager
    def open(self, url: str, *, version: str | None = None) -> Iterator[BinaryIO]:
        """A seekable file for ranged reads of one object; nothing is read ahead or cached.

        Raises:
            InputChangedError: `version` is given and is not the object's, when opened or when closed.
            StoreError: on GCS or S3, the object was replaced while open.
        """
        with self.reading(self.still(url, version)) as file:
            yield file
        if version is not None:
            self.was(url, version)

    def still(self, url: str, version: str | None) -> Entry:
        """What is at `url`.

        Raises:
            InputChangedError: `version` is given and is not the object's.
        """
        entry = self.info(url)
        if version not in {None, entry.version}:
            why = f"changed since it was planned (version {version}, now {entry.version}); plan again"
            raise InputChangedError(f"{url}: {why}", url)
        return entry

    def was(self, url: str, version: str) -> None:
        """Whether what was read of `url` was of this version.

        Raises:
            InputChangedError: it may not have been.
        """
        # GCS and S3 are asked for the bytes of one version.
        if self.scheme not in {_GCS, _S3}:
            with contextlib.suppress(FileNotFoundError):  # what was read had its version
                self.still(url, version)

    @contextlib.contextmanager
    def reading(self, entry: Entry) -> Iterator[BinaryIO]:
        """A seekable file for ranged reads of one object, of the version in `entry` on GCS and S3."""
        disk = isinstance(self.fs, filesystems.Disk)
        with Path(self._path(entry.url)).open("rb") if disk else _Ranged(self, entry) as file:
            yield cast("BinaryIO", file)

    def tails(self, entries: Sequence[Entry], num_bytes: int) -> list[bytes]:
        """The last `num_bytes` of each object (all of a smaller one) in the order of `entries`, all at once."""
        got: dict[int, bytes] = {}

        def fetch(limit: dict[str, float]) -> None:
            todo = [i for i in range(len(entries)) if i not in got]
            paths, ends = [self._path(entries[i].url) for i in todo], [entries[i].size_bytes for i in todo]
            starts = [max(0, end - num_bytes) for end in ends]
            answers = zip(todo, self.fs.cat_ranges(paths, starts, ends, on_error="return", **limit), strict=True)
            failed = {i: answer for i, answer in answers if isinstance(answer, Exception) or got.update({i: answer})}
            for i in sorted(failed, key=lambda i: filesystems.transient(failed[i])):  # what no retry mends first
                if isinstance(failed[i], FileNotFoundError):
                    raise FileNotFoundError(errno.ENOENT, "", entries[i].url)
                raise failed[i]

        if entries:
            self._retry("tails", f"{entries[0].url} and {len(entries) - 1} more", fetch)
        return [got[i] for i in range(len(entries))]

    def _range(self, entry: Entry, start: int, end: int) -> bytes:
        """Bytes [start, end) of the very version in `entry`, on GCS and S3."""
        path = self._path(entry.url)
        pin = {_GCS: {"generation": entry.version}, _S3: {"etag": entry.version}}.get(self.scheme, {})

        def fetch(limit: dict[str, float]) -> bytes:
            data = cast("bytes", self.fs.cat_file(path, start=start, end=end, **pin, **limit))
            if len(data) == entry.size_bytes:  # a web server that does not know ranges
                data = data[start:end]
            if len(data) != end - start:
                raise OSError(errno.EIO, f"{len(data)} bytes instead of {end - start}")
            return data

        try:
            return self._retry("read", entry.url, fetch)
        except (FileNotFoundError, FileExistsError) as error:
            raise StoreError(f"read {entry.url}: replaced or removed while it was read") from error

    def _if_still(self, entry: Entry, data: bytes) -> dict[str, Any]:
        """What the file system is told so that it replaces only this version, or only these bytes."""
        if self.scheme == _GCS:
            return {"generation": entry.version}
        if self.scheme == _AZURE:
            return {"version": entry.version}
        return {"IfMatch": entry.version} if self.scheme == _S3 else {"old": data}

    def _write(self, verb: str, url: str, data: bytes, *, mode: str, **condition: Any) -> None:
        """Store `data` in one atomic operation; FileExistsError when something else is there than asked for.

        Raises:
            FileNotFoundError: there is a `condition`, and nothing to replace.
        """
        path = self._path(url)
        if self.scheme not in urls.WRITABLE:
            raise StoreError(
                f"{verb} {url}: {self.scheme}:// has no atomic create; write to gs://, s3://, az:// or a local path"
            )
        try:
            # One request whatever the size (`chunksize` is s3fs'), so that bytes and precondition are judged together.
            more = {"mode": mode, "chunksize": 2**30, **condition}
            self._retry(verb, url, lambda limit: self.fs.pipe_file(path, data, **more, **limit))
        except FileNotFoundError as error:
            if condition:
                raise
            raise StoreError(f"{verb} {url}: nowhere to write; does the bucket exist?") from error

    def _path(self, url: str) -> str:
        assert urls.scheme(url) == self.scheme, f"{url} given to a store of {self.scheme or 'local'} paths"
        return cast("str", self.fs._strip_protocol(url))  # noqa: SLF001  # fsspec's own name for it

    def _entries(self, infos: Mapping[str, Mapping[str, Any]]) -> dict[str, Entry]:
        """The objects among fsspec's answers."""
        found = {}
        for path, info in sorted(infos.items()):
            if info["type"] == "file" and not path.endswith("/"):
                bare = path.removeprefix("/") if self.scheme == "memory" else path
                # fsspec's http keeps the scheme.
                url = path if not self.scheme or "://" in path else f"{self.scheme}://{bare}"
                known = next((str(info[name]).strip('"') for name in _VERSIONS if info.get(name)), None)
                if known is None or info["size"] is None:
                    raise StoreError(f"{url}: its storage does not say when it changes, so it cannot be relied on")
                entry = Entry(url, info["size"], known)
                found[entry.url] = entry
        return found

    def _retry(self, verb: str, url: str, act: Callable[[dict[str, float]], _T]) -> _T:
        """What `act` returns; it gets the time that is left, as keyword argument for file systems that take one."""
        start = time.monotonic()
        limited = isinstance(self.fs, AsyncFileSystem)

        def attempt() -> _T:
            return act({"timeout": max(1.0, start + self.budget_s - time.monotonic())} if limited else {})

        def note(state: tenacity.RetryCallState) -> None:
            with self._lock:
                self.retries += 1
            cause = filesystems.cause(state.outcome.exception() if state.outcome else None)
            _log.warning("%s %s: %s; trying again in %.1f s", verb, url, cause, state.upcoming_sleep)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(filesystems.transient),
            stop=tenacity.stop_before_delay(self.budget_s),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
            before_sleep=note,
        )
        try:
            return retrying(attempt)
        except tenacity.RetryError as gave_up:
            error, tries = gave_up.last_attempt.exception(), gave_up.last_attempt.attempt_number
            spent = f"gave up after {tries} tries in {time.monotonic() - start:.0f} s"
            raise StoreError(f"{verb} {url}: {filesystems.cause(error)}; {spent}") from error
        except FileNotFoundError as error:
            named = error.filename if self.scheme == "" or "://" in str(error.filename) else url
            raise FileNotFoundError(errno.ENOENT, f"{verb}: no such object", named or url) from error
        except FileExistsError:
            raise
        except self.failures as error:
            if isinstance(error, OSError) and error.errno == errno.EINVAL and "pre-condition" in str(error).lower():
                raise FileExistsError(url) from error  # some S3 servers' word for a failed If-None-Match
            raise StoreError(f"{verb} {url}: {filesystems.cause(error)}") from error


class _Ranged(io.RawIOBase):
    """A seekable view of one remote object; each read is one ranged request with its own retries."""

    def __init__(self, store: Store, entry: Entry) -> None:
        self._store, self._entry, self._at = store, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.size_bytes}[whence]
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        end = self._entry.size_bytes if size is None or size < 0 else min(self._at + size, self._entry.size_bytes)
        data = self._store._range(self._entry, self._at, end) if end > self._at else b""  # noqa: SLF001
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
