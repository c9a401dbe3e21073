"""`batchgen ...` as a shell would run it, in a process of its own, but without the seconds of its imports."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@functools.cache
def _zygote() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Where to ask it for a process, and itself; it ends with this one."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, str(Path(__file__).with_name("zygote.py")), str(its.fileno())]
        return ours, subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()])


class Process:
    """A command that has begun: of `subprocess.Popen` what tests ask of it. Its output goes to two files or pipes."""

    def __init__(
        self,
        arguments: tuple[str | Path, ...],
        stdout: int,
        stderr: int,
        cwd: Path | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        answers, answer = os.pipe()
        where = {"cwd": str(cwd or Path.cwd()), "environment": {**os.environ, **environment}}
        asked = {"arguments": [*map(str, arguments)], **where}
        socket.send_fds(_zygote()[0], [json.dumps(asked).encode()], [stdout, stderr, answer])
        os.close(answer)
        # Unbuffered, or `select` would know nothing of a code that was read together with the process id.
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("batchgen", timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or none while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Piped(Process):
    """One whose output is read while it runs; as a context it does not outlive its block."""

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        (out, stdout), (err, stderr) = os.pipe(), os.pipe()
        super().__init__(arguments, stdout, stderr, environment=environment)
        os.close(stdout)
        os.close(stderr)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.wait()
        self.stdout.close()
        self.stderr.close()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """The rest of its output, when it has ended."""
        said: dict[str, str] = {}

        def read(name: str) -> None:
            with getattr(self, name) as file:
                said[name] = file.read()

        readers = [threading.Thread(target=read, args=[name], daemon=True) for name in ("stdout", "stderr")]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return said["stdout"], said["stderr"]


def batchgen(
    *arguments: str | Path,
    cwd: Path | None = None,
    began: Callable[[int], None] = lambda pid: None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """What the command came to; `began` is called with its process id when it begins."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = Process(arguments, stdout.fileno(), stderr.fileno(), cwd, environment)
        began(process.pid)
        code = process.wait()
        said = [file.seek(0) or file.read() for file in (stdout, stderr)]
        return subprocess.CompletedProcess([*arguments], code, *said)
