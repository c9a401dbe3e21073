"""The file that every benchmark writes: its results with date, machine, versions and options."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

from batchgen import provenance

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def write(file: Path | None, results: list[dict[str, Any]], args: argparse.Namespace, device: str) -> None:
    """Write `results` to `file`, nowhere if it is None."""
    if file is None:
        return
    about = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": provenance.machine(device),
        "versions": provenance.versions(),
        "options": {name: str(value) for name, value in vars(args).items() if name != "json"},
    }
    file.write_text(json.dumps({"results": results} | about, indent=2) + "\n")
