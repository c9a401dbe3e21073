"""Planning reads footers only, and a shard's identity is its hash alone."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

import faultproxy
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen import plan, spec, write
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


def save(path: Path, num_rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"prompt": [f"prompt {i}" for i in range(num_rows)]}).write_parquet(path)


def test_every_row_is_in_exactly_one_shard(tmp_path):
    for name, num in (("a", 250), ("b", 100), ("c", 0), ("d", 1)):
        save(tmp_path / f"in/{name}.parquet", num)
    made = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/in"), "f")
    covered = [(Path(s.file).name, i) for s in made.shards for i in range(s.start, s.stop)]
    assert covered == [(f"{n}.parquet", i) for n, num in (("a", 250), ("b", 100), ("d", 1)) for i in range(num)]
    assert [s.index for s in made.shards] == list(range(5))
    assert len({s.key for s in made.shards}) == 5
    assert made.num_rows == 351


def test_a_file_that_goes_while_it_is_planned_is_named(tmp_path, monkeypatch):
    for name in "ab":
        save(tmp_path / f"in/{name}.parquet", 1)
    store, job = connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/in")
    find = store.find

    def then_removed(*arguments, **options):
        found = find(*arguments, **options)
        (tmp_path / "in/b.parquet").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(store, "find", then_removed)
    with pytest.raises(InputError, match=r"in/b.parquet: .* run again"):
        plan.make(store, job, "f")


def test_a_thousand_files_plan_in_seconds(tmp_path):
    save(tmp_path / "one.parquet", 1000)
    data = (tmp_path / "one.parquet").read_bytes()
    (tmp_path / "in").mkdir()
    for i in range(1000):
        (tmp_path / f"in/{i:04d}.parquet").write_bytes(data)
    began = time.monotonic()
    made = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/in/*.parquet"), "f")
    assert made.num_rows == 1_000_000
    assert time.monotonic() - began < 30


def test_planning_on_object_storage_reads_no_data(gcs_folder, faults, tmp_path, monkeypatch):
    url, options = gcs_folder
    noise = random.Random(0)
    pl.DataFrame({"prompt": [noise.randbytes(150).hex() for _ in range(5000)]}).write_parquet(tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    for i in range(3):
        connect(url, options).put(f"{url}/in/{i}.parquet", data)
    sent = []
    answer = faultproxy._Handler._answer

    def counted(self, status, headers, body, *, cut):
        sent.append(len(body))
        answer(self, status, headers, body, cut=cut)

    monkeypatch.setattr(faultproxy._Handler, "_answer", counted)
    made = plan.make(connect(url, {"endpoint_url": faults.url}), loaded(tmp_path, f"{url}/in/*.parquet"), "f")
    assert made.num_rows == 15000
    assert len(made.shards) == 150
    assert 3 * 1000 < sum(sent) < 3 * len(data) / 3
    assert sum(sent) < 3 * plan.TAIL_BYTES + 50_000


def test_a_footer_longer_than_the_tail_is_read_all_the_same(tmp_path):
    columns = {f"a rather long column name, number {i}": pa.array([1]) for i in range(1500)}
    pq.write_table(pa.table(columns | {"prompt": pa.array(["x"])}), tmp_path / "wide.parquet")
    assert (tmp_path / "wide.parquet").stat().st_size > plan.TAIL_BYTES
    made = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/wide.parquet"), "f")
    assert made.num_rows == 1


def test_what_is_hidden_or_not_parquet_is_not_input(tmp_path):
    for name in ("in/a.parquet", "in/_old/b.parquet", "in/.tmp.parquet", "in/sub/c.parquet"):
        save(tmp_path / name, 1)
    (tmp_path / "in/README.md").write_text("not a table")
    made = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/in"), "f")
    assert [Path(f.url).name for f in made.files] == ["a.parquet", "c.parquet"]


def test_a_folder_called_like_a_file_is_a_folder(anywhere, tmp_path):
    folder, options = anywhere
    store = connect(folder, options)
    save(tmp_path / "x.parquet", 3)
    for name in ("part-0.parquet", "part-1.parquet", "_SUCCESS"):
        store.put(f"{folder}/in.parquet/{name}", (tmp_path / "x.parquet").read_bytes())
    for path in (f"{folder}/in.parquet", f"{folder}/in.parquet/"):
        made = plan.make(store, loaded(tmp_path, path), "f")
        assert [file.url for file in made.files] == [f"{folder}/in.parquet/part-{i}.parquet" for i in range(2)]
        assert plan.root(store, path, made) == f"{folder}/in.parquet"


@pytest.mark.parametrize("path", ["./in", "in", "in/", "{0}/.cache/_x/in", "../_x/in", "file://{0}/.cache/_x/in"])
def test_hidden_is_what_is_hidden_below_the_folder(tmp_path, monkeypatch, path):
    here = tmp_path / ".cache/_x"
    for name in ("a", "sub/b", "_c", ".d/e"):
        save(here / f"in/{name}.parquet", 1)
    monkeypatch.chdir(here)
    path = path.format(tmp_path)
    store = connect(path)
    made = plan.make(store, loaded(tmp_path, path), "f")
    root = plan.root(store, path, made)
    assert [file.url.removeprefix(f"{root}/") for file in made.files] == ["a.parquet", "sub/b.parquet"]


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("{0}/in/*.parquet", "{0}/in"),
        ("in/*.parquet", "{0}/in"),
        ("{0}/in/dt=*/*.parquet", "{0}/in"),
        ("{0}/in/dt=[12]/a.parquet", "{0}/in"),
        ("{0}/i?/**/*.parquet", "{0}"),
        ("{0}/in", "{0}/in"),
        ("in/dt=1", "{0}/in/dt=1"),
        ("./in/dt=1/a.parquet", "{0}/in/dt=1"),
        ("*/dt=1/a.parquet", "{0}"),
    ],
)
def test_the_root_is_what_the_path_fixes(tmp_path, monkeypatch, path, root):
    for name in ("a", "dt=1/a", "dt=2/a"):
        save(tmp_path / f"in/{name}.parquet", 1)
    monkeypatch.chdir(tmp_path)
    store = connect("in")
    made = plan.make(store, loaded(tmp_path, path.format(tmp_path)), "f")
    assert made.files
    assert plan.root(store, path.format(tmp_path), made) == root.format(tmp_path)


def commit(store, out, shard, **changes):
    """The shard's part as a worker leaves it."""
    table = pa.table({"row_id": [str(i) for i in range(shard.start, shard.stop)], "sample": [0] * shard.num_rows})
    facts = {
        "fingerprint": shard.fingerprint,
        "file": shard.file,
        "file_version": shard.version,
        "rows": f"{shard.start}-{shard.stop}",
    }
    assert write.commit(store, out, shard, table, metadata=facts | changes)


