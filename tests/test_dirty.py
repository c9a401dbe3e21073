"""192 labelled bad rows: each ends as a prompt or as a verdict, and no text of a row becomes a control token."""

from __future__ import annotations

import collections
import json
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

from batchgen import models, read, screen
from batchgen.columns import Columns
from batchgen.record import Row, Sampling, Shard
from batchgen.render import Renderer
from batchgen.store import connect

if TYPE_CHECKING:
    from pathlib import Path

# What each kind of defect comes to, as status or error type: how many rows. The labels' `expect` is a suggestion; where
# we differ the reason stands beside it.
VERDICTS = {
    "bad_id": {"bad_id": 2, "ok": 5},  # only null is no id: `NaN`, `CON` and 💩 are fine in a Parquet table
    "bad_role_order": {"bad_role_order": 4, "bad_role": 1},  # one of them is a tool's answer
    "bidi_control": {"ok": 3},
    "control_ok": {"ok": 6},
    "control_or_nonchar": {"ok": 12, "empty_prompt": 1},  # the model sees what was written; 64 times NUL is nothing
    "degenerate_content": {"ok": 2, "prompt_too_long": 4},
    "duplicate_id_different_content": {"ok": 3, "duplicate_id": 1},  # the others' twins are not in this file
    "duplicate_id_same_content": {"ok": 4},
    "emoji": {"ok": 5},
    "emoji_only": {"ok": 2},
    "empty_last_user_turn": {"empty_prompt": 1},
    "empty_messages_list": {"empty_messages": 3},
    "empty_string": {"empty_prompt": 3},
    "empty_system": {"ok": 1},
    "escaped_lone_surrogate": {"ok": 4},  # backslashes and letters, not surrogates
    "extreme_unicode": {"ok": 7, "prompt_too_long": 2},
    "id_collides_with_eval_file": {"ok": 2},  # ids are compared within a shard
    "invalid_role": {"bad_role": 10},
    "long_but_plausible": {"prompt_too_long": 2},
    "mojibake_or_replacement": {"ok": 4},
    "nfc_nfd_pair": {"ok": 2},
    "null_content": {"null_content": 3},
    "null_content_mid_history": {"null_content": 1},
    "null_messages": {"null_messages": 3},
    "null_messages_turns_present": {"null_messages": 2},
    "null_struct_in_list": {"null_message": 1},
    "oversize_200k": {"prompt_too_long": 3},
    "oversize_history": {"prompt_too_long": 1},
    "pii": {"ok": 35},  # personal data is not looked for yet
    "pii_negative": {"ok": 4},
    "rtl_mixed": {"ok": 2},
    "rtl_text": {"ok": 2},
    "special_token_injection": {"ok": 22},
    "text_injection": {"ok": 8},
    "turns_messages_mismatch": {"ok": 2},  # the job reads messages alone
    "whitespace_or_invisible_only": {"empty_prompt": 7},
}


@pytest.fixture(scope="session")
def path(request: pytest.FixtureRequest) -> Path:
    return request.config.rootpath / "tests/data/dirty_prompts.parquet"


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    demo = models.fetch("demo:smollm2-135m")
    return Renderer(demo.path, special_tokens="text", max_prompt_tokens=2048, max_model_tokens=8192)


@pytest.fixture(scope="session")
def rows(path: Path, renderer: Renderer) -> list[Row]:
    store = connect(str(path))
    shard = Shard(0, str(path), store.info(str(path)).version, 0, pq.read_metadata(path).num_rows, "f")
    columns = Columns(messages="messages", id="id", keep=("defect", "detail"))
    return list(renderer.rows(screen.Screen().rows(read.Reader(store).rows(shard, columns, Sampling()))))


def test_every_row_comes_out_as_a_prompt_or_as_a_verdict(rows: list[Row]) -> None:
    assert [row.index for row in rows] == list(range(192))
    assert len({row.row_id for row in rows}) == 192
    assert all((row.prompt_token_ids is None) != (row.verdict is None) for row in rows)
    assert all(row.messages for row in rows if row.verdict is None)


def test_every_kind_of_defect_has_the_verdict_that_was_decided(rows: list[Row]) -> None:
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        found[row.kept["defect"]][row.verdict.error_type if row.verdict else "ok"] += 1
    assert found == VERDICTS
    assert {row.verdict.error_type for row in rows if row.verdict and row.verdict.status == "skipped"} == {
        "prompt_too_long"
    }


def test_errors_are_one_short_line_that_repeats_no_prompt(rows: list[Row]) -> None:
    errors = [row.verdict.error for row in rows if row.verdict]
    assert all(len(error) <= 300 and "\n" not in error for error in errors)
    assert all(
        message["content"] not in row.verdict.error
        for row in rows
        if row.verdict
        for message in row.messages or []
        if len(message["content"]) > 20
    )


def test_no_text_of_a_row_becomes_a_control_token(rows: list[Row], renderer: Renderer) -> None:
    for row in rows:
        if row.verdict is None:
            assert row.messages is not None
            ids = [i for i in row.prompt_token_ids or () if i in renderer._controls]
            assert [renderer._controls[i].content for i in ids] == [
                *["<|im_start|>", "<|im_end|>"] * len(row.messages),
                "<|im_start|>",
            ]


def test_injected_control_strings_are_still_there_as_text(rows: list[Row], renderer: Renderer, path: Path) -> None:
    given = pq.read_table(path, columns=["messages"])["messages"].to_pylist()
    injected = [row for row in rows if row.kept["defect"] == "special_token_injection"]
    assert len(injected) == 22
    for row in injected:
        text = renderer._tokenizer.decode(row.prompt_token_ids)
        for message in given[row.index]:
            assert message["content"] in text, json.loads(row.kept["detail"])


def test_only_an_over_long_prompt_is_called_too_long(rows: list[Row]) -> None:
    lengths = [len(row.prompt_token_ids or ()) for row in rows if row.verdict is None]
    assert max(lengths) <= 2048
    assert "the prompt has 600030 tokens, allowed are 2048 (screen.max_prompt_tokens)" in {
        row.verdict.error for row in rows if row.verdict
    }
