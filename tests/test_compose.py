"""Prompts that are composed around texts are of as many kinds as asked for, about these texts, and the same by seed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import polars as pl

SCRIPT = Path(__file__).parents[1] / "examples/train_head/compose.py"
TEXTS = [f"Rivers carry water. In number {i} fishers wait for salmon. Their patience is large!" for i in range(5)]


def composed(folder: Path, seed: int) -> pl.DataFrame:
    pl.DataFrame({"text": [*TEXTS, None]}).write_parquet(folder / "texts.parquet")
    asked = {
        "column": "text",
        "passages": 30,
        "words": 20,
        "subjects": 10,
        "seed": seed,
        "to": folder / "prompts.parquet",
    }
    options = [f"--{name}={value}" for name, value in asked.items()]
    command = [sys.executable, str(SCRIPT), str(folder / "texts.parquet"), *options]
    subprocess.run(command, check=True)
    return pl.read_parquet(folder / "prompts.parquet")


def test_prompts_are_about_the_texts(tmp_path: Path) -> None:
    table, subjects = composed(tmp_path, 1), SCRIPT.with_name("subjects.txt").read_text().splitlines()
    assert dict(table["category"].value_counts().rows()) == {"passage": 30, "word": 20, "subject": 10}
    assert table["id"].n_unique() == 60
    for kind, [message] in table.select("category", "messages").rows():
        assert message["role"] == "user"
        instruction, _, about = message["content"].partition("\n\n")
        assert instruction
        if kind == "passage":
            assert any(about in text for text in TEXTS)
        else:
            about_words = any(word in instruction for word in ("salmon", "fishers", "number", "patience"))
            about_subject = any(re.search(rf"\b{re.escape(subject)}\b", instruction) for subject in subjects)
            assert (about_words, about_subject) == (kind == "word", kind == "subject"), instruction
    assert composed(tmp_path, 1).equals(table)
    assert not composed(tmp_path, 2).equals(table)
