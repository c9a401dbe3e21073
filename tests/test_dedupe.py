"""Of equal prompts the first is generated: over files, over nights, whatever the order in which files come."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen import dedupe, job, plan
from batchgen.columns import Columns
from batchgen.errors import DrainedError, OutputConflictError
from batchgen.record import Sampling, Shard
from batchgen.spec import load
from batchgen.store import connect

COLUMNS = Columns(prompt="prompt", keep=("extra",))


def mark(
    folder: Path,
    names: list[str],
    columns: Columns = COLUMNS,
    kind: dedupe.Kind = "exact",
    sampling: Sampling = Sampling(),  # noqa: B008  # frozen
) -> dict[tuple[str, int], str]:
    """Where each repetition in the files is, and what it repeats."""
    store, files = connect(str(folder)), []
    for name in names:
        url = f"{folder}/{name}"
        rows = pl.read_parquet(url).height
        files.append(plan.File(url, store.info(url).version, rows, pa.schema([])))
    num = dedupe.mark(store, store, f"{folder}/out", files, columns, sampling, kind)
    found = {}
    for file in files:
        shard = Shard(0, file.url, file.version, 0, file.num_rows, "")
        again = dedupe.Noted(store, f"{folder}/out", columns, sampling, kind).repetitions(shard)
        found |= {(Path(file.url).name, index): first.replace(f"{folder}/", "") for index, first in again.items()}
    assert len(found) == num
    return found


def table(folder: Path, name: str, prompts: list[str | None], **more: list[Any]) -> None:
    extra = list(range(len(prompts)))
    pl.DataFrame({"prompt": prompts, "extra": extra, **more}, schema_overrides={"prompt": pl.String}).write_parquet(
        folder / name
    )


@settings(max_examples=40)
@given(
    files=st.lists(st.lists(st.sampled_from("abcdef "), max_size=12), min_size=1, max_size=4),
    at_once=st.integers(1, 30),
)
def test_all_but_the_first_of_equal_prompts_are_found(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], at_once: int
) -> None:
    """However many rows are compared at once; an empty prompt is an error by itself, and repeats nothing."""
    folder = tmp_path_factory.mktemp("in")
    names = [f"{i}.parquet" for i in range(len(files))]
    firsts: dict[str, str] = {}
    expected = {}
    for name, prompts in zip(names, files, strict=True):
        table(folder, name, list(prompts))
        for i, prompt in enumerate(prompts):
            if prompt == " ":
                continue
            if prompt in firsts:
                expected[name, i] = firsts[prompt]
            firsts.setdefault(prompt, f"row {i} of {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedupe, "_ROWS_AT_ONCE", at_once)
        assert mark(folder, names) == expected


def test_other_sampling_is_another_question(tmp_path: Path) -> None:
    table(tmp_path, "a.parquet", ["x", "x", "x", None, None], warmth=[None, 0.5, 0.5, None, None])
    columns = Columns(prompt="prompt", sampling={"temperature": "warmth"})
    assert mark(tmp_path, ["a.parquet"], columns) == {("a.parquet", 2): "row 1 of a.parquet"}


def test_hashes_of_before_the_job_file_changed_are_not_compared_with(tmp_path: Path) -> None:
    table(tmp_path, "a", ["x"])
    assert not mark(tmp_path, ["a"], sampling=Sampling(max_tokens=512))
    table(tmp_path, "b", ["x"])
    assert mark(tmp_path, ["a", "b"], sampling=Sampling(max_tokens=256)) == {("b", 0): "row 0 of a"}


def test_a_file_that_comes_later_repeats_whatever_its_name(tmp_path: Path) -> None:
    table(tmp_path, "b.parquet", ["x", "y"])
    assert mark(tmp_path, ["b.parquet"]) == {}
    table(tmp_path, "a.parquet", ["y", "z"])
    both = {("a.parquet", 0): "row 1 of b.parquet"}
    assert mark(tmp_path, ["a.parquet", "b.parquet"]) == both
    hashed = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out/__batchgen/dedupe").glob("*.hashes")}
    assert mark(tmp_path, ["a.parquet", "b.parquet"]) == both
    assert hashed == {
        file.name: file.stat().st_mtime_ns for file in (tmp_path / "out/__batchgen/dedupe").glob("*.hashes")
    }, "each file is read once"


def test_a_job_generates_each_prompt_once_and_says_what_the_others_repeat(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    chats = [[{"role": "user", "content": f"Say {i % 4}."}] for i in range(10)]
    pl.DataFrame({"id": [f"a{i}" for i in range(10)], "messages": chats}).write_parquet(tmp_path / "in/b.parquet")
    sections = {
        "input": {"path": str(tmp_path / "in"), "messages": "messages", "id": "id"},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal"},
        "screen": {"dedupe": "exact"},
        "checkpoint": {"rows_per_part": 3},
        "workers": {"count": 1},
        "output": {"path": str(tmp_path / "out")},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(sections))

    def submit() -> dict[str, Any]:
        command = [sys.executable, "-m", "batchgen", "submit", str(file), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    facts = submit()
    assert (facts["ok"], facts["skipped"], facts["reasons"]) == (4, 6, {"skipped: duplicate": 6})
    # The next night's file sorts before.
    pl.DataFrame(
        {"id": ["b0", "b1"], "messages": [chats[1], [{"role": "user", "content": "Something new"}]]}
    ).write_parquet(tmp_path / "in/a.parquet")
    assert submit()["ok"] == 5
    rows = pl.read_parquet(tmp_path / "out/*.parquet").sort("row_id")
    skipped = rows.filter(pl.col("status") == "skipped")
    assert skipped["row_id"].to_list() == [f"a{i}" for i in range(4, 10)] + ["b0"]
    assert skipped["error"][-1] == f"asks what row 1 of {tmp_path}/in/b.parquet asks"
    assert skipped["completion_tokens"].to_list() == [0] * 7


NAMES = ("a.parquet", "b.parquet")
NIGHTS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from(NAMES), st.lists(st.sampled_from("xy"), min_size=1, max_size=2)),
        st.tuples(st.just("remove"), st.sampled_from(NAMES), st.none()),
        st.tuples(st.just("run"), st.sampled_from((*NAMES, "first rows", "all")), st.none()),
    ),
    min_size=4,
    max_size=8,
)


class Nights:
    """Files of a folder, and the rows of them that stand in an output: every row is a shard."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store, self.out = folder, connect(str(folder)), f"{folder}/out"
        # Of each row its prompt, and whether it is answered.
        self.parts: dict[tuple[str, str, int], tuple[str, bool]] = {}

    def write(self, name: str, prompts: list[str], stamp: int) -> None:
        self.forget(f"{self.folder}/{name}")  # parts of another version are refused
        table(self.folder, name, prompts)
        os.utime(self.folder / name, (stamp, stamp))

    def forget(self, *prefix: str) -> None:
        for key in [key for key in self.parts if key[: len(prefix)] == prefix]:
            del self.parts[key]

    def run(self, which: str) -> None:
        there = [name for name in NAMES if (self.folder / name).exists()]
        prompts = {name: pl.read_parquet(self.folder / name)["prompt"].to_list() for name in there}
        urls = {name: f"{self.folder}/{name}" for name in there}
        files = [plan.File(urls[n], self.store.info(urls[n]).version, len(prompts[n]), pa.schema([])) for n in there]
        while (refused := self.mark(files)) is not None:
            named = [file for file in files if Path(file.url).name in refused.partition(" as ")[0]]
            assert named
            for file in named:  # as it says
                self.forget(file.url, file.version)
        for name, file in zip(there, files, strict=True):
            if which in (name, "all", "first rows"):
                shard = Shard(0, file.url, file.version, 0, 1 if which == "first rows" else file.num_rows, "")
                again = dedupe.Noted(self.store, self.out, COLUMNS, Sampling(), "exact").repetitions(shard)
                for i in range(shard.stop):
                    self.parts.setdefault((file.url, file.version, i), (prompts[name][i], i not in again))

    def mark(self, files: list[plan.File]) -> str | None:
        """What it was refused for."""
        known = {
            file.url: [i for url, version, i in self.parts if (url, version) == (file.url, file.version)]
            for file in files
        }
        done = {url: [dedupe.Done(i, i + 1, url) for i in sorted(rows)] for url, rows in known.items() if rows}
        others = [(url, version, i, i + 1) for url, version, i in self.parts if url not in known]
        over = all(len(known[file.url]) == file.num_rows for file in files)
        marking = functools.partial(dedupe.mark, done=done, elsewhere=lambda: others, only_lost=over)
        try:
            marking(self.store, self.store, self.out, files, COLUMNS, Sampling(), "exact")
        except OutputConflictError as refused:
            return str(refused)
        return None


