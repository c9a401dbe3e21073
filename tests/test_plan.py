"""Planning reads footers only, and a shard's identity is its hash alone."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen import plan, spec
from batchgen.errors import InputError
from batchgen.record import Shard
from batchgen.store import connect


def loaded(folder: Path, path: str, **changes: object) -> spec.Spec:
    file = folder / "job.yaml"
    text = f"""
version: 1
input: {{path: "{path}", prompt: prompt}}
model: {{target: demo:smollm2-135m}}
output: {{path: "{folder}/out"}}
checkpoint: {{rows_per_part: 100}}
"""
    file.write_text(text)
    return spec.load(str(file), [f"{key}={value}" for key, value in changes.items()])


def write(path: Path, num_rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"prompt": [f"prompt {i}" for i in range(num_rows)]}).write_parquet(path)


def test_every_row_is_in_exactly_one_shard(tmp_path):
    for name, num in (("a", 250), ("b", 100), ("c", 0), ("d", 1)):
        write(tmp_path / f"in/{name}.parquet", num)
    made = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/in"), "f")
    covered = [(Path(s.file).name, i) for s in made.shards for i in range(s.start, s.stop)]
    assert covered == [(f"{n}.parquet", i) for n, num in (("a", 250), ("b", 100), ("d", 1)) for i in range(num)]
    assert [s.index for s in made.shards] == list(range(5))
    assert len({s.key for s in made.shards}) == 5
    assert made.num_rows == 351


def test_a_thousand_files_plan_in_seconds(tmp_path):
    write(tmp_path / "one.parquet", 1000)
    data = (tmp_path / "one.parquet").read_bytes()
    (tmp_path / "in").mkdir()
    for i in range(1000):
        (tmp_path / f"in/{i:04d}.parquet").write_bytes(data)
    began = time.monotonic()
    made = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/in/*.parquet"), "f")
    assert made.num_rows == 1_000_000
    assert time.monotonic() - began < 30


def test_planning_on_object_storage_reads_no_data(gcs_folder, tmp_path):
    url, options = gcs_folder
    store = connect(url, options)
    write(tmp_path / "x.parquet", 5000)
    for i in range(3):
        store.put(f"{url}/in/{i}.parquet", (tmp_path / "x.parquet").read_bytes())
    made = plan.make(store, loaded(tmp_path, f"{url}/in/*.parquet"), "f")
    assert made.num_rows == 15000
    assert len(made.shards) == 150


def test_a_footer_longer_than_the_tail_is_read_all_the_same(tmp_path):
    columns = {f"a rather long column name, number {i}": pa.array([1]) for i in range(1500)}
    pq.write_table(pa.table(columns | {"prompt": pa.array(["x"])}), tmp_path / "wide.parquet")
    assert (tmp_path / "wide.parquet").stat().st_size > plan.TAIL_BYTES
    made = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/wide.parquet"), "f")
    assert made.num_rows == 1


def test_what_is_hidden_or_not_parquet_is_not_input(tmp_path):
    for name in ("in/a.parquet", "in/_old/b.parquet", "in/.tmp.parquet", "in/sub/c.parquet"):
        write(tmp_path / name, 1)
    (tmp_path / "in/README.md").write_text("not a table")
    made = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/in"), "f")
    assert [Path(f.url).name for f in made.files] == ["a.parquet", "c.parquet"]


def test_no_input_and_no_parquet_are_errors_that_name_the_path(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.parquet"):
        plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/nothing.parquet"), "f")
    (tmp_path / "text.parquet").write_text("this is text")
    with pytest.raises(InputError, match=r"text\.parquet.*not a readable Parquet"):
        plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/text.parquet"), "f")


def test_a_changed_file_makes_other_shards(tmp_path):
    write(tmp_path / "a.parquet", 50)
    before = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/a.parquet"), "f")
    write(tmp_path / "a.parquet", 51)
    after = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/a.parquet"), "f")
    assert not {s.key for s in before.shards} & {s.key for s in after.shards}


@given(
    st.tuples(st.text(), st.text(), st.integers(0), st.integers(0), st.text()),
    st.tuples(st.text(), st.text(), st.integers(0), st.integers(0), st.text()),
    st.integers(0, 99999),
)
def test_identity_is_file_version_range_and_fingerprint_and_not_the_ordinal(one, other, index):
    a, b = Shard(0, *one), Shard(index, *other)
    assert (a.key == b.key) == (one == other)
    assert dataclasses.replace(a, index=index).key == a.key
    assert a.key in a.part_name


def test_the_fingerprint_holds_what_changes_tokens_and_nothing_else(tmp_path):
    write(tmp_path / "a.parquet", 1)

    def of(target="t", template="x", dtype="float32", **changes):
        job = loaded(tmp_path, f"{tmp_path}/a.parquet", **changes)
        return plan.fingerprint(job, target=target, template=template, dtype=dtype)

    same = of()
    for change in ({"target": "u"}, {"template": "y"}, {"dtype": "bfloat16"}):
        assert of(**change) != same
    for key, value in (
        ("sampling.temperature", "0.5"),
        ("sampling.seed", "1"),
        ("sampling.max_tokens", "9"),
        ("screen.special_tokens", "allow"),
        ("screen.max_prompt_tokens", "9"),
        ("engine.kind", "rehearsal"),
    ):
        assert of(**{key: value}) != same, key
    for key, value in (
        ("model.draft", "some/head"),
        ("speculation.tree", "off"),
        ("batch_size", "3"),
        ("checkpoint.journal_seconds", "5"),
        ("checkpoint.rows_per_part", "7"),
        ("name", "other"),
        ("max_error_rate", "1.0"),
    ):
        assert of(**{key: value}) == same, key