def test_parts_that_hold_rows_which_would_be_written_again_are_named(anywhere, tmp_path):
    folder, options = anywhere
    store, out = connect(folder, options), f"{folder}/out"

    def upload(name, num_rows):
        save(tmp_path / "x.parquet", num_rows)
        store.put(f"{folder}/in/{name}.parquet", (tmp_path / "x.parquet").read_bytes())

    def made(**changes):
        return plan.make(store, loaded(tmp_path, f"{folder}/in", **changes), "f")

    def strangers(of):
        return plan.strangers(store, write.parts(store, out), of)

    upload("a", 150)
    upload("b", 50)
    before = made()
    assert strangers(before) == []
    for shard in before.shards:
        commit(store, out, shard)
    commit(store, out, dataclasses.replace(before.shards[0], fingerprint="other"))
    assert strangers(before) == []

    upload("b", 51)
    [line] = strangers(made())
    old, new = before.files[1].version, made().files[1].version
    assert f"-{before.shards[2].key}.parquet: holds rows 0-50 of {folder}/in/b.parquet, which has changed" in line
    assert f"(version {old}, now {new})" in line

    store.delete([f"{folder}/in/b.parquet"])
    assert strangers(made()) == [], "a file that is input no longer"

    cut = strangers(made(**{"checkpoint.rows_per_part": 150}))
    assert [line.partition(": ")[2] for line in cut] == [
        f"holds rows {rows} of {folder}/in/a.parquet, which is cut at other rows now (checkpoint.rows_per_part)"
        for rows in ("0-100", "100-150")
    ]

    store.put(f"{out}/part-00009-{'0' * 16}.parquet", b"no table")
    [line] = strangers(made())
    assert "part-00009-" in line
    assert "cannot be read" in line


def test_no_input_and_no_parquet_are_errors_that_name_the_path(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.parquet"):
        plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/nothing.parquet"), "f")
    (tmp_path / "text.parquet").write_text("this is text")
    with pytest.raises(InputError, match=r"text\.parquet.*not a readable Parquet"):
        plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/text.parquet"), "f")


def test_a_changed_file_makes_other_shards(tmp_path):
    save(tmp_path / "a.parquet", 50)
    before = plan.make(connect(str(tmp_path)), loaded(tmp_path, f"{tmp_path}/a.parquet"), "f")
    save(tmp_path / "a.parquet", 51)
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
    save(tmp_path / "a.parquet", 1)

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
        ("sampling.stop", "[END]"),
        ("sampling.stop_token_ids", "[7]"),
        ("input.id", "key"),
        ("input.prompt", "text"),
        ("input.system", "rules"),
        ("input.sampling", "{seed: s}"),
        ("screen.special_tokens", "allow"),
        ("screen.max_prompt_tokens", "9"),
        ("engine.kind", "rehearsal"),
    ):
        assert of(**{key: value}) != same, key
    fp8, longer = {"engine.options": "{quantization: fp8}"}, {"engine.options": "{max_model_len: 4096}"}
    vllm = {"engine.kind": "vllm"}
    assert len({of(**vllm, **options) for options in ({}, fp8, longer)}) == 3
    assert of(**vllm, **{"engine.options": "{gpu_memory_utilization: 0.5}"}) == of(**vllm)
    warm = {"sampling.temperature": "0.5"}
    for key, value in (("sampling.top_p", "0.5"), ("sampling.top_k", "5"), ("sampling.n", "2")):
        assert of(**warm, **{key: value}) != of(**warm), key
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