@settings(max_examples=200)
@given(NIGHTS)
def test_every_prompt_is_answered_whatever_becomes_of_files(
    tmp_path_factory: pytest.TempPathFactory, nights: list[tuple[str, str, Any]]
) -> None:
    """Files come, change and go, and runs end with some rows done: none stands as the repetition of nothing."""
    folder = Nights(tmp_path_factory.mktemp("in"))
    for stamp, (what, name, prompts) in enumerate([*nights, ("run", "all", None)]):
        if what == "run":
            folder.run(name)
        elif what == "write":
            folder.write(name, prompts, stamp)
        else:
            (folder.folder / name).unlink(missing_ok=True)
    answered = {prompt for prompt, is_answered in folder.parts.values() if is_answered}
    # Whom nobody asks any more owes no answer.
    assert answered >= {prompt for (url, *_), (prompt, _) in folder.parts.items() if Path(url).exists()}


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_row_journalled_as_a_repetition_is_judged_anew(tmp_path: Path, change: str) -> None:
    """What it repeats went away between two tries at its shard."""
    table(tmp_path, "a.parquet", ["b", "x"])
    table(tmp_path, "z.parquet", ["b", "c"])
    sections = {
        "version": 1,
        "input": {"path": f"{tmp_path}/*.parquet", "prompt": "prompt"},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal", "options": {"tokens_per_step": 1}},
        "screen": {"dedupe": "exact"},
        "output": {"path": f"{tmp_path}/out"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(sections))
    loaded, looks = load(tmp_path / "job.yaml"), itertools.count()
    with pytest.raises(DrainedError):
        job.submit(loaded, draining=lambda: next(looks) > 8)
    assert any((tmp_path / "out/__batchgen/journal").rglob("*.rows"))
    (tmp_path / "a.parquet").unlink()
    if change == "replaced":
        table(tmp_path, "a.parquet", ["y", "x"])
    done = job.submit(loaded)
    assert (done.summary.skipped, done.summary.problems) == (0, [])


@settings(max_examples=20)
@given(
    texts=st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True),
    copies=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["", " ", "\n", "?", " please"])), max_size=6),
)
def test_nearly_equal_prompts_are_found(
    tmp_path_factory: pytest.TempPathFactory, texts: list[int], copies: list[tuple[int, str]]
) -> None:
    """A long question with a word more is the same one; questions about other things are not."""
    pytest.importorskip("rensa")
    folder = tmp_path_factory.mktemp("in")
    words = ["river", "copper", "violin", "harvest", "glacier", "lantern", "orchard", "meadow", "falcon", "cinder"]
    drawn = [random.Random(text).choices(words, k=60) for text in texts]
    long = [
        " ".join(f"{word}{i * text % 97}" for i, word in enumerate(chosen))
        for text, chosen in zip(texts, drawn, strict=True)
    ]
    table(folder, "a.parquet", long)
    table(folder, "b.parquet", [long[i % len(long)].upper() + more for i, more in copies])
    found = mark(folder, ["a.parquet", "b.parquet"], kind="near")
    assert found == {("b.parquet", at): f"row {i % len(long)} of a.parquet" for at, (i, _) in enumerate(copies)}


