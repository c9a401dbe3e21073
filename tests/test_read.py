"""Every row of a shard comes out once, in order and with an id of its own, whatever the table holds."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen import read
from batchgen.columns import Columns, check_columns
from batchgen.errors import InputError
from batchgen.record import Row, Sampling, Shard
from batchgen.store import Entry, Store, connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEFAULT = Sampling(temperature=0.5, max_tokens=64)
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
HI = [{"role": "user", "content": "hi"}]


def columns(**names: Any) -> Columns:
    return Columns(**names) if {"messages", "prompt"} & set(names) else Columns(prompt="prompt", **names)


def rows(path: Path, wanted: Columns, start: int = 0, stop: int | None = None) -> list[Row]:
    store = connect(str(path))
    stop = pq.read_metadata(path).num_rows if stop is None else stop
    shard = Shard(0, str(path), store.info(str(path)).version, start, stop, "f")
    return list(read.Reader(store).rows(shard, wanted, DEFAULT))


def table(path: Path, data: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(data), path / "t.parquet", **options)
    return path / "t.parquet"


def verdicts(found: list[Row]) -> list[str | None]:
    assert all(row.verdict is None or len(row.verdict.error) <= 300 for row in found)
    return [row.verdict and row.verdict.error_type for row in found]


def test_a_prompt_column_is_the_users_message_after_the_system_column(tmp_path: Path) -> None:
    path = table(tmp_path, {"prompt": ["a", "b", "c", None], "system": ["be terse", None, "", "x"]})
    found = rows(path, columns(system="system"))
    assert [row.messages for row in found] == [
        [{"role": "system", "content": "be terse"}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": "b"}],
        [{"role": "system", "content": ""}, {"role": "user", "content": "c"}],
        None,
    ]
    assert verdicts(found) == [None, None, None, "null_prompt"]


@pytest.mark.parametrize(
    "kind",
    [
        MESSAGES,
        pa.large_list(pa.struct([("content", pa.large_string()), ("role", pa.dictionary(pa.int8(), pa.string()))])),
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string_view()), ("seen", pa.timestamp("us"))]), 1),
        pa.string(),
    ],
)
def test_messages_are_read_from_lists_of_any_kind_and_from_json(tmp_path: Path, kind: pa.DataType) -> None:
    far = [{**HI[0], "seen": pa.scalar(2**62, pa.timestamp("us"))}]  # beyond Python's years, and nobody asked for it
    value = json.dumps(HI) if kind == pa.string() else far if "seen" in str(kind) else HI
    path = table(tmp_path, {"messages": pa.array([value], kind)})
    [row] = rows(path, columns(messages="messages"))
    assert (row.messages, row.verdict) == (HI, None)


@pytest.mark.parametrize(
    ("value", "error_type", "error"),
    [
        (None, "null_messages", "column 'm' is null"),
        ([None], "null_message", "messages[0] is null"),
        ([*HI, None], "null_message", "messages[1] is null"),
        ([{"role": None, "content": "a"}], "bad_role", "messages[0].role is null, expected a string"),
        ([{"role": "user", "content": None}], "null_content", "messages[0].content is null, expected a string"),
        ("null", "null_messages", "column 'm' is null"),
        ("hi", "bad_messages", "column 'm' is not JSON"),
        ("[" * 100_000, "bad_messages", "column 'm' is not JSON"),
        ("9" * 10_000, "bad_messages", "column 'm' is not JSON"),
        ('{"role": "user"}', "bad_messages", "column 'm' is an object, expected a list of messages"),
        ("[7]", "bad_messages", "messages[0] is a number, expected role and content"),
        ('["hi"]', "bad_messages", "messages[0] is a string"),
        ('[{"content": "a"}]', "bad_role", "messages[0].role is null"),
        ('[{"role": true, "content": "a"}]', "bad_role", "messages[0].role is a boolean"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "bad_content", "messages[0].content is a list"),
        ('[{"role": "user", "content": "half \\ud83d"}]', "bad_text", "messages[0].content holds a lone surrogate"),
    ],
)
def test_messages_that_are_none_are_the_rows_error(tmp_path: Path, value: Any, error_type: str, error: str) -> None:
    kind = pa.string() if isinstance(value, str) else MESSAGES
    path = table(tmp_path, {"m": pa.array([value], kind), "id": ["a"]})
    [row] = rows(path, columns(messages="m", id="id"))
    assert row.row_id == "a"
    assert row.messages is None
    assert row.verdict is not None
    assert (row.verdict.status, row.verdict.error_type) == ("error", error_type)
    assert error in row.verdict.error


def test_an_empty_list_of_messages_is_for_screen_to_judge(tmp_path: Path) -> None:
    [row] = rows(table(tmp_path, {"m": pa.array([[]], MESSAGES)}), columns(messages="m"))
    assert (row.messages, row.verdict) == ([], None)


def test_without_an_id_column_a_row_is_its_files_name_and_its_place(tmp_path: Path) -> None:
    found = rows(table(tmp_path, {"prompt": ["a", "b", "c"]}), columns(), 1, 3)
    assert [(row.row_id, row.index) for row in found] == [("t.parquet#1", 1), ("t.parquet#2", 2)]


@pytest.mark.parametrize(
    ("root", "name", "reason"),
    [
        ("", "t.parquet", "nobody said"),
        ("{0}", "dt=1/t.parquet", "partitions hold files of one name"),
        ("{0}/", "dt=1/t.parquet", "a slash changes nothing"),
        ("{0}/dt=1", "t.parquet", "the file is right there"),
        ("{0}/dt", "t.parquet", "not a folder above it"),
    ],
)
def test_the_default_id_is_the_files_place_below_the_root(tmp_path: Path, root: str, name: str, reason: str) -> None:
    (tmp_path / "dt=1").mkdir()
    path = table(tmp_path / "dt=1", {"prompt": ["a"]})
    [row] = rows(path, columns(root=root.format(tmp_path)))
    assert row.row_id == f"{name}#0", reason


@pytest.mark.parametrize(
    "kind",
    [
        pa.string_view(),
        pa.binary_view(),
        pa.list_(pa.struct([("a", pa.string_view())])),
        pa.bool8(),
        pa.month_day_nano_interval(),
        pa.struct([]),
        pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))]),
        pa.list_(pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))])),
    ],
    ids=str,
)
def test_a_kept_column_that_no_part_can_hold_is_refused_before_anything_runs(kind: pa.DataType) -> None:
    schema = pa.schema([("prompt", pa.string()), ("x", kind)])
    with pytest.raises(InputError, match=r"t\.parquet: column 'x' is .* drop it from input\.keep") as caught:
        check_columns(schema, columns(keep=("x",)), "t.parquet")
    assert "\n" not in str(caught.value)
    assert check_columns(schema, columns(), "t.parquet") == []


@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("s"),
        pa.date64(),
        pa.dictionary(pa.int32(), pa.large_string()),
        pa.dictionary(pa.int32(), pa.int64()),
        pa.list_view(pa.int8()),
        pa.list_(pa.float32(), 3),
        pa.list_(pa.list_(pa.string())),
        pa.uuid(),
        pa.json_(),
        pa.decimal32(5, 2),
        pa.bool_(),
        pa.binary(4),
    ],
    ids=str,
)
def test_a_kept_column_that_makes_the_whole_way_is_taken(kind: pa.DataType) -> None:
    schema = pa.schema([("prompt", pa.string()), ("x", kind)])
    assert check_columns(schema, columns(keep=("x",)), "t.parquet") == [schema.field("x")]


def test_kept_dictionaries_get_room_for_the_values_of_all_row_groups() -> None:
    schema = pa.schema([("prompt", pa.string()), ("x", pa.dictionary(pa.int8(), pa.string(), ordered=True))])
    kept = check_columns(schema, columns(keep=("x",)), "t.parquet")
    assert kept == [pa.field("x", pa.dictionary(pa.int32(), pa.string(), ordered=True))]


def test_an_id_that_cannot_be_used_gives_way_to_the_rows_place(tmp_path: Path) -> None:
    ids = ["a", None, "", " \n", "a", "💩", "x" * 10_000, "x" * 10_000]
    found = rows(table(tmp_path, {"prompt": ["p"] * len(ids), "id": ids}), columns(id="id"))
    places = [f"t.parquet#{i}" for i in range(len(ids))]
    assert [row.row_id for row in found] == ["a", *places[1:5], "💩", "x" * 10_000, places[7]]
    assert verdicts(found) == [None, "bad_id", "bad_id", "bad_id", "duplicate_id", None, None, "duplicate_id"]
    assert all(row.messages for row in found)


def test_whole_numbers_are_ids(tmp_path: Path) -> None:
    path = table(tmp_path, {"prompt": ["p"] * 3, "id": pa.array([7, 2**64 - 1, 0], pa.uint64())})
    assert [row.row_id for row in rows(path, columns(id="id"))] == ["7", str(2**64 - 1), "0"]


PLACES = [f"t.parquet#{i}{plus}" for i in range(6) for plus in ("", "+", "++")]


@given(ids=st.lists(st.none() | st.sampled_from(["a", "", *PLACES]), max_size=6))
def test_row_ids_are_unique_even_where_ids_look_like_places(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str | None]
) -> None:
    path = tmp_path_factory.mktemp("ids")
    data = {"prompt": pa.array(["p"] * len(ids), pa.string()), "id": pa.array(ids, pa.string())}
    found = [row.row_id for row in rows(table(path, data), columns(id="id"))]
    assert len(set(found)) == len(ids)


@pytest.mark.parametrize(
    ("field", "value", "kind", "expected"),
    [
        ("temperature", 0, pa.int8(), 0.0),
        ("temperature", 1.5, pa.float32(), 1.5),
        ("temperature", decimal.Decimal("0.25"), pa.decimal128(4, 2), 0.25),
        ("temperature", None, pa.float64(), 0.5),
        ("temperature", None, pa.null(), 0.5),
        ("top_p", 1.0, pa.float64(), 1.0),
        ("top_k", 1, pa.int64(), 1),
        ("max_tokens", 256.0, pa.float64(), 256),
        ("seed", 2**63 - 1, pa.uint64(), 2**63 - 1),
        ("stop", "END", pa.string(), ("END",)),
        ("stop", ["\n", "END"], pa.list_(pa.string()), ("\n", "END")),
        ("stop", [], pa.list_(pa.string()), ()),
    ],
)
def test_a_row_can_have_its_own_sampling(
    tmp_path: Path, field: Any, value: Any, kind: pa.DataType, expected: Any
) -> None:
    path = table(tmp_path, {"prompt": ["p"], "s": pa.array([value], kind)})
    [row] = rows(path, columns(sampling={field: "s"}))
    assert row.verdict is None
    assert getattr(row.sampling, field) == expected
    assert type(getattr(row.sampling, field)) is type(expected)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("temperature", -0.1, pa.float64()),
        ("temperature", float("nan"), pa.float64()),
        ("temperature", float("inf"), pa.float64()),
        ("top_p", 0.0, pa.float64()),
        ("top_p", 1.01, pa.float64()),
        ("top_p", float("nan"), pa.float32()),
        ("top_k", 0, pa.int64()),
        ("max_tokens", 0, pa.int64()),
        ("max_tokens", 1.5, pa.float64()),
        ("max_tokens", float("nan"), pa.float64()),
        ("max_tokens", float("inf"), pa.float64()),
        ("max_tokens", 2**40, pa.int64()),
        ("seed", -1, pa.int64()),
        ("seed", 2**63, pa.uint64()),
        ("stop", "", pa.string()),
        ("stop", ["a", None], pa.list_(pa.string())),
        ("stop", ["a", ""], pa.list_(pa.string())),
    ],
)
def test_sampling_that_no_engine_could_honour_is_the_rows_error(
    tmp_path: Path, field: Any, value: Any, kind: pa.DataType
) -> None:
    path = table(tmp_path, {"prompt": ["p", "p"], "s": pa.array([value, None], kind)})
    bad, good = rows(path, columns(sampling={field: "s"}))
    assert verdicts([bad, good]) == ["bad_sampling", None]
    assert bad.verdict is not None
    assert f"{field} (column 's') is " in bad.verdict.error
    assert good.sampling == DEFAULT


KEPT = {
    "text": pa.array(["é", None]),
    "words": pa.array([["a"], None], pa.list_(pa.string())),
    "coded": pa.array(["a", "b"]).dictionary_encode(),
    "nested": pa.array([{"a": [{"b": 1}]}, None]),
    "pairs": pa.array([[("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int8())),
    "when": pa.array([dt.datetime(2026, 1, 2, tzinfo=dt.UTC), None], pa.timestamp("us", "Europe/Berlin")),
    "nanoseconds": pa.array([1, 2**62], pa.timestamp("ns")),
    "far": pa.array([2**62, 0], pa.timestamp("us")),
    "day": pa.array([10**9, 1], pa.date32()),
    "span": pa.array([1, None], pa.duration("ns")),
    "price": pa.array([decimal.Decimal("1.10"), None], pa.decimal256(60, 2)),
    "half": pa.array([0.5, None], pa.float16()),
    "raw": pa.array([b"\xff", None]),
    "nothing": pa.nulls(2),
}


def test_kept_values_make_the_same_table_again(tmp_path: Path) -> None:
    path = table(tmp_path, {"prompt": ["p", "q"], **KEPT})
    wanted = columns(keep=tuple(KEPT))
    fields = check_columns(pq.read_schema(path), wanted, "t.parquet")
    assert [field.name for field in fields] == list(KEPT)
    assert all(not field.metadata for field in fields)
    again = pa.Table.from_pylist([row.kept for row in rows(path, wanted)], schema=pa.schema(fields))
    for name in KEPT:
        assert again[name].equals(pq.read_table(path)[name]), name


def test_bytes_that_are_no_text_are_the_rows_error_and_nobody_elses(tmp_path: Path) -> None:
    text = pa.array([b"good", b"b\xffd", b"good"]).view(pa.string())
    good = pa.array(["x", "y", "z"])
    for name in ("prompt", "id", "note"):
        path = table(tmp_path, {"prompt": good, "id": good, "note": good} | {name: text})
        found = rows(path, columns(id="id", keep=("note",)))
        assert verdicts(found) == [None, "bad_text", None] if name != "id" else [None, "bad_text", "duplicate_id"]
        assert found[1].verdict is not None
        assert f"column '{name}' holds bytes that are not UTF-8" in found[1].verdict.error
    assert [row.kept["note"] for row in found] == ["good", None, "good"]


class Counting:
    """A store that notes how many bytes are read."""

    def __init__(self, store: Store) -> None:
        self.store, self.num_bytes = store, 0
        self.still, self.was = store.still, store.was

    @contextlib.contextmanager
    def reading(self, entry: Entry) -> Iterator[Any]:
        with self.store.reading(entry) as file:

            def read(size: int = -1) -> bytes:
                data = file.read(size)
                self.num_bytes += len(data)
                return data

            yield SimpleNamespace(read=read, seek=file.seek, tell=file.tell, close=file.close, closed=False, mode="rb")


def test_only_the_columns_and_row_groups_of_the_shard_are_read(tmp_path: Path) -> None:
    big = ["x" * 10_000 + str(i) for i in range(1000)]
    messages = pa.array([[{**HI[0], "images": text}] for text in big])
    data = {"prompt": [f"p{i}" for i in range(1000)], "big": big, "m": messages}
    path = table(tmp_path, data, row_group_size=100, compression="none", use_dictionary=False)
    for wanted in (columns(), columns(messages="m")):
        store = Counting(connect(str(path)))
        shard = Shard(0, str(path), store.store.info(str(path)).version, 250, 420, "f")
        found = list(read.Reader(store).rows(shard, wanted, DEFAULT))  # type: ignore[arg-type]
        assert [row.index for row in found] == list(range(250, 420))
        assert found[0].messages == (HI if wanted.messages else [{"role": "user", "content": "p250"}])
        assert store.num_bytes < path.stat().st_size / 100


def test_shards_in_order_cost_their_row_group_once(tmp_path: Path) -> None:
    texts = ["x" * 5_000 + str(i) for i in range(2000)]
    path = table(tmp_path, {"prompt": texts}, row_group_size=1000, compression="none", use_dictionary=False)
    store = Counting(connect(str(path)))
    reader, version = read.Reader(store), store.store.info(str(path)).version  # type: ignore[arg-type]

    def take(start: int) -> list[int]:
        shard = Shard(0, str(path), version, start, start + 100, "f")
        return [row.index for row in reader.rows(shard, columns(), DEFAULT)]

    assert [index for start in range(0, 2000, 100) for index in take(start)] == list(range(2000))
    assert store.num_bytes < 1.1 * path.stat().st_size
    before = store.num_bytes
    # Back to an earlier shard, and over one that another worker has: the first group, and no more, once again.
    assert [take(start) for start in (200, 500, 900)] == [list(range(i, i + 100)) for i in (200, 500, 900)]
    assert store.num_bytes - before < 0.6 * path.stat().st_size


@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    ranges=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=6),
)
def test_one_reader_reads_any_ranges_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], ranges: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "t.parquet"
    num_rows, schema = sum(groups), pa.schema([("prompt", pa.string())])
    texts = iter(range(num_rows))
    with pq.ParquetWriter(path, schema) as writer:
        for size in groups:
            writer.write_table(pa.table({"prompt": pa.array([str(next(texts)) for _ in range(size)], pa.string())}))
    store = connect(str(path))
    reader, version = read.Reader(store), store.info(str(path)).version
    for start, length in ranges:
        start, stop = min(start, num_rows), min(start + length, num_rows)  # noqa: PLW2901
        found = list(reader.rows(Shard(0, str(path), version, start, stop, "f"), columns(), DEFAULT))
        assert [row.messages and row.messages[0]["content"] for row in found] == [str(i) for i in range(start, stop)]
        assert [row.index for row in found] == list(range(start, stop))


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (columns(messages="mesages"), "t.parquet: no column 'mesages', which input.messages names; did you mean 'mess"),
        (columns(prompt="Text"), "no column 'Text', which input.prompt names; did you mean 'text'?"),
        (columns(prompt="zzz"), "no column 'zzz', which input.prompt names; it has 'messages', 'text', 'number', "),
        (columns(prompt="number"), "column 'number' is int64, but input.prompt needs string"),
        (columns(prompt="text", system="number"), "but input.system needs string"),
        (columns(prompt="text", id="ratio"), "column 'ratio' is double, but input.id needs string or a whole number"),
        (columns(messages="number"), "but input.messages needs list<struct<role: string, content: string>>, or string"),
        (columns(messages="parts"), "column 'parts' is list<"),
        (columns(prompt="text", keep=("nope",)), "no column 'nope', which input.keep names"),
        (columns(prompt="text", sampling={"stop": "ratio"}), "but input.sampling.stop needs a text or a list of texts"),
        (columns(prompt="text", sampling={"top_p": "text"}), "but input.sampling.top_p needs a number above 0"),
        (columns(prompt="twice"), "2 columns are called 'twice', which input.prompt names; rename all but one"),
    ],
)  # fmt: skip
def test_a_table_of_another_shape_is_refused_in_one_line(wanted: Columns, error: str) -> None:
    parts = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(pa.string()))]))
    names = [("messages", MESSAGES), ("text", pa.string()), ("number", pa.int64()), ("ratio", pa.float64())]
    schema = pa.schema([*names, ("parts", parts), ("twice", pa.string()), ("twice", pa.string())])
    with pytest.raises(InputError) as caught:
        check_columns(schema, wanted, "t.parquet")
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["footer", "page", "gone", "changed"])
def test_a_file_that_cannot_be_read_is_an_input_error_in_one_line(tmp_path: Path, damage: str) -> None:
    path = table(tmp_path, {"prompt": ["some text"] * 100}, write_page_checksum=True, use_dictionary=False)
    store = connect(str(path))
    shard = Shard(0, str(path), store.info(str(path)).version, 0, 100, "f")
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "changed":
        table(tmp_path, {"prompt": ["x"]})
    else:
        content[-6 if damage == "footer" else 60] ^= 0xFF
        path.write_bytes(content)
        shard = Shard(0, str(path), store.info(str(path)).version, 0, 100, "f")
    with pytest.raises(InputError, match=r"t\.parquet: ") as caught:
        list(read.Reader(store).rows(shard, columns(), DEFAULT))
    assert "\n" not in str(caught.value)


def test_a_file_with_fewer_rows_than_planned_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 2 rows, planned were at least 3; plan again"):
        rows(table(tmp_path, {"prompt": ["a", "b"]}), columns(), 0, 3)
