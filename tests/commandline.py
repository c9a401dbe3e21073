"""`batchgen ...` as a shell would run it, in a process of its own, but without the seconds of its imports."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@functools.cache
def _zygote() -> subprocess.Popen[str]:
    """It ends with its standard input, and so with this process."""
    command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def batchgen(
    *arguments: str | Path, cwd: Path | None = None, began: Callable[[int], None] = lambda pid: None
) -> subprocess.CompletedProcess[str]:
    """What the command came to; `began` is called with its process id when it begins."""
    process = _zygote()
    assert process.stdin is not None
    assert process.stdout is not None
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        said = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        asked = {"arguments": words, "cwd": str(cwd or Path.cwd()), "environment": dict(os.environ), **said}
        print(json.dumps(asked), file=process.stdin, flush=True)
        began(int(process.stdout.readline()))
        code = int(process.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(Path(file).read_text() for file in said.values()))