@pytest.mark.parametrize(("share", "low", "high"), [(0.9, 0.98, 1.0), (0.8, 0.85, 1.0), (0.5, 0.0, 0.2)])
def test_likeness_decides_as_documented(tmp_path: Path, share: float, low: float, high: float) -> None:
    pytest.importorskip("rensa")
    draw = random.Random(1)
    first, second = [], []
    for _ in range(200):
        # Groups of one sign each are as good as unique, so equal blocks are the share of groups in common.
        blocks = ["".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(40)) for _ in range(30)]
        kept = round(30 * 2 * share / (1 + share))
        first.append("".join(blocks))
        second.append(
            "".join(blocks[:kept]) + "".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(40 * (30 - kept)))
        )
    table(tmp_path, "a.parquet", first)
    table(tmp_path, "b.parquet", second)
    found = mark(tmp_path, ["a.parquet", "b.parquet"], kind="near")
    assert low <= len(found) / 200 <= high
    assert all(row == f"row {at[1]} of a.parquet" for at, row in found.items())


def test_likeness_does_not_pass_along(tmp_path: Path) -> None:
    """A row is left out for one that stays, not for one that is left out itself; other system messages are others."""
    pytest.importorskip("rensa")
    draw = random.Random(2)
    text = [chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(800)]
    chain = []
    for step in range(30):
        for at in range(step * 25, step * 25 + 25):
            text[at] = chr(draw.randrange(0x4E00, 0x9FFF))
        chain.append("".join(text))
    table(tmp_path, "a.parquet", chain, system=["Be brief."] * 30)
    found = mark(tmp_path, ["a.parquet"], kind="near")
    left_out = {row for _, row in found}
    assert 5 < len(left_out) < 29
    assert not {int(first.split()[1]) for first in found.values()} & left_out
    columns = Columns(prompt="prompt", system="system")
    table(tmp_path, "b.parquet", chain, system=[f"You are assistant number {i}." for i in range(30)])
    assert mark(tmp_path, ["b.parquet"], columns, kind="near") == {}
    one = [f"Question {draw.random()}: {draw.getrandbits(200):x}" for _ in range(10)]
    table(tmp_path, "c.parquet", one, system=["You are a helpful assistant who always answers safely. " * 20] * 10)
    assert mark(tmp_path, ["c.parquet"], columns, kind="near") == {}
