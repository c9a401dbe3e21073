"""Runs the command line in forks of one process that has imported all; asked by `commandline`, a JSON object a line.

Answers with the fork's process id when it begins and with its exit code, negative for a signal, when it has ended.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import sys
import traceback
from typing import Any

from batchgen import cli, filesystems

# What commands import when they come to it.
for name in (
    *("acceptance", "clean", "dedupe", "export", "features", "job", "pii", "report", "terminal"),
    *("engines.rehearsal", "engines.torch.capture", "engines.torch.draft", "engines.torch.engine"),
    "engines.torch.width",
):
    importlib.import_module(f"batchgen.{name}")
for name in ("polars", "pyarrow.parquet", "transformers.models.llama.modeling_llama"):
    importlib.import_module(name)
filesystems.gcs()
gc.freeze()  # or the forks' collections would write to, and so copy, all of it


def run(asked: dict[str, Any]) -> int:
    """The exit code of the command line."""
    for number, name in ((0, os.devnull), (1, asked["stdout"]), (2, asked["stderr"])):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
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


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        # Without taking all that was imported apart, which takes a second.
        os._exit(run(json.loads(line)))
    os.write(1, f"{child}\n".encode())
    os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
