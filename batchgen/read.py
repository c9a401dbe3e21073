"""The first step of a row's way: the rows of a shard out of its Parquet file.

Every row of the range comes out, in order and exactly once, whatever it holds: what cannot be used (a null, a wrong
type, bytes that are no text, an id seen before) becomes the row's verdict. Row ids are unique within a shard. Only a
table of another shape than the job file says is refused, by `columns.check_columns`, before anything runs.

Columns the job does not name are never read, nor a file as a whole: a part of a 100 GB table costs the bytes of the row
groups that it lies in, and parts that one reader takes in order cost them once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.columns import SAMPLING, Columns, check_columns, needs
from batchgen.errors import InputError
from batchgen.record import Message, Row, Sampling, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchgen.record import Shard
    from batchgen.store import Store

# Rows may hold 100 kB each, so a batch is small; decoding is not what a job waits for.
_BATCH_ROWS = 256
# What pyarrow raises for a value that Python has no word for: dates beyond the year 9999, unknown time zones, ...
_UNWORDED = (ValueError, OverflowError, LookupError, pa.ArrowException)
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Unusable(Exception):  # noqa: N818  # it never leaves this module, and is a finding rather than a failure
    """What is wrong with a row: error type and error of its verdict."""


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
        names = dict.fromkeys(need[0] for need in needs(columns))
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
    names = dict.fromkeys(need[0] for need in needs(columns))
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
            of, expected = SAMPLING[field][1:]
            try:
                own[field] = of(value)
            except (TypeError, ValueError, OverflowError) as error:
                found = ascii(value)[:60]
                raise _Unusable("bad_sampling", f"{field} (column {column!r}) is {found}, not {expected}") from error
    return dataclasses.replace(default, **own) if own else default


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), "of another type")
