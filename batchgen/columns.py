"""What the columns of a table must be: which the job names, of which types, and what can be copied to the output."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from batchgen.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from batchgen.spec import SamplingColumn


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


def check_columns(schema: pa.Schema, columns: Columns, file: str) -> list[pa.Field]:
    """The kept columns' fields, in the order of `columns.keep`, of a table that has all the job's columns.

    Raises:
        InputError: a column is missing, there twice, of a type that cannot hold what it should, or is to be kept and
            of a type that a part cannot hold.
    """
    for name, key, fits, expected in needs(columns):
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


# Of what may differ by row: the test that a column's type must pass, what makes a value of one, and both in words.
SAMPLING: dict[str, tuple[Callable[[pa.DataType], bool], Callable[[Any], Any], str]] = {
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


def needs(columns: Columns) -> Iterator[tuple[str, str, Callable[[pa.DataType], bool], str]]:
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
        yield column, f"input.sampling.{field}", SAMPLING[field][0], SAMPLING[field][2]
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
