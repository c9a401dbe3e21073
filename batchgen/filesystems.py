"""The fsspec file systems that `store` works on. Ours have an atomic `pipe_file`, that creates or replaces one version.

fsspec's local disk checks and then opens, and shows a file while it is written; ours writes aside and links. fsspec's
memory checks and then opens; ours does so under a lock. gcsfs' upload is atomic, but cuts data without an error: its
multipart boundary is always "==0==", and data that holds this boundary on a line of its own ends there (gcsfs
2026.10.1, seen with fake-gcs-server); ours is random. adlfs replaces without a condition, ours also one version. s3fs
tries each request five times; ours once, like the others: `store` repeats. What exceptions mean is said here too.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import stat
import threading
import time
import urllib.parse
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fsspec.asyn import sync_wrapper
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from batchgen import urls

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEMPORARY = ".tmp-"
# By name, so that no storage library is imported only to say what its exceptions mean.
_TRANSIENT = {
    "aiohttp.client_exceptions.ClientError",
    "azure.core.exceptions.IncompleteReadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "fsspec.exceptions.FSTimeoutError",
    "google.auth.exceptions.RefreshError",
    "google.auth.exceptions.TransportError",
    "http.client.IncompleteRead",
    "httpx.TransportError",
    "httpx2.TransportError",
    "requests.exceptions.ConnectionError",  # gcsfs makes one of HTTP 502
    "requests.exceptions.Timeout",
}


# Of S3 with a status of 4xx: a write of the same key is under way, or the line was bad.
_S3_TRANSIENT = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}


def transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    if _s3_answer(error).get("Error", {}).get("Code") in _S3_TRANSIENT:
        return True
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return False
    code = _status(error)
    if code is not None:
        # An expired token is fetched anew by the next try. GCS checks the MD5 that we send: a mismatch is a bad line.
        mended = {401: "Invalid Credentials", 400: "MD5 hash"}
        return code in {408, 429} or code >= 500 or (code in mended and mended[code] in str(error))
    if isinstance(error, OSError) and error.errno in {errno.EIO, errno.EBUSY}:
        return True
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or not names.isdisjoint(_TRANSIENT)


def cause(error: BaseException | None) -> str:
    """One line that says what happened, without secrets: who is sent on to another URL is told its signature."""
    code = _status(error)
    text = urls.without_secrets(" ".join(str(error).split()))[:300]
    return f"HTTP {code} {text.removesuffix(f', {code}')}".rstrip() if code else f"{type(error).__name__}: {text}"


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an exception of gcsfs, adlfs, huggingface_hub or, as its cause, s3fs."""
    code = getattr(error, "code", None) or getattr(error, "status_code", None)
    code = code or getattr(getattr(error, "response", None), "status_code", None)
    code = _s3_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", code)
    return int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else None


def _s3_answer(error: BaseException | None) -> dict[str, Any]:
    answer = getattr(getattr(error, "__cause__", None), "response", None)
    return answer if isinstance(answer, dict) else {}


class Memory(MemoryFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """Objects of this process alone, for tests."""

    _writing = threading.Lock()

    def pipe_file(
        self, path: str, value: bytes, mode: str = "overwrite", old: bytes | None = None, **kwargs: Any
    ) -> None:
        """Store a whole object; FileExistsError when `mode` is "create" and there is one, or it is not `old`."""
        with self._writing:
            if old is not None and self.cat_file(path) != old:
                raise FileExistsError(path)
            super().pipe_file(path, value, mode=mode)


def _lock(file: BinaryIO) -> None:
    """Lock `file`; who holds it may have been stopped, so that is not waited for without end."""
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.01)
    raise OSError(errno.EBUSY, "locked by another process", file.name)


