"""Personal data is found in real prompts, and once masked it is nowhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("presidio_analyzer")

from batchgen.pii import Finder

ROOT = Path(__file__).parents[1]
NAMES = {
    "EMAIL": "EMAIL_ADDRESS",
    "PHONE": "PHONE_NUMBER",
    "CREDIT_CARD": "CREDIT_CARD",
    "IBAN": "IBAN_CODE",
    "IP": "IP_ADDRESS",
}


@pytest.fixture(scope="module")
def finder() -> Finder:
    return Finder(tuple(NAMES.values()))


@pytest.fixture(scope="module")
def labelled() -> list[dict]:
    """Rows with synthetic personal data, which their `detail` lists, and some that only look so."""
    table = pl.read_parquet(ROOT / "tests/data/dirty_prompts.parquet")
    return table.filter(pl.col("defect").is_in(["pii", "pii_negative"])).to_dicts()


def secrets(row: dict) -> list[tuple[str, str]]:
    entities = json.loads(row["detail"])["entities"]
    return [(NAMES[each["type"]], each["text"]) for each in entities if each["type"] in NAMES]


def test_what_is_listed_is_found(finder, labelled):
    asked = found = 0
    for row in labelled:
        masked, kinds = finder.redact("\n\n".join(m["content"] for m in row["messages"]))
        for kind, text in secrets(row):
            asked += 1
            found += text not in masked and kinds[kind] > 0
    assert asked == 32
    assert found / asked >= 0.95


def test_what_only_looks_so_is_left_alone(finder, labelled):
    for row in (row for row in labelled if row["defect"] == "pii_negative" and row["expect"] == "accept"):
        for message in row["messages"]:
            assert finder.redact(message["content"]) == (message["content"], Counter())


def test_numbers_in_prompts_about_mathematics_and_code_are_left_alone(finder):
    for name in ("eagle_gsm8k", "eagle_humaneval"):
        for chat in pl.read_parquet(ROOT / f"examples/prompts/{name}.parquet")["messages"].to_list():
            assert not finder.redact(chat[0]["content"])[1], chat[0]["content"]


@given(before=st.text(max_size=30), after=st.text(max_size=30), gap=st.sampled_from([" ", "\n", ": ", " ("]))
def test_a_mail_address_is_masked_wherever_it_stands(finder, before, after, gap):
    masked, kinds = finder.redact(f"{before}{gap}maria.okafor@example.com {after}")
    assert "okafor" not in masked
    assert kinds["EMAIL_ADDRESS"] >= 1


@given(st.text())
def test_what_holds_nothing_is_returned_as_it_is(finder, text):
    masked, kinds = finder.redact(text)
    assert kinds or masked == text


@pytest.mark.parametrize("action", ["redact", "skip"])
def test_no_secret_is_in_any_file_or_line_of_a_job(tmp_path, labelled, action):
    broken = [{"role": "assistant", "content": "Write to maria.okafor@example.com."}]
    rows = [{"id": f"row-{i}", "messages": row["messages"]} for i, row in enumerate(labelled)]
    pl.DataFrame([*rows, {"id": "broken", "messages": broken}]).write_parquet(tmp_path / "in.parquet")
    sections = {
        "input": {"path": str(tmp_path / "in.parquet"), "messages": "messages", "id": "id"},
        "screen": {"pii": {"action": action}},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal", "options": {"kill": ["row-30"]}},
        "batch_size": 4,
        "checkpoint": {"journal_rows": 1},
        "max_error_rate": 1.0,
        "output": {"path": str(tmp_path / "out")},
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(sections))
    command = [sys.executable, "-m", "batchgen", "submit", str(job), "--log", "json"]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode < 0
    assert list(tmp_path.glob("out/__batchgen/journal/*/seg-*")), "there is a journal to look into"
    hidden = [text for row in labelled for _, text in secrets(row)] + ["maria.okafor@example.com"]

    def leaks(said: str) -> list[str]:
        files = [file.read_bytes() for file in tmp_path.glob("out/**/*") if file.is_file()]
        tables = [file for file in tmp_path.glob("out/**/*") if file.suffix in (".parquet", ".rows")]
        files += [str(pl.read_parquet(file).to_dicts()).encode() for file in tables]
        return [text for text in hidden if text in said or any(text.encode() in data for data in files)]

    assert not leaks(killed.stdout + killed.stderr)
    sections["engine"]["options"] = {}
    job.write_text(yaml.safe_dump(sections))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not leaks(done.stdout + done.stderr)
    table = pl.read_parquet(tmp_path / "out/*.parquet")
    assert table.height == len(labelled) + 1
    skipped = table.filter(pl.col("error_type") == "pii")
    if action == "skip":
        assert skipped["messages"].null_count() == skipped.height >= 29
        assert skipped.filter(pl.col("error") == "the conversation holds CREDIT_CARD 1").height >= 5
    else:
        assert skipped.height == 0
        assert "masked in prompts: " in done.stdout
        assert "<CREDIT_CARD>" in str(table["messages"].to_list())
