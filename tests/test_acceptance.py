"""Acceptance by group is that of its rows, and a drift is flagged when there is one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import TYPE_CHECKING

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen import acceptance
from batchgen.store import connect

if TYPE_CHECKING:
    from pathlib import Path

DEPTH = 3


def row(at: int, rng: random.Random, rate: float, *, drafted: bool = True) -> dict:
    """An output row of chains of up to three tokens, accepted at `rate`, which rows scatter around."""
    steps, asked, depths = rng.randint(1, 40), [0] * DEPTH, [0] * DEPTH
    mine = min(1.0, max(0.0, rng.gauss(rate, 0.15)))
    for step in range(steps if drafted else 0):
        length = DEPTH if step == 0 else rng.randint(1, DEPTH)
        for depth in range(length):
            asked[depth] += 1
        for depth in range(length):
            if rng.random() > mine:
                break
            depths[depth] += 1
    tokens = steps + sum(depths) + 1
    return {
        "row_id": f"row-{at}",
        "sample": 0,
        "status": "ok" if at % 10 else "error",
        "category": "ab"[at % 2],
        "prompt_tokens": at % 7,
        "completion_tokens": tokens,
        "target_steps": steps,
        "draft_steps": steps if drafted else 0,
        "draft_tokens": sum(asked),
        "accepted_tokens": sum(depths),
        "drafted_per_depth": asked[: DEPTH - at % 2],
        "accepted_per_depth": depths[: DEPTH - at % 2],
    }


def parts(folder: Path, rows: list[dict], size: int = 60) -> str:
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*.parquet"):
        file.unlink()
    for i in range(0, len(rows), size):
        pl.DataFrame(rows[i : i + size]).write_parquet(folder / f"part-{i:05d}-{i:016x}.parquet")
    return str(folder)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 150), size=st.integers(1, 80))
def test_a_groups_figures_are_those_of_its_rows(tmp_path_factory, seed, count, size):
    rng = random.Random(seed)
    rows = [row(i + 1, rng, 0.5) for i in range(count)]
    output = parts(tmp_path_factory.getbasetemp() / "by", rows, size)
    everything, *groups = acceptance.by(connect(output), output, ["category", "length"])
    finished = [r for r in rows if r["status"] == "ok"]
    assert everything.rows == len(finished) == sum(group.rows for group in groups)
    assert sum(group.passes_share for group in groups) == pytest.approx(1)
    assert [g.rate for g in groups] == sorted(g.rate for g in groups)
    for group in groups:
        category, upper = group.name.split(", up to ")
        low = int(upper) // 2 if int(upper) > 1 else 0
        mine = [r for r in finished if r["category"] == category and low < r["completion_tokens"] <= int(upper)]
        drafted, steps = (sum(r[name] for r in mine) for name in ("draft_tokens", "target_steps"))
        assert group.rows == len(mine)
        assert group.rate == pytest.approx(sum(r["accepted_tokens"] for r in mine) / drafted)
        assert (group.error is None) == (group.rows == 1)
        assert group.length == pytest.approx(sum(r["completion_tokens"] - 1 for r in mine) / steps)
        for depth, share in enumerate(group.by_depth):
            kept, asked = (
                sum(sum(r[f"{what}_per_depth"][depth : depth + 1]) for r in mine) for what in ("accepted", "drafted")
            )
            assert share == pytest.approx(kept / asked)
        assert len(group.by_depth) == max(len(r["drafted_per_depth"]) for r in mine)


def test_by_position_a_row_counts_where_it_ran(tmp_path):
    fields = ("target_steps", "draft_steps", "draft_tokens", "accepted_tokens", "accepted_lookup_tokens")

    def stretches(*counts: tuple[int, int, int, int, int]) -> list[dict]:
        return [dict(zip(fields, each, strict=True)) for each in counts]

    rows = [row(i, random.Random(i), 0.5) for i in range(1, 5)]
    rows[0]["by_position"] = stretches((10, 10, 30, 20, 2), (5, 5, 15, 3, 0))
    rows[1]["by_position"] = stretches((8, 8, 24, 12, 0), (0, 0, 0, 0, 0), (4, 2, 6, 1, 3))
    rows[2]["by_position"] = None
    rows[3]["by_position"] = []
    output = parts(tmp_path / "out", rows)
    everything, *groups = acceptance.by(connect(output), output, ["position"])
    assert everything.rows == 4
    assert everything.tokens == sum(r["completion_tokens"] for r in rows)
    found = {group.name: (group.rows, group.tokens, group.rate, group.length) for group in groups}
    assert found == {
        "from 0": (2, 52, 32 / 54, 52 / 18),
        "from 32": (1, 8, 3 / 15, 8 / 5),
        "from 64": (1, 8, 1 / 6, 8 / 4),
    }


@pytest.mark.parametrize("paired", [True, False])
def test_a_drift_is_flagged_when_there_is_one_and_seldom_otherwise(tmp_path, paired):
    rng = random.Random(7)

    def flagged(rate: float) -> float:
        times = 60
        count = 0
        for _ in range(times):
            before = parts(tmp_path / "before", [row(i, rng, 0.5) for i in range(1, 200)], 500)
            first = 1 if paired else 1001
            now = parts(tmp_path / "now", [row(i, rng, rate) for i in range(first, first + 199)], 500)
            drift = acceptance.against(connect(now), now, connect(before), before)
            assert (drift.rows > 0) == paired
            count += drift.beyond_noise
        return count / times

    assert flagged(0.5) < 0.17, "95 % of the time nothing is flagged"
    assert flagged(0.4) > 0.9


def test_nights_of_equal_ids_are_no_further_rows_to_compare_with(tmp_path):
    rng = random.Random(3)
    night, now = ([row(i, rng, 0.5) for i in range(1, 100)] for _ in range(2))
    new = parts(tmp_path / "now", now)
    found = []
    for name, nights in (("one", 1), ("ten", 10)):
        old = parts(tmp_path / name, night * nights)
        found.append(acceptance.against(connect(new), new, connect(old), old))
    assert found[0].rows == found[1].rows > 0
    assert found[1].error == pytest.approx(found[0].error)


@pytest.fixture
def job(tmp_path) -> Path:
    sections = {
        "input": {"path": "in.parquet", "messages": "messages"},
        "model": {"target": "demo:smollm2-135m"},
        "output": {"path": str(tmp_path / "now")},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "batchgen", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_head_that_got_worse_fails_a_cron_job(tmp_path, job):
    rng = random.Random(1)
    before = parts(tmp_path / "before", [row(i, rng, 0.6) for i in range(1, 300)])
    parts(tmp_path / "now", [row(i, rng, 0.45) for i in range(1, 300)])
    fell = report(job, "--against", before, "--max-drift", "0.05")
    assert fell.returncode == 1
    assert "beyond noise (270 rows that both have)" in fell.stdout
    assert "fell by more than --max-drift 0.05" in fell.stderr
    assert report(job, "--against", before, "--max-drift", "0.5").returncode == 0
    better = report(job, "--set", f"output.path={before}", "--against", tmp_path / "now", "--max-drift", "0.05")
    assert better.returncode == 0, better.stderr
    facts = json.loads(report(job, "--by", "category", "--against", before, "--json").stdout)
    assert facts["groups"][0]["name"] == "all"
    assert facts["drift"]["rows"] == 270


def test_a_job_may_have_more_tokens_than_an_int32_holds(tmp_path):
    rows = [row(i, random.Random(i), 0.5) | {"completion_tokens": 1_500_000_000} for i in (1, 2, 3)]
    narrow = [pl.col(name).cast(pl.Int32) for name in ("completion_tokens", "target_steps", "draft_tokens")]
    pl.DataFrame(rows).with_columns(narrow).write_parquet(tmp_path / f"part-00000-{0:016x}.parquet")
    assert acceptance.by(connect(str(tmp_path)), str(tmp_path), [])[0].tokens == 4_500_000_000


def test_what_was_not_drafted_has_no_rate(tmp_path, job):
    rng = random.Random(1)
    plain = parts(tmp_path / "now", [row(i, rng, 0.6, drafted=False) for i in range(1, 30)])
    assert "nothing drafted" in report(job, "--by", "prompt_length").stdout
    refused = report(job, "--against", plain)
    assert (refused.returncode, "nothing was drafted" in refused.stderr) == (2, True)
    unknown = report(job, "--by", "colour")
    assert unknown.returncode == 2
    assert "has no column colour; there are length, prompt_length, row_id" in unknown.stderr
