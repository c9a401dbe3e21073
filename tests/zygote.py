"""Runs the command line in forks of one process that has imported all, as `commandline` asks for them.

A message is a JSON object and comes with the descriptors of the fork's output, of its errors and of the answer: the
fork's process id when it has begun and its exit code, negative for a signal, when it has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any

from batchgen import cli, filesystems

# What commands import when they come to it.
for name in (
    *("acceptance", "clean", "dedupe", "export", "features", "job", "pii", "report", "terminal"),
    *("engines.rehearsal", "engines.torch.capture", "engines.torch.draft", "engines.torch.engine"),
    *("engines.torch.width", "spec", "survey"),
):
    importlib.import_module(f"batchgen.{name}")
for name in ("polars", "pyarrow.dataset", "pyarrow.parquet", "transformers.models.llama.modeling_llama"):
    importlib.import_module(name)
with contextlib.suppress(ImportError):
    importlib.import_module("pandas")  # pyarrow looks for it when it makes its first array
filesystems.gcs()
gc.freeze()  # or the forks' collections would write to, and so copy, all of it


def run(asked: dict[str, Any], stdout: int, stderr: int) -> int:
    """The exit code of the command line."""
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), stdout, stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    code = 1
    try:
        cli.main(asked["arguments"], prog_name="batchgen")
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:  # noqa: BLE001  # a traceback is what Python would print, too
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code


asking = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
while True:
    message, descriptors, *_ = socket.recv_fds(asking, 1 << 20, 3)
    if not message:
        break
    stdout, stderr, answer = descriptors
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        asking.close()
        if (child := os.fork()) == 0:
            os.close(answer)
            # Without taking all that was imported apart, which takes a second.
            os._exit(run(json.loads(message), stdout, stderr))
        os.close(stdout)
        os.close(stderr)
        os.write(answer, f"{child}\n".encode())
        os.write(answer, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
