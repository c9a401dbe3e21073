"""What a job produced is read from its parts; a part that is damaged is said, and hides nothing of the others."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen import record, report, write
from batchgen.plan import File, Plan
from batchgen.record import Shard
from batchgen.store import Store, connect

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = record.output_schema([])
SUMS = ("prompt_tokens", "completion_tokens", "target_steps", "draft_steps", "draft_tokens", "accepted_tokens")
SUMS += ("lookup_tokens", "accepted_lookup_tokens")
DEPTHS = ("drafted_per_depth", "accepted_per_depth")
SHARDS = [Shard(i, f"in/{i}.parquet", "1", 0, 4, "f") for i in range(3)]


def row(row_id: str, sample: int = 0, **values: Any) -> dict[str, Any]:
    facts = {"status": "ok", "prompt_tokens": 3, "completion_tokens": 5, "target_steps": 2, "accepted_per_depth": [2]}
    return {"row_id": row_id, "sample": sample} | facts | values


def folder(tmp_path: Path, parts: list[list[dict[str, Any]]]) -> tuple[Store, str]:
    store, out = connect(str(tmp_path)), str(tmp_path / "out")
    for shard, rows in zip(SHARDS, parts, strict=True):
        assert write.commit(store, out, shard, pa.Table.from_pylist(rows, schema=SCHEMA), metadata={})
    return store, out


def summarised(store: Store, out: str, samples: int = 1) -> report.Summary:
    files = [File(shard.file, shard.version, shard.num_rows, pa.schema([])) for shard in SHARDS]
    return report.summarise(store, out, Plan(files, SHARDS, "f"), samples)


def full(samples: int = 1) -> list[list[dict[str, Any]]]:
    return [[row(f"{shard.file}#{i}", s) for i in range(4) for s in range(samples)] for shard in SHARDS]


def path_of(tmp_path: Path, shard: Shard) -> Path:
    return tmp_path / "out" / shard.part_name


def test_a_whole_job_has_no_problems(tmp_path: Path) -> None:
    summary = summarised(*folder(tmp_path, full(samples=2)), samples=2)
    assert (summary.problems, summary.ok, summary.parts) == ([], 24, 3)


@pytest.mark.parametrize("damage", ["cut", "empty", "page", "footer", "column"])
def test_a_damaged_part_is_a_problem_and_not_a_traceback(tmp_path: Path, damage: str) -> None:
    store, out = folder(tmp_path, full())
    path = path_of(tmp_path, SHARDS[1])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "empty":
        data.clear()
    elif damage == "column":
        table = pq.read_table(path).drop_columns("status")
        pq.write_table(table, path)
        data = bytearray(path.read_bytes())
    else:
        data[60 if damage == "page" else -6] ^= 0xFF
    path.write_bytes(data)
    summary = summarised(store, out)
    [problem] = summary.problems
    assert problem.startswith(f"{path}: does not read back (")
    assert problem.endswith("); remove it and submit again")
    assert "\n" not in problem
    assert (summary.ok, summary.parts) == (8, 2), "the other parts count"


def test_no_flipped_byte_is_a_traceback(tmp_path: Path) -> None:
    store, out = folder(tmp_path, full())
    path = path_of(tmp_path, SHARDS[1])
    good = path.read_bytes()
    for at in random.Random(0).sample(range(len(good)), 150):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        for problem in summarised(store, out).problems:
            assert "\n" not in problem


def test_missing_and_short_parts_are_counted(tmp_path: Path) -> None:
    parts = full()
    del parts[1][2:]
    store, out = folder(tmp_path, parts)
    path_of(tmp_path, SHARDS[2]).unlink()
    assert summarised(store, out).problems == [
        f"1 of 3 parts are missing: {SHARDS[2].part_name}",
        f"{path_of(tmp_path, SHARDS[1])}: 2 rows, expected 4",
    ]


def test_ids_that_stand_twice_are_named(tmp_path: Path) -> None:
    parts = full()
    parts[1][0]["row_id"] = parts[2][3]["row_id"] = parts[0][1]["row_id"]
    [problem] = summarised(*folder(tmp_path, parts)).problems
    assert problem == (
        "2 rows share their id and sample with another (in/0.parquet#1); input.id must be unique over all files"
    )


def test_samples_of_one_row_are_not_doubles(tmp_path: Path) -> None:
    parts = full(samples=2)
    assert not summarised(*folder(tmp_path, parts), samples=2).problems


NUMBERS = st.none() | st.integers(0, 2**31 - 1)
ROWS = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["ok", "ok", "error", "skipped"]),
        "error_type": st.sampled_from([None, "too_long", "bad_id"]),
        **dict.fromkeys(DEPTHS, st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=4)),
        **dict.fromkeys(SUMS, NUMBERS),
    }
)


@settings(max_examples=30)
@given(st.lists(ROWS, min_size=12, max_size=12))
def test_sums_are_those_of_plain_counting(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    rows = [row(str(i), **value) for i, value in enumerate(values)]
    summary = summarised(*folder(tmp_path_factory.mktemp("sums"), [rows[:4], rows[4:8], rows[8:]]))
    ok = [one for one in rows if one["status"] == "ok"]
    for name in SUMS:
        assert getattr(summary, name) == sum(one[name] or 0 for one in ok), name
    for name in DEPTHS:
        depths = [one[name] or [] for one in ok]
        deepest = max(map(len, depths), default=0)
        assert getattr(summary, name) == [sum(d[i] for d in depths if i < len(d)) for i in range(deepest)], name
    assert summary.problems == []
    for status in ("ok", "error", "skipped"):
        assert getattr(summary, status) == sum(one["status"] == status for one in rows)
    reasons = [f"{one['status']}: {one['error_type']}" for one in rows if one["status"] != "ok"]
    assert summary.reasons == {reason: reasons.count(reason) for reason in reasons}
