"""How attempts ended that left nothing but their claims, and which row is to blame."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from batchgen.journal import Journal
from batchgen.record import Shard
from batchgen.store import connect

Anywhere = tuple[str, dict[str, Any]]

SCHEMA = pa.schema([("row_id", pa.string()), ("sample", pa.int32()), ("error_type", pa.string())])
SHARD = Shard(3, "gs://in/a.parquet", "7", 0, 100, "f" * 16)


def row(i: int) -> dict[str, Any]:
    return {"row_id": f"r{i}", "sample": 0}


def claim(store: Any, folder: str) -> Journal:
    return Journal.claim(store, folder, SHARD, SCHEMA, worker="w")


def test_deaths_in_a_row_are_counted_until_the_rows_have_passed_or_the_attempt_ends_of_itself(tmp_path: Any) -> None:
    store, folder = connect(str(tmp_path)), str(tmp_path)
    assert [claim(store, folder).deaths for _ in range(4)] == [0, 1, 2, 3]
    drained = claim(store, folder)
    drained.end()
    again = claim(store, folder)
    assert (drained.deaths, again.deaths) == (4, 4)
    again.passed()
    assert claim(store, folder).deaths == 1


def test_a_row_that_was_alone_at_three_deaths_in_a_row_is_condemned(anywhere: Anywhere) -> None:
    folder, options = anywhere
    store = connect(folder, options)

    def died_at(*tried: int) -> Journal:
        journal = claim(store, folder)
        for i in tried:
            journal.trying((f"r{i}", 0))
            if i != tried[-1]:
                journal.add(row(i))
                journal.flush()
        return journal

    assert died_at(1, 2).suspect is None
    assert died_at(3).suspect == ("r2", 0)
    assert died_at(2, 3).suspect == ("r3", 0)
    last = died_at(4, 3)
    assert (last.suspect, last.condemned) == (("r3", 0), None)
    found = claim(store, folder)
    assert (found.condemned, found.suspect, found.deaths) == (("r3", 0), None, 0)
    found.end()
    again = claim(store, folder)
    assert (again.condemned, again.deaths) == (("r3", 0), 0), "not recorded yet"
    again.add(row(3))
    again.flush()
    after = claim(store, folder)
    assert (after.condemned, after.suspect, after.deaths) == (None, None, 1)
