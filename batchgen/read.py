"""The first step of a row's way: the rows of a shard out of its Parquet file.

Every row of the range comes out, in order and exactly once, whatever it holds: what cannot be used (a null, a wrong
type, bytes that are no text, an id seen before) becomes the row's verdict. Row ids are unique within a shard. Only a
table of another shape than the job file says is refused, by `check_columns`, before anything runs.

Columns the job does not name are never read, nor a file as a whole: a part of a 100 GB table costs the bytes of the row
groups that it lies in, and parts that one reader takes in order cost them once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import re
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from batchgen.errors import InputError
from batchgen.record import Message, Row, Sampling, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from batchgen.record import Shard
    from batchgen.spec import SamplingColumn
    from batchgen.store import Store

# Rows may hold 100 kB each, so a batch is small; decoding is not what a job waits for.
_BATCH_ROWS = 256
# What pyarrow raises for a value that Python has no word for: dates beyond the year 9999, unknown time zones, ...
_UNWORDED = (ValueError, OverflowError, LookupError, pa.ArrowException)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what; one of `messages`, `prompt` and `turns` is set, `system` only with the last two.

    `sampling` maps a field of `record.Sampling` to the column that overrides it where it is not null. `root` is what
    default ids leave out of a file's URL (`plan.root`), so that `dt=1/a.parquet` and `dt=2/a.parquet` differ.
    """

    messages: str | None = None
    prompt: str | None = None
    turns: str | None = None
    system: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    sampling: Mapping[SamplingColumn, str] = dataclasses.field(default_factory=dict)
    root: str = ""


class _Unusable(Exception):  # noqa: N818  # it never leaves this module, and is a finding rather than a failure
    """What is wrong with a row: error type and error of its verdict."""


def check_columns(schema: pa.Schema, columns: Columns, file: str) -> list[pa.Field]:
    """The kept columns' fields, in the order of `columns.keep`, of a table that has all the job's columns.

    Raises:
        InputError: a column is missing, there twice, of a type that cannot hold what it should, or is to be kept and
            of a type that a part cannot hold.
    """
    for name, key, fits, expected in _needs(columns):
        places = schema.get_all_field_indices(name)
        if not places:
            close = [other for other in schema.names if other.lower() == name.lower()]
            close = close or difflib.get_close_matches(name, schema.names, 1)
            there = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(repr, schema.names))[:300]}"
            raise InputError(f"{file}: no column {name!r}, which {key} names; {there}")
        if len(places) > 1:
            raise InputError(
                f"{file}: {len(places)} columns are called {name!r}, which {key} names; rename all but one"
            )
        found = schema.field(places[0]).type
        if not fits(found):
            raise InputError(f"{file}: column {name!r} is {str(found)[:200]}, but {key} needs {expected}")
    kept = [_as_kept(schema.field(name)) for name in columns.keep]
    for name, field in zip(columns.keep, kept, strict=True):
        found = field.type
        problem = _cannot_be_kept(found)
        if problem:
            raise InputError(
                f"{file}: column {name!r} is {str(found)[:200]}, which cannot be copied to the output ({problem}); "
                f"cast it in the input, or drop it from input.keep"
            )
    return kept