class Disk(LocalFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """The local disk, with whole-object writes that survive a power cut and are hidden while they are unfinished."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        # `a/../b` is `b`: by two names a file would be two inputs.
        bare = super()._strip_protocol(path)
        return bare if isinstance(bare, list) else re.sub("^//+", "/", os.path.normpath(bare))

    def pipe_file(
        self, path: str, value: bytes, mode: str = "overwrite", old: bytes | None = None, **kwargs: Any
    ) -> None:
        """Store a whole object; FileExistsError when `mode` is "create" and there is one, or it is not `old`."""
        target = Path(path)
        if old is None:
            self._store(target, value, mode)
            return
        # A file of its own, never removed, because the object's is another one after each write; NFS locks it, too.
        with target.with_name(f"{_TEMPORARY}{target.name}.lock").open("ab") as lock:
            _lock(lock)
            if target.read_bytes() != old:
                raise FileExistsError(path)
            self._store(target, value, mode)

    @staticmethod
    def _store(target: Path, value: bytes, mode: str) -> None:
        changed = [target.parent, *(folder.parent for folder in target.parents if not folder.exists())]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # not what "create" means by it
            raise NotADirectoryError(errno.ENOTDIR, "a file where a folder should be", error.filename) from error
        temporary = target.with_name(_TEMPORARY + uuid.uuid4().hex)
        try:
            with temporary.open("xb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            if mode == "create":
                os.link(temporary, target)  # the one call that is atomic and refuses to replace
            else:
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        for folder in changed:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @staticmethod
    def unfinished(folder: str, *, older_s: float) -> list[str]:
        """Files below `folder` that a writer began so long ago and never finished."""
        found = []
        for file in Path(folder).rglob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):  # finished just now
                if file.suffix != ".lock" and file.stat().st_mtime < time.time() - older_s:
                    found.append(str(file))
        return sorted(found)

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        """What fsspec says, and a `version`; a link is what it leads to."""
        found: dict[str, Any] = super().info(path, **kwargs)
        followed = Path(path).stat()
        kind = {"type": "file"} if stat.S_ISREG(followed.st_mode) else {}
        kind = {"type": "directory"} if stat.S_ISDIR(followed.st_mode) else kind
        return found | kind | {"size": followed.st_size, "version": f"{followed.st_size}-{followed.st_mtime_ns}"}

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[Any]:
        """What fsspec lists, less unfinished files; a file that goes while it is listed is left out.

        So is a link to a folder that this one is in: what is there is found without it.
        """
        if not Path(path).is_dir():
            return [self.info(path) if detail else path]
        infos = []
        with os.scandir(path) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    leads_back = file.is_symlink() and file.is_dir() and _leads_back(file.path)
                    left_out = leads_back or file.name.startswith(_TEMPORARY)
                    infos += [] if left_out else [self.info(file)]
        return infos if detail else [info["name"] for info in infos]

    def walk(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """What fsspec walks, but a folder that cannot be listed is an error: fsspec would leave its files out."""

        def missing(error: Exception) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        return super().walk(path, *args, **{**kwargs, "on_error": missing})


def _leads_back(link: str) -> bool:
    """Whether a link to a folder leads to one on the way to it, as it is spelled or as it really is."""
    target = Path(link).resolve()
    above = {Path(folder).resolve() for folder in Path(link).parents}
    return any(target == folder or target in folder.parents for folder in above)


def gcs_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `gcs` is made with beside the `given` settings; gcsfs' own wait five minutes for a dead connection."""
    import aiohttp

    settings: dict[str, Any] = {"requests_timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)}
    if "endpoint_url" in given or os.environ.get("STORAGE_EMULATOR_HOST"):
        settings |= {"token": "anon", "project": "batchgen"}
    return settings


@functools.cache
def gcs() -> tuple[type[Any], tuple[type[Exception], ...]]:
    """The core file system of gcsfs with one try per request, and what it raises beside OSError and ValueError.

    The class that `gcsfs` exports asks for the bucket's type over gRPC before each operation, which takes 35 to 106 s
    where only the JSON API is reachable. The variable keeps the package from importing it, and with it gRPC.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs.core
    import gcsfs.retry
    import google.auth.exceptions

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for every error that it also raises
    request = gcsfs.core.GCSFileSystem._request  # noqa: SLF001

    class Gcs(gcsfs.core.GCSFileSystem):  # type: ignore[misc]  # gcsfs is untyped
        # Without gcsfs' own six tries (33 s), which nothing counts, logs or configures.
        _request = getattr(request, "__wrapped__", request)

        @staticmethod
        def close_session(loop: Any, session: Any, asynchronous: bool = False) -> None:
            # Runs when the file system is collected, on any thread; gcsfs' own starts a task on another thread's loop.
            if session is not None and loop is not None and loop.is_running() and not session.closed:
                closing = asyncio.run_coroutine_threadsafe(session.close(), loop)
                try:
                    asyncio.get_running_loop()
                except RuntimeError:  # not on the loop's own thread, so that waiting is possible
                    with contextlib.suppress(TimeoutError):
                        closing.result(timeout=1)

        async def _pipe_file(
            self, path: str, data: bytes, mode: str = "overwrite", generation: str = "", **kwargs: Any
        ) -> None:
            wanted = "0" if mode == "create" else generation
            bucket, _, key = path.partition("/")
            boundary = uuid.uuid4().hex
            digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
            head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
            # Google's caches keep what everybody may read for an hour, and would answer with a lease of then.
            head += json.dumps({"name": key, "md5Hash": digest, "cacheControl": "no-store"})
            head += f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
            await self._call(
                "POST",
                f"{self._location}/upload/storage/v1/b/{urllib.parse.quote(bucket, safe='')}/o",
                uploadType="multipart",
                headers={"Content-Type": f"multipart/related; boundary={boundary}"},
                data=b"".join((head.encode(), data, f"\r\n--{boundary}--".encode())),
                **({"ifGenerationMatch": wanted} if wanted else {}),
            )

    return Gcs, (gcsfs.retry.HttpError, google.auth.exceptions.GoogleAuthError)


@functools.cache
def s3() -> tuple[type[Any], tuple[type[Exception], ...]]:
    """The file system of s3fs with one try per request, and what it raises beside OSError and ValueError."""
    import s3fs
    from botocore.exceptions import BotoCoreError

    class S3(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs is untyped
        # Its own five tries, and botocore's, nothing counts or logs.
        retries = 1

        def __init__(self, *arguments: Any, config_kwargs: Mapping[str, Any] | None = None, **options: Any) -> None:
            once = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 30}
            super().__init__(*arguments, config_kwargs=once | dict(config_kwargs or {}), **options)

        async def _cat_file(
            self, path: str, start: int | None = None, end: int | None = None, etag: str = "", **kwargs: Any
        ) -> bytes:
            # In one request, and with `etag` of one version only.
            bucket, key, _ = self.split_path(path)
            asked = {"IfMatch": f'"{etag}"'} if etag else {}
            if start is not None or end is not None:
                asked["Range"] = f"bytes={start or 0}-{'' if end is None else end - 1}"
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, **asked)
            try:
                return bytes(await answer["Body"].read())
            finally:
                answer["Body"].close()

    return S3, (BotoCoreError,)


@functools.cache
def azure() -> tuple[type[Any], tuple[type[Exception], ...]]:
    """The file system of adlfs, which also replaces one version only, and what it raises beside OSError and ValueError.

    The account and its key are options of adlfs, or its environment's.
    """
    import adlfs
    from azure.core import MatchConditions
    from azure.core.exceptions import AzureError, ResourceModifiedError

    class Azure(adlfs.AzureBlobFileSystem):  # type: ignore[misc]  # adlfs is untyped
        @classmethod
        def _strip_protocol(cls, path: Any) -> Any:
            # adlfs' own takes what follows ? or # in a name for parts of a URL.
            if isinstance(path, list):
                return [cls._strip_protocol(each) for each in path]
            # Before the account's host stands the container.
            return re.sub("^([^/@]+)@[^/]+", r"\1", re.sub("^(az|abfss?)://", "", path)).lstrip("/")

        async def _pipe_file(
            self, path: str, value: bytes, mode: str = "overwrite", version: str = "", **kwargs: Any
        ) -> None:
            still = {"etag": f'"{version}"', "match_condition": MatchConditions.IfNotModified} if version else {}
            try:
                await super()._pipe_file(path, value, mode=mode, **still)
            except ResourceModifiedError as error:
                raise FileExistsError(path) from error

        pipe_file = sync_wrapper(_pipe_file)

        async def _find(self, path: str, *arguments: Any, **kwargs: Any) -> Any:
            found = await super()._find(path, *arguments, **kwargs)
            # Of an object, or of nothing, adlfs gives a list even where details are asked for.
            return {} if kwargs.get("detail") and not isinstance(found, dict) else found

        find = sync_wrapper(_find)

    return Azure, (AzureError,)
