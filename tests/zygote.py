"""Runs the command line in forks of one process that has all imported: a JSON list of arguments a line on stdin.

Answers with the fork's process id when it begins and with its exit code, negative for a signal, when it has ended.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import polars as pl  # noqa: F401
import pyarrow.parquet as pq  # noqa: F401

from batchgen import cli, filesystems, job, terminal  # noqa: F401
from batchgen.engines import rehearsal  # noqa: F401

filesystems.gcs()


def run(arguments: list[str]) -> int:
    """The exit code of the command line."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        cli.main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:  # noqa: BLE001  # a traceback is what Python would print, too
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(run(json.loads(line)))
    os.write(1, f"{child}\n".encode())
    os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