class Reader:
    """Reads one shard of an input after another.

    Shards of a file that come in order share one pass over its row groups: each group is fetched once, however many
    shards it is cut into.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._opened = contextlib.ExitStack()
        # File, version and columns that stand open, the row group under way, and its batch at row `_first`.
        self._what: tuple[str, str, Columns | None] | None = None
        self._file: pq.ParquetFile | None = None
        self._leaves: list[str] | None = None
        self._group, self._first = -1, 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None

    def rows(self, shard: Shard, columns: Columns, sampling: Sampling) -> Iterator[Row]:
        """The rows of `shard` in input order, with `sampling` as the job's default.

        `row_id` is the id column's value as text, or `<file below columns.root>#<index>` where there is none to use.

        Raises:
            InputError: the file is not there, changed since it was planned, lacks a column or is damaged.
            StoreError: the storage kept failing.
        """
        name = _below(shard.file, columns.root)
        taken: set[str] = set()
        for index, values, broken in self._records(shard, columns):
            row = Row(f"{name}#{index}", index, sampling, kept={column: values[column] for column in columns.keep})
            problems = []
            if broken:
                problems.append(
                    ("bad_text", f"column {broken[0]!r} holds bytes that are not UTF-8; its value is left out")
                )
            try:
                row.row_id = _row_id(values, columns, taken) or row.row_id
            except _Unusable as unusable:
                problems.append(unusable.args)
            while row.row_id in taken:  # the id column of another row holds this very text
                row.row_id += "+"
            taken.add(row.row_id)
            try:
                row.messages, row.ahead = _messages(values, columns)
                row.sampling = _sampling(values, columns, sampling)
            except _Unusable as unusable:
                problems.append(unusable.args)
            if problems:
                row.verdict = Verdict("error", *problems[0])
            yield row

    def table(self, shard: Shard) -> pa.Table:
        """The rows of `shard` with all columns, as they stand in the file.

        Raises:
            InputError, StoreError: as `rows`.
        """
        with _in_words(shard.file):
            batches = [batch for _, batch in self._shard(shard, None)]
            assert self._file is not None
            return pa.Table.from_batches(batches, batches[0].schema if batches else self._file.schema_arrow)

    def _records(self, shard: Shard, columns: Columns) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
        """Row index, Python values by column and the columns with broken text, for each row of the shard."""
        names = dict.fromkeys(need[0] for need in _needs(columns))
        with _in_words(shard.file):
            for first, batch in self._shard(shard, columns):
                found = {name: _values(batch.column(name)) for name in names}
                for i in range(batch.num_rows):
                    broken = [name for name, (_, rows_) in found.items() if i in rows_]
                    yield first + i, {name: values[i] for name, (values, _) in found.items()}, broken

    def _shard(self, shard: Shard, columns: Columns | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The shard's rows in batches, each with the index of its first row; `columns` None reads all."""
        entry = self._store.still(shard.file, shard.version)
        if self._what != (shard.file, shard.version, columns):
            # What reads the stream goes before it.
            self._what, self._file, self._batches, self._batch = None, None, iter(()), None
            self._opened.close()
            stream = self._opened.enter_context(self._store.reading(entry))
            file = self._file = pq.ParquetFile(stream, pre_buffer=True, page_checksum_verification=True)
            if columns is not None:
                check_columns(file.schema_arrow, columns, shard.file)
            self._leaves = None if columns is None else _leaves(file, columns)
            self._what, self._group = (shard.file, shard.version, columns), -1
        assert self._file is not None
        begin, at = 0, shard.start
        for group in range(self._file.metadata.num_row_groups):
            end = begin + self._file.metadata.row_group(group).num_rows
            while at < min(end, shard.stop):
                batch = self._held(group, begin, at)
                low, high = at - self._first, min(shard.stop - self._first, batch.num_rows)
                at = self._first + high
                yield self._first + low, batch.slice(low, high - low)
            begin = end
        if at < shard.stop:
            raise InputError(f"{shard.file}: has {begin} rows, planned were at least {shard.stop}; plan again")
        self._store.was(shard.file, shard.version)

    def _held(self, group: int, begin: int, at: int) -> pa.RecordBatch:
        """The batch that holds row `at`, of the row group that begins at `begin`; `_first` is its first row."""
        assert self._file is not None
        if self._group != group or self._first > at:
            # One group after the other: all that are asked for at once are fetched at once.
            self._batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=self._leaves)
            self._group, self._first, self._batch = group, begin, None
        while self._batch is None or at >= self._first + self._batch.num_rows:
            self._first += 0 if self._batch is None else self._batch.num_rows
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise pa.ArrowInvalid(f"row group {group} has fewer rows than its footer says")
        return self._batch


def _below(file: str, root: str) -> str:
    """The file's path below `root`, its bare name when it is elsewhere."""
    prefix = root.rstrip("/") + "/"
    return file.removeprefix(prefix) if root and file.startswith(prefix) else file.rpartition("/")[2]


