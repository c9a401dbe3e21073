"""A server on loopback that speaks as much of the Hugging Face Hub's HTTP interface as downloads and listings need."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import urllib.parse
from typing import TYPE_CHECKING, Any

from faultproxy import serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What is asked of which repository, the models' having no kind in the URL of a file.
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<rest>.+))?$")
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")


class Hub:
    """The server at `url`; `repositories` are files by their path by "models/owner/name" or "datasets/owner/name"."""

    def __init__(self, repositories: Mapping[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.url = ""

    @contextlib.contextmanager
    def serve(self) -> Iterator[Hub]:
        """Listen on a free port of the loopback interface."""
        hub = self

        class Handler(_Handler):
            repositories = hub.repositories

        with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as self.url:
            yield self


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Mapping[str, dict[str, bytes]]

    def do_POST(self) -> None:  # the base class' name
        name = "/".join(urllib.parse.unquote(self.path).split("/")[2:5])
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        files, infos = self.repositories[name], []
        for path in urllib.parse.parse_qs(body)["paths"]:
            if path in files:
                size = len(files[path])
                infos.append({"type": "file", "path": path, "oid": _oid(files[path]), "size": size})
            elif any(file.startswith(f"{path}/") for file in files):
                infos.append({"type": "directory", "path": path, "oid": COMMIT, "size": 0})
        self._answer(json.dumps(infos).encode())

    def do_GET(self) -> None:  # the base class' name
        path, _, query = urllib.parse.unquote(self.path).partition("?")
        asked, file = _API.match(path), _FILE.match(path)
        found = asked or file
        assert found, path
        name = f"{(found['kind'] or 'models').rstrip('/')}/{found['name']}"
        files = self.repositories.get(name)
        if name.endswith("/gated"):
            self._answer(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        elif files is None:
            self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        elif file:
            self._file(files, file["path"])
        elif asked and asked["what"] == "tree":
            _, _, folder = asked["rest"].partition("/")
            self._tree(files, folder, recursive="recursive=true" in query.lower())
        elif asked and asked["what"] and asked["rest"] not in {"main", COMMIT}:
            self._answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [{"rfilename": name} for name in files]
            self._answer(json.dumps({"id": found["name"], "sha": COMMIT, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def _tree(self, files: dict[str, bytes], folder: str, *, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        found: dict[str, Any] = {}
        for path, data in files.items():
            below = path.removeprefix(prefix) if path.startswith(prefix) else ""
            first, *more = below.split("/")
            for depth in range(1, len(more) + 1 if recursive else min(2, len(more) + 1)):
                name = prefix + "/".join([first, *more][:depth])
                found[name] = {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
            if below and (recursive or not more):
                found[path] = {"type": "file", "path": path, "oid": _oid(data), "size": len(data)}
        if found:
            self._answer(json.dumps(list(found.values())).encode())
        else:
            self._answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    def _file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = files[path]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(data)}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(data, 200, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(data[first : last + 1], 206, headers)

    def _answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _oid(data: bytes) -> str:
    """What git would call it, near enough."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
