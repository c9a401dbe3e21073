"""The Hugging Face Hub as storage to read from; imported where a URL begins with hf://.

huggingface_hub's own file system shows a process the listings of its first look for ever, reads ahead 5 MB, tries five
times uncounted, and calls a dataset that is private or gated one that does not exist (1.0 to 2.4). Credentials are
found as it finds them: HF_TOKEN, or `hf auth login`.
"""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

# It calls for httpx or httpx2, by its version; what either raises is the base of its own errors.
FAILURE: type[Exception] = errors.HfHubHTTPError.__mro__[1]


class Hub(huggingface_hub.HfFileSystem):
    """Files of models, datasets and spaces, each look a request."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if constants.HF_HUB_OFFLINE:
            raise OSError(errno.ENETUNREACH, "HF_HUB_OFFLINE is set; unset it, or copy the input to other storage")

    def resolve_path(self, path: str, revision: str | None = None) -> Any:
        """Repository, revision and path; PermissionError where the Hub does not say whether there is such a thing."""
        try:
            return super().resolve_path(path, revision=revision)
        except FileNotFoundError as error:
            self.invalidate_cache()
            wanted = "no such repository or revision, or not for you: set HF_TOKEN if it is private or gated"
            raise PermissionError(errno.EACCES, wanted, f"hf://{path}") from error

    def isdir(self, path: str) -> bool:
        """No: only `url` asks, which has another page for people to look at folders."""
        return False

    def info(self, path: str, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        """One file or folder."""
        at = self.resolve_path(path)
        if not getattr(at, "repo_id", None) or not at.path_in_repo:
            self.dircache.clear()
            return super().info(path, *arguments, **kwargs)
        # Its own would list the whole folder.
        where = {"repo_type": at.repo_type, "revision": at.revision}
        for found in self._api.get_paths_info(at.repo_id, at.path_in_repo, **where):
            if isinstance(found, RepoFile):
                return {"name": at.unresolve(), "size": found.size, "type": "file", "blob_id": found.blob_id}
            return {"name": at.unresolve(), "size": 0, "type": "directory"}
        raise FileNotFoundError(errno.ENOENT, "no such file", path)

    def ls(self, path: str, *arguments: Any, **kwargs: Any) -> Any:
        """A folder."""
        self.dircache.clear()
        return super().ls(path, *arguments, **kwargs)

    def find(self, path: str, *arguments: Any, **kwargs: Any) -> Any:
        """All below a folder."""
        self.dircache.clear()
        return super().find(path, *arguments, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Bytes [start, end) of a file, in one request."""
        if start is not None and start == end:
            return b""
        headers = build_hf_headers(token=self.token)
        if start is not None or end is not None:
            headers["Range"] = f"bytes={start or 0}-{'' if end is None else end - 1}"
        response = get_session().get(self.url(path), headers=headers, timeout=30)
        try:
            hf_raise_for_status(response)
        except errors.EntryNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from error
        content: bytes = response.content
        return content

    def cat_ranges(
        self, paths: list[str], starts: list[int], ends: list[int], *arguments: Any, **kwargs: Any
    ) -> list[bytes | Exception]:
        """Bytes of many files, or what went wrong with each."""

        def fetch(path: str, start: int, end: int) -> bytes | Exception:
            try:
                return self.cat_file(path, start, end)
            except (OSError, ValueError, FAILURE) as error:
                return error

        with ThreadPoolExecutor(self.max_workers) as pool:
            return list(pool.map(fetch, paths, starts, ends))