@contextlib.contextmanager
def _in_words(file: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        why = str(error).partition("\n")[0][:200]
        raise InputError(f"{file}: cannot be read as Parquet ({why}); restore the file and plan again") from error


def _leaves(file: pq.ParquetFile, columns: Columns) -> list[str]:
    """Parquet paths to read: of messages only role and content, since tool calls and images can outweigh the text."""
    names = dict.fromkeys(need[0] for need in _needs(columns))
    chats = columns.messages or columns.turns
    if chats is None or chats in columns.keep:
        return list(names)
    del names[chats]
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    inner = [path for path in paths if path.startswith(f"{chats}.")]
    inner = [path for path in inner if path.rpartition(".")[2] in ("role", "content")]
    return [*names, *(inner or [chats])]


def _values(column: pa.Array) -> tuple[list[Any], set[int]]:
    """Python values of a column, and the rows whose text is broken (their value is None).

    A value that Python has no word for stays an Arrow scalar, which `pa.Table.from_pylist` takes as well.
    """
    try:
        return column.to_pylist(), set()
    except _UNWORDED:
        values: list[Any] = []
        broken: set[int] = set()
        for i, scalar in enumerate(column):
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError:
                broken.add(i)
                values.append(None)
            except _UNWORDED:
                values.append(scalar)
        return values, broken


def _row_id(values: Mapping[str, Any], columns: Columns, taken: set[str]) -> str | None:
    if columns.id is None:
        return None
    value = values[columns.id]
    if value is None or not str(value).strip():
        raise _Unusable("bad_id", f"column {columns.id!r} is {'null' if value is None else 'empty'}")
    if str(value) in taken:
        raise _Unusable("duplicate_id", f"column {columns.id!r}: {ascii(str(value))[:100]} is the id of an earlier row")
    return str(value)


def _messages(values: Mapping[str, Any], columns: Columns) -> tuple[list[Message], tuple[str, ...]]:
    """What is to be answered first, and the user's turns after that."""
    if columns.messages is not None:
        return _conversation(_list(columns.messages, values[columns.messages])), ()
    system = None if columns.system is None else values[columns.system]
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    if columns.turns is not None:
        told = _told(columns.turns, _list(columns.turns, values[columns.turns]))
        if head and told and told[0]["role"] == "system":
            raise _Unusable(
                "bad_role_order", f"columns {columns.turns!r} and {columns.system!r} both hold a system message"
            )
        told = [*head, *told]
        first = 1 + next((i for i, message in enumerate(told) if message["role"] == "user"), len(told))
        return told[:first], tuple(message["content"] for message in told[first:])
    assert columns.prompt is not None, "the job file names messages, prompt or turns"
    if values[columns.prompt] is None:
        raise _Unusable("null_prompt", f"column {columns.prompt!r} is null")
    return [*head, {"role": "user", "content": values[columns.prompt]}], ()


def _told(column: str, turns: list[Any]) -> list[Message]:
    """A system message, if there is one, and the user's: given as texts, or among others' answers, which go."""
    if not any(isinstance(turn, dict) for turn in turns):
        return _conversation([None if turn is None else {"role": "user", "content": turn} for turn in turns])
    messages = _conversation(turns)
    first = 1 if messages[0]["role"] == "system" else 0
    for i, message in enumerate(messages[first:], first):
        expected, role = ("user", "assistant")[(i - first) % 2], message["role"]
        if role not in ("user", "assistant"):
            raise _Unusable(
                "bad_role", f"column {column!r}: turn {i} is of role {ascii(role)[:100]}, expected user or assistant"
            )
        if role != expected:
            raise _Unusable("bad_role_order", f"column {column!r}: turn {i} is the {role}'s, expected the {expected}'s")
    return [message for message in messages if message["role"] != "assistant"]


def _list(column: str, value: Any) -> list[Any]:
    """A list, or the one that a JSON text holds."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _Unusable("bad_messages", f"column {column!r} is not JSON: {str(error)[:100]}") from error
    if value is None:
        raise _Unusable("null_messages", f"column {column!r} is null")
    if not isinstance(value, list):
        raise _Unusable("bad_messages", f"column {column!r} is {_kind(value)}, expected a list of messages")
    return value


def _conversation(value: list[Any]) -> list[Message]:
    messages: list[Message] = []
    for i, message in enumerate(value):
        if message is None:
            raise _Unusable("null_message", f"messages[{i}] is null")
        if not isinstance(message, dict):
            raise _Unusable("bad_messages", f"messages[{i}] is {_kind(message)}, expected role and content")
        for key, null, wrong in (("role", "bad_role", "bad_role"), ("content", "null_content", "bad_content")):
            text = message.get(key)
            if not isinstance(text, str):
                problem = null if text is None else wrong
                raise _Unusable(problem, f"messages[{i}].{key} is {_kind(text)}, expected a string")
            # JSON can spell half a character, which no table could hold and no tokenizer take.
            if _SURROGATE.search(text):
                raise _Unusable("bad_text", f"messages[{i}].{key} holds a lone surrogate, which is not Unicode text")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _sampling(values: Mapping[str, Any], columns: Columns, default: Sampling) -> Sampling:
    own: dict[str, Any] = {}
    for field, column in columns.sampling.items():
        value = values[column]
        if value is not None:
            of, expected = _SAMPLING[field][1:]
            try:
                own[field] = of(value)
            except (TypeError, ValueError, OverflowError) as error:
                found = ascii(value)[:60]
                raise _Unusable("bad_sampling", f"{field} (column {column!r}) is {found}, not {expected}") from error
    return dataclasses.replace(default, **own) if own else default


def _number(low: float, high: float, *, above: bool = False) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        number = float(value)
        if not (low < number <= high if above else low <= number <= high):
            raise ValueError
        return number

    return check


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        # Tables made with pandas hold whole numbers with nulls as floats.
        if int(value) != value or not low <= value <= high:
            raise ValueError
        return int(value)

    return check


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value)
    if not all(stops):  # null or empty
        raise ValueError
    return stops


def _is_text(type_: pa.DataType) -> bool:
    type_ = type_.value_type if types.is_dictionary(type_) else type_
    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_))


def _is_list(type_: pa.DataType, of: Callable[[pa.DataType], bool]) -> bool:
    kinds = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(types, f"is_{kind}")(type_) for kind in kinds) and of(type_.value_type)


def _is_message(type_: pa.DataType) -> bool:
    parts = {part.name: part.type for part in type_} if types.is_struct(type_) else {}
    return all(name in parts and _is_text(parts[name]) for name in ("role", "content"))


def _are_turns(type_: pa.DataType) -> bool:
    return _is_list(type_, lambda of: _is_text(of) or _is_message(of)) or _is_text(type_)


def _is_number(type_: pa.DataType) -> bool:
    kinds = (types.is_integer, types.is_floating, types.is_decimal, types.is_null)
    return any(kind(type_) for kind in kinds)


_SAMPLING: dict[str, tuple[Callable[[pa.DataType], bool], Callable[[Any], Any], str]] = {
    "temperature": (_is_number, _number(0, 1e6), "a number of at least 0"),
    "top_p": (_is_number, _number(0, 1, above=True), "a number above 0 and at most 1"),
    "top_k": (_is_number, _whole(1, 2**31 - 1), "a whole number of at least 1"),
    "max_tokens": (_is_number, _whole(1, 2**31 - 1), "a whole number of at least 1"),
    "seed": (_is_number, _whole(0, 2**63 - 1), "a whole number from 0 to 2**63 - 1"),
    "stop": (
        lambda type_: _is_text(type_) or _is_list(type_, _is_text) or bool(types.is_null(type_)),
        _stops,
        "a text or a list of texts, none of them empty",
    ),
}


def _needs(columns: Columns) -> Iterator[tuple[str, str, Callable[[pa.DataType], bool], str]]:
    """Each column in use: name, key in the job file, the test its type must pass, and that test in words."""
    if columns.messages is not None:
        expected = "list<struct<role: string, content: string>>, or string with such a list as JSON"
        yield columns.messages, "input.messages", lambda t: _is_list(t, _is_message) or _is_text(t), expected
    if columns.prompt is not None:
        yield columns.prompt, "input.prompt", _is_text, "string"
    if columns.turns is not None:
        expected = "list<string>, list<struct<role: string, content: string>>, or string with such a list as JSON"
        yield columns.turns, "input.turns", _are_turns, expected
    if columns.system is not None:
        yield columns.system, "input.system", lambda t: _is_text(t) or bool(types.is_null(t)), "string"
    if columns.id is not None:
        yield columns.id, "input.id", lambda t: _is_text(t) or bool(types.is_integer(t)), "string or a whole number"
    for field, column in columns.sampling.items():
        yield column, f"input.sampling.{field}", _SAMPLING[field][0], _SAMPLING[field][2]
    for name in columns.keep:
        yield name, "input.keep", lambda _: True, "anything"


@functools.lru_cache(maxsize=1024)
def _cannot_be_kept(type_: pa.DataType) -> str | None:
    """Why a column of this type would not come out of a part as it went in; None when it does.

    Tried rather than listed, on the way that rows go: Python values, journal segments, their order, Parquet. What is
    read back may be of another type (seconds become milliseconds), but that one must last.
    """
    if any(types.is_dictionary(inner) for inner in _inner(type_)):
        # Nulls taken out of a struct leave its child's indices as memory was, and writing them may crash (pyarrow 26).
        return "a dictionary inside another type"
    try:
        back = _there_and_back(type_)
        again = _there_and_back(back)
    except (pa.ArrowException, TypeError) as error:
        return str(error).partition("\n")[0][:150]
    return None if back == again else f"it would become {str(again)[:150]}"


def _inner(type_: pa.DataType) -> Iterator[pa.DataType]:
    """The types that a nested type is made of, at any depth."""
    if types.is_nested(type_):
        for i in range(type_.num_fields):
            yield type_.field(i).type
            yield from _inner(type_.field(i).type)


def _there_and_back(type_: pa.DataType) -> pa.DataType:
    schema = pa.schema([("x", type_)])
    values = [None, _example(type_, 0), _example(type_, 1)]
    pieces = [pa.Table.from_pylist([{"x": value}], schema=schema) for value in values]
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(pieces).take([2, 1, 0]), sink, write_page_checksum=True)
    back = pq.ParquetFile(pa.BufferReader(sink.getvalue()), page_checksum_verification=True).read()["x"]
    if back.to_pylist() != values[::-1]:
        raise pa.ArrowInvalid("its values do not read back as written")
    return back.type


def _example(type_: pa.DataType, number: int) -> Any:
    """A Python value as `to_pylist` gives it for this type; None for what Arrow takes whatever its value."""
    if isinstance(type_, pa.BaseExtensionType):
        storage = pa.array([_example(type_.storage_type, number)], type_.storage_type)
        return pa.ExtensionArray.from_storage(type_, storage)[0].as_py()
    if types.is_struct(type_):
        return {part.name: _example(part.type, number) for part in type_}
    if types.is_map(type_):
        return [(_example(type_.key_type, number), _example(type_.item_type, number))]
    type_ = type_.value_type if types.is_dictionary(type_) else type_
    if _is_list(type_, lambda _: True):
        length = type_.list_size if types.is_fixed_size_list(type_) else 1
        return [_example(type_.value_type, number)] * length
    if _is_text(type_):
        return str(number)
    return number if types.is_integer(type_) else None


def _as_kept(field: pa.Field) -> pa.Field:
    """The field without the column numbers that Parquet files carry, which differ between equal tables.

    A dictionary's indices become int32: those of each row group may fit into fewer bits, and all together not.
    """
    metadata = {key: value for key, value in (field.metadata or {}).items() if not key.startswith(b"PARQUET:")}
    field = field.with_metadata(metadata or None)
    if types.is_dictionary(field.type):
        return field.with_type(pa.dictionary(pa.int32(), field.type.value_type, field.type.ordered))
    return field


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), "of another type")
