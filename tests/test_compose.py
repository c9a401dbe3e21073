"""Prompts that are composed around texts are of as many kinds as asked for, about these texts, and the same by seed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Sequence

SCRIPT = Path(__file__).parents[1] / "examples/train_head/compose.py"
TEXTS = [f"Rivers carry water. In number {i} fishers wait for salmon. Their patience is large!" for i in range(5)]


def composed(folder: Path, seed: int, texts: Sequence[str | None] = (*TEXTS, None), **asked: int) -> pl.DataFrame:
    pl.DataFrame({"text": texts}, schema={"text": pl.String}).write_parquet(folder / "texts.parquet")
    options = [f"--{name}={value}" for name, value in asked.items()]
    options += [f"--seed={seed}", f"--to={folder / 'prompts.parquet'}"]
    subprocess.run([sys.executable, str(SCRIPT), str(folder / "texts.parquet"), *options], check=True)
    return pl.read_parquet(folder / "prompts.parquet")


def test_prompts_are_about_the_texts(tmp_path: Path) -> None:
    kinds = {"passages": 30, "words": 20, "subjects": 10}
    table, subjects = composed(tmp_path, 1, **kinds), SCRIPT.with_name("subjects.txt").read_text().splitlines()
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
    assert composed(tmp_path, 1, **kinds).equals(table)
    assert not composed(tmp_path, 2, **kinds).equals(table)


def test_tasks_are_put_together_of_parts(tmp_path: Path) -> None:
    table, subjects = composed(tmp_path, 1, tasks=300), SCRIPT.with_name("subjects.txt").read_text().splitlines()
    tasks = [message["content"] for [message] in table["messages"]]
    assert set(table["category"]) == {"task"}
    assert len(set(tasks)) == 300
    assert all(any(subject in task for subject in subjects) for task in tasks)
    assert not any("{" in task for task in tasks)
    sentences = [len(re.findall(r'[.?]"?(?= |$)', task)) for task in tasks]
    assert min(sentences) == 1, "a request alone"
    assert sum(num >= 3 for num in sentences) > 30, "a setting, a request and a wish"


def test_what_the_target_lists_is_asked(tmp_path: Path) -> None:
    """Items that are too short, that the end of the answer cut off, or that ask for nothing, are no questions."""
    lists = composed(tmp_path, 1, lists=5)
    assert lists["category"].to_list() == ["list"] * 5
    questions = ["How do plants use the light of the sun?", "What is the difference between xylem and phloem?"]
    items = [f"1. \u201c{questions[0]}\u201d", "2. Why so?", f"* **{questions[1]}**", "4. Explain in your own words wh"]
    items += ["5. The moon orbits the earth in a circle.", "6. Write a letter about [a subject of your choice]."]
    answer = "\n".join(["Here are four:\n", *items])
    table = composed(tmp_path, 1, [answer, answer, None], listed=5)
    assert sorted(message["content"] for [message] in table["messages"]) == questions
