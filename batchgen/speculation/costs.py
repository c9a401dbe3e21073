"""What generation cost on this machine when it was last measured, for estimates before a job runs.

One small JSON file a (device, target, head, dtype, batch size, version); a damaged or missing one is simply not there.
Floor 2 and standard library only, like all of `speculation`, so that it runs wherever the engines do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Measured over one run: completion tokens per second of generation, and completion tokens per row."""

    tokens_per_s: float
    tokens_per_row: float
    num_rows: int


def load(folder: Path, key: str) -> Cost | None:
    """The cost last saved under `key`, if there is one."""
    try:
        return Cost(**json.loads(_file(folder, key).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def save(folder: Path, key: str, cost: Cost) -> None:
    """Remember `cost` under `key`, replacing what was there at once."""
    file = _file(folder, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(dataclasses.asdict(cost)))
    temporary.replace(file)


def _file(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
