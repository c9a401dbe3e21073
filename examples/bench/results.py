"""How every benchmark here compares, and the file it writes."""

from __future__ import annotations

import datetime as dt
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen import provenance

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence


def interleave(
    turn: Callable[[str], dict[str, float]], modes: Sequence[str], turns: int, **about: Any
) -> list[dict[str, Any]]:
    """Medians of `turns` turns of plain decoding and of each other mode, as facts that start with `about`.

    `turn(mode)` measures once, its `tokens_per_s` among others. Each turn of a mode stands between two plain ones and
    is compared with these, so that drift of the machine cancels. One turn of each goes before and does not count:
    first use pays, and `auto` learns.
    """
    others = [mode for mode in modes if mode != "plain"]
    for mode in ("plain", *others):
        turn(mode)
    measured: dict[str, list[dict[str, float]]] = {"plain": [turn("plain")]} | {mode: [] for mode in others}
    ratios: dict[str, list[float]] = {mode: [] for mode in others}
    for _ in range(turns):
        for mode in others:
            measured[mode].append(turn(mode))
            measured["plain"].append(turn("plain"))
            around = statistics.harmonic_mean([each["tokens_per_s"] for each in measured["plain"][-2:]])
            ratios[mode].append(measured[mode][-1]["tokens_per_s"] / around)
    facts = []
    for mode, each in measured.items():
        fact: dict[str, Any] = about | {"mode": mode}
        fact |= {name: round(statistics.median(t[name] for t in each), 3) for name in each[0]}
        fact["ratio_to_plain"] = round(statistics.median(ratios[mode]), 3) if mode != "plain" else 1.0
        fact["ratios"] = [round(ratio, 3) for ratio in sorted(ratios.get(mode, []))]
        facts.append(fact)
        print(json.dumps(fact), flush=True)
    return facts


def pooled(starts: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Facts of several runs of the same modes as one: medians of their numbers, and of all ratios together."""
    facts = []
    for same in zip(*starts, strict=True):
        fact = {
            name: statistics.median(each[name] for each in same) for name in same[0] if name not in ("mode", "ratios")
        }
        ratios = sorted(ratio for each in same for ratio in each["ratios"])
        fact["ratio_to_plain"] = round(statistics.median(ratios), 3) if ratios else 1.0
        facts.append({"mode": same[0]["mode"]} | fact | {"ratios": ratios})
    return facts


def write(file: Path | None, results: list[dict[str, Any]], args: argparse.Namespace, device: str) -> None:
    """Write `results` to `file`, nowhere if it is None; folders of one machine stay out of it."""
    if file is None:
        return
    about = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": provenance.machine(device),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "options": {name: str(value) for name, value in vars(args).items() if not Path(str(value)).is_absolute()},
    }
    file.write_text(json.dumps({"results": results} | about, indent=2) + "\n")
