"""An HTTP proxy in front of a storage emulator that fails on demand, as networks and services do.

It stands in for what no emulator offers: answers lost after the request was applied, bodies cut short, connections
reset, services that say 503. Faults are matched by a regular expression on "METHOD /path?query" and used up in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import re
import socket
import struct
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Answer = tuple[int, list[tuple[str, str]], bytes]
_NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests that match, after `skip` of them went through.

    "applied" does as asked and then loses the answer: `status` in its place, or a reset when that is None. "truncate"
    closes the connection in the middle of the body, "corrupt" flips a bit there, "delay" waits `delay_s` before.
    `strike` is called where the answer would be given.
    """

    match: str
    do: Literal["status", "reset", "applied", "truncate", "corrupt", "delay"]
    times: int = 1
    skip: int = 0
    status: int | None = 503
    body: bytes = b""
    delay_s: float = 0.0
    strike: Callable[[], None] = lambda: None


class FaultProxy:
    """The proxy at `url`; set `faults`, look at `log`. GCS' listings are as old as `lag_s`."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lag_s = 0.0
        self.url = ""
        self.listings: dict[str, list[tuple[float, Answer]]] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def serve(self) -> Iterator[FaultProxy]:
        """Listen on a free port of the loopback interface."""
        proxy = self

        class Handler(_Handler):
            faulty = proxy

        with serving(_Server(("127.0.0.1", 0), Handler)) as self.url:
            yield self

    def lagged(self, path: str, answer: Answer) -> Answer:
        """The answer that the same listing gave `lag_s` ago, or at first."""
        with self._lock:
            known, now = self.listings.setdefault(path, []), time.monotonic()
            known.append((now, answer))
            return [old for when, old in known if when <= max(now - self.lag_s, known[0][0])][-1]

    def take(self, line: str) -> Fault | None:
        """The fault for this request, used up by one."""
        with self._lock:
            self.log.append(line)
            for fault in self.faults:
                if fault.times and re.search(fault.match, line):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Where `server` answers, on a thread of its own."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits 40 ms for its headers to be acknowledged
    faulty: FaultProxy

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class' name
        pass

    def _pass(self) -> None:
        fault = self.faulty.take(f"{self.command} {urllib.parse.unquote(self.path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault and fault.do == "delay":
            time.sleep(fault.delay_s)
        if fault and fault.do in {"status", "reset"}:
            fault.strike()
            self._lose(fault.status if fault.do == "status" else None, fault.body)
            return
        status, headers, data = self._forward(body)
        if self.faulty.lag_s and self.command == "GET" and "/o?" in self.path:
            status, headers, data = self.faulty.lagged(self.path, (status, headers, data))
        if fault and fault.do == "applied":
            fault.strike()
            self._lose(fault.status, fault.body)
            return
        half = len(data) // 2
        if fault and fault.do == "corrupt" and data:
            data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        self._answer(status, headers, data, cut=half if fault and fault.do == "truncate" else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _pass  # the base class' names

    def _forward(self, body: bytes) -> Answer:
        upstream = urllib.parse.urlsplit(self.faulty.upstream)
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_PASSED_ON}
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _NOT_PASSED_ON]
            if self.command == "HEAD":  # which has no body, and says how long it would be
                kept += [("Content-Length", answer.getheader("Content-Length", "0"))]
            return answer.status, kept, answer.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: int | None) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != http.HTTPStatus.NO_CONTENT and "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        self.close_connection = cut is not None

    def _lose(self, status: int | None, body: bytes) -> None:
        if status is not None:
            self._answer(status, [], body, cut=None)
            return
        # Closing with a linger time of zero sends a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
