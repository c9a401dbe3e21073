"""Conversations given as user turns: one row each, every turn answered by the target, and what a user finds of it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
import yaml
from commandline import Piped, batchgen

if TYPE_CHECKING:
    from pathlib import Path

TURNS = [
    ["Name a city.", "Why that one?", "And another?"],
    ["What is 2 + 2?"],
    ["My mail is jo@example.org.", "Which mail did I say? Not ann@example.org?"],
]
SYSTEMS = ["Be brief.", None, None]


def job_file(folder: Path, table: pl.DataFrame, **changes: Any) -> Path:
    """A rehearsal of the conversations in `table`; `changes` replace whole sections."""
    table.write_parquet(folder / "in.parquet")
    sections = {
        "input": {"path": str(folder / "in.parquet"), "turns": "turns", "id": "id"},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal"},
        "sampling": {"max_tokens": 400},
        "output": {"path": str(folder / "out")},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(sections | changes))
    return file


def table(turns: list[Any] = TURNS) -> pl.DataFrame:
    return pl.DataFrame({"id": [str(i) for i in range(len(turns))], "turns": turns})


def output(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    done = batchgen("submit", file)
    assert done.returncode == 0, done.stderr
    rows = pl.read_parquet(file.parent / "out/*.parquet").rows(named=True)
    assert len({(row["row_id"], row["sample"]) for row in rows}) == len(rows)
    return {(row["row_id"], row["sample"]): row for row in rows}


def check(row: dict[str, Any], turns: list[str]) -> None:
    """Every turn stands there with its answer, and the counts are of all of them."""
    said = [message for message in row["messages"] if message["role"] != "system"]
    said.append({"role": "assistant", "content": row["completion"]})
    assert [message["content"] for message in said[::2]] == turns
    assert [message["role"] for message in said] == ["user", "assistant"] * len(turns)
    ids = row["prompt_token_ids"] + row["completion_token_ids"]
    assert [bytes(ids[a["start"] : a["stop"]]).decode() for a in row["answers"]] == [m["content"] for m in said[1::2]]
    assert all(message["content"] for message in said)
    assert row["answers"][-1]["start"] == len(row["prompt_token_ids"])
    assert row["answers"][-1]["stop"] == len(ids)
    written = sum(answer["stop"] - answer["start"] for answer in row["answers"])
    assert (row["completion_tokens"], row["prompt_tokens"]) == (written, len(ids) - written)
    assert row["target_steps"] == sum(answer["target_steps"] for answer in row["answers"])


def test_every_turn_is_answered_in_one_row(tmp_path):
    sampling = {"temperature": 0.7, "n": 2, "max_tokens": 400}
    system = table().with_columns(system=pl.Series(SYSTEMS))
    columns = {"path": str(tmp_path / "in.parquet"), "turns": "turns", "system": "system", "id": "id"}
    rows = output(job_file(tmp_path, system, sampling=sampling, input=columns))
    assert len(rows) == 6
    for (row_id, _), row in rows.items():
        check(row, TURNS[int(row_id)])
        assert row["messages"][0]["content"] == (SYSTEMS[int(row_id)] or TURNS[int(row_id)][0])
    first, second = rows["0", 0], rows["0", 1]
    assert first["messages"] != second["messages"]


@pytest.mark.parametrize("as_json", [False, True])
def test_answers_in_the_input_are_left_out(tmp_path, as_json):
    chats = [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Name a city."},
            {"role": "assistant", "content": "Rome, says the input."},
            {"role": "user", "content": "Why that one?"},
            {"role": "assistant", "content": "Because, says the input."},
        ]
    ]
    given = [json.dumps(chat) for chat in chats] if as_json else chats
    row = output(job_file(tmp_path, table(given)))["0", 0]
    check(row, ["Name a city.", "Why that one?"])
    assert row["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "says the input" not in json.dumps(row["messages"])


def test_a_conversation_that_outgrows_its_room_ends_there(tmp_path):
    rows = output(job_file(tmp_path, table(), screen={"max_prompt_tokens": 60}))
    cut = rows["0", 0]
    assert len(cut["answers"]) == 1
    check(cut, TURNS[0][:1])
    assert (cut["status"], cut["finish_reason"]) == ("ok", "length")
    assert cut["answers"][0]["finish_reason"] == "stop", "the answer itself is whole"
    assert rows["1", 0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("turns", "error_type", "error"),
    [
        ('["a", null]', "null_message", "messages[1] is null"),
        ('["a", " "]', "empty_prompt", "user turn 1, the first being 0, holds only characters that show nothing"),
        ("[]", "empty_messages", "the conversation has no messages"),
        ("null", "null_messages", "column 'turns' is null"),
        ('["a", {"role": "user", "content": "b"}]', "bad_messages", "messages[0] is a string"),
        ('[{"role": "tool", "content": "b"}]', "bad_role", "turn 0 is of role 'tool', expected user or assistant"),
        ('[{"role": "system", "content": "b"}]', "bad_role_order", "is the system's, expected the user's"),
        (
            '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]',
            "bad_role_order",
            "turn 1 is the user's, expected the assistant's",
        ),
        ('["\\ud800", "b"]', "bad_text", "lone surrogate"),
    ],
)
def test_what_cannot_be_answered_is_an_error_row(tmp_path, turns, error_type, error):
    file = job_file(tmp_path, table([turns]))
    assert batchgen("submit", file).returncode == 1
    [row] = pl.read_parquet(tmp_path / "out/*.parquet").rows(named=True)
    assert (row["status"], row["error_type"]) == ("error", error_type)
    assert error in row["error"]
    assert row["answers"] is None


def test_two_columns_of_prompts_are_refused(tmp_path):
    columns = {"path": str(tmp_path / "in.parquet"), "turns": "turns", "prompt": "id"}
    done = batchgen("plan", job_file(tmp_path, table(), input=columns))
    assert done.returncode == 2
    assert "input.turns: found another column of prompts besides, expected one of them" in done.stderr


def test_later_turns_are_screened_too(tmp_path):
    doubled = [*TURNS, TURNS[2], [*TURNS[1], "Sure?"]]
    pii = {"pii": {"action": "redact", "entities": ["EMAIL_ADDRESS"]}, "dedupe": "exact"}
    file = job_file(tmp_path, table(doubled), screen=pii)
    rows = output(file)
    masked = ["My mail is <EMAIL_ADDRESS>.", "Which mail did I say? Not <EMAIL_ADDRESS>?"]
    check(rows["2", 0], masked)
    assert rows["3", 0]["error_type"] == "duplicate"
    assert rows["4", 0]["status"] == "ok"
    done = batchgen("screen", file, "--to", tmp_path / "clean")
    assert done.returncode == 0, done.stderr
    clean = pl.read_parquet(tmp_path / "clean/*.parquet")
    assert clean["turns"].to_list() == [*TURNS[:2], masked, doubled[4]]


def test_no_answer_of_the_input_stays_where_personal_data_is_not_wanted(tmp_path):
    chats = [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which mail?"},
            {"role": "assistant", "content": "jo@example.org, says the input."},
        ]
    ]
    given = table(chats).with_columns(system=pl.Series([None], dtype=pl.String))
    columns = {"path": str(tmp_path / "in.parquet"), "turns": "turns", "system": "system", "id": "id"}
    file = job_file(tmp_path, given, screen={"pii": {"action": "skip"}}, input=columns)
    done = batchgen("screen", file, "--to", tmp_path / "clean")
    assert done.returncode == 0, done.stderr
    [row] = pl.read_parquet(tmp_path / "clean/*.parquet").rows(named=True)
    assert (row["turns"], row["system"]) == ([{"role": "user", "content": "Which mail?"}], "Be brief.")


def test_a_conversation_that_was_killed_begins_again(tmp_path):
    many = table([[f"Question {i}, turn {turn}?" for turn in range(4)] for i in range(40)])
    slow = {"kind": "rehearsal", "options": {"step_s": 0.05, "tokens_per_step": 16}}
    common = {"batch_size": 4, "checkpoint": {"journal_rows": 2, "lease_seconds": 2.0}}
    file = job_file(tmp_path, many, engine=slow, **common)
    process = Piped("submit", file)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out/__batchgen/journal/*/seg-*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not list(tmp_path.glob("out/part-*"))
    rows = output(job_file(tmp_path, many, **common))
    other = tmp_path / "undisturbed"
    other.mkdir()
    expected = output(job_file(other, many, **common))
    told = ("messages", "completion", "prompt_token_ids", "completion_token_ids")
    assert {key: [row[name] for name in told] for key, row in rows.items()} == {
        key: [row[name] for name in told] for key, row in expected.items()
    }
    for (row_id, _), row in rows.items():
        check(row, many["turns"][int(row_id)].to_list())


def test_exports_and_reports_take_all_answers(tmp_path):
    file = job_file(tmp_path, table())
    rows = output(file)
    done = batchgen("export", file, "--form", "specforge", "--to", tmp_path / "text")
    assert done.returncode == 0, done.stderr
    [text] = (tmp_path / "text").glob("*.jsonl")
    said = {row["id"]: row["conversations"] for row in map(json.loads, text.read_text().splitlines())}
    assert [message["role"] for message in said["0/0"]] == ["user", "assistant"] * 3
    done = batchgen("report", file)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/__batchgen/summary.json").read_text())
    written = sum(row["completion_tokens"] for row in rows.values())
    steps = sum(row["target_steps"] for row in rows.values())
    assert (summary["answers"], summary["completion_tokens"]) == (6, written)
    assert summary["acceptance_length"] == pytest.approx((written - 6) / steps)
