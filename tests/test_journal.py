"""The journal: what was flushed is found again, once, whoever died, woke up or ran twice."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from faultproxy import Fault
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen import journal, record
from batchgen.errors import CorruptOutputError, OutputConflictError, StoreError
from batchgen.journal import Journal
from batchgen.record import Piece, Shard
from batchgen.store import STATE_FOLDER, connect

if TYPE_CHECKING:
    from faultproxy import FaultProxy

Anywhere = tuple[str, dict[str, Any]]
Key = tuple[str, int]

# Parquet has no seconds and makes milliseconds of them.
KEPT = [pa.field("asked", pa.timestamp("s")), pa.field("weight", pa.float64()), pa.field("tags", pa.list_(pa.string()))]
SCHEMA = record.output_schema(KEPT)
SHARD = Shard(3, "gs://in/a.parquet", "7", 0, 100, "f" * 16)


def row(i: int, sample: int = 0, text: str = "text") -> dict[str, Any]:
    return dict.fromkeys(SCHEMA.names) | {
        "row_id": f"r{i}",
        "sample": sample,
        "messages": [{"role": "user", "content": text}],
        "completion": text * (i % 7),
        "completion_token_ids": [i, i + 1],
        "accepted_per_depth": [],
        "weight": float("nan"),
        "tags": ["a", None],
        "status": "ok",
    }


def claim(store: Any, folder: str, shard: Shard = SHARD, **settings: Any) -> Journal:
    return Journal.claim(store, folder, shard, SCHEMA, worker="w", **settings)


def keys(table: pa.Table) -> list[Key]:
    return sorted(zip(table["row_id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def segments(store: Any, folder: str) -> list[str]:
    return [url for url in store.find(folder) if url.endswith(".rows")]


def test_what_was_flushed_is_found_by_the_next_attempt(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    first = claim(store, folder)
    for i in range(5):
        first.add(row(i, sample=i % 2))
        first.flush()
    first.flush()
    first.add(row(9))
    assert first.done == {("r0", 0), ("r1", 1), ("r2", 0), ("r3", 1), ("r4", 0), ("r9", 0)} == {*keys(first.table())}
    second = claim(store, folder)
    assert second.done == first.done - {("r9", 0)}, "what is only buffered dies with its worker"
    assert second.table().schema == SCHEMA
    found = second.table().sort_by("row_id").to_pylist()[3]
    assert math.isnan(found.pop("weight"))
    assert found == {name: value for name, value in row(3, 1).items() if name != "weight"}
    second.add(row(9))
    second.flush()
    third = claim(store, folder)
    assert third.done == first.done
    assert keys(third.table()) == sorted(first.done)


def test_a_row_is_never_added_twice(tmp_path: Any) -> None:
    store = connect(str(tmp_path))
    first = claim(store, str(tmp_path))
    first.add(row(1))
    with pytest.raises(AssertionError, match="in the journal already"):
        first.add(row(1))
    first.flush()
    with pytest.raises(AssertionError, match="in the journal already"):
        claim(store, str(tmp_path)).add(row(1))
    first.add(row(1, sample=1))


def test_a_flush_is_due_by_number_or_by_age_and_never_when_empty(tmp_path: Any) -> None:
    attempt = claim(connect(str(tmp_path)), str(tmp_path), max_rows=3, max_seconds=20.0)
    assert not attempt.due(time.monotonic() + 1000)
    attempt.add(row(0))
    added = time.monotonic()
    assert not attempt.due(added + 19)
    assert attempt.due(added + 20)
    attempt.add(row(1))
    assert not attempt.due(added)
    assert attempt.due(added + 20), "the oldest row counts, not the newest"
    attempt.add(row(2))
    assert attempt.due(added)
    attempt.flush()
    assert not attempt.due(added + 1000)


def test_a_store_that_takes_its_time_is_asked_sooner(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = connect(str(tmp_path))
    attempt = claim(store, str(tmp_path), max_rows=3, max_seconds=2.0)
    create = store.create

    def slowly(url: str, data: bytes) -> bool:
        time.sleep(0.5)
        return create(url, data)

    monkeypatch.setattr(store, "create", slowly)
    for i in range(2):
        attempt.add(row(i))
        added = time.monotonic()
        assert attempt.due(added + 2.0)
        assert attempt.due(added + 1.5) == (i == 1), "what the last one took is left for the next"
        attempt.flush()


def test_a_zombies_rows_count_for_nothing(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    zombie = claim(store, folder)
    zombie.add(row(1, text="before"))
    zombie.flush()
    second = claim(store, folder)
    zombie.add(row(2, text="zombie"))
    zombie.add(row(3, text="zombie"))
    zombie.flush()
    second.add(row(2, text="second"))
    second.flush()
    third = claim(store, folder)
    assert third.done == {("r1", 0), ("r2", 0)}
    assert {text[0]["content"] for text in third.table()["messages"].to_pylist()} == {"before", "second"}
    assert journal.pending(store, folder) == {SHARD.key: 2}


def test_a_zombie_of_a_removed_journal_cannot_join_the_new_one(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    zombie = claim(store, folder)
    claim(store, folder).remove()
    again = claim(store, folder)
    again.add(row(1))
    again.flush()
    zombie.add(row(1))
    zombie.add(row(2))
    zombie.flush()
    assert claim(store, folder).done == {("r1", 0)}


def test_two_journals_under_one_claim_are_found_out(tmp_path: Any) -> None:
    store = connect(str(tmp_path))
    one = claim(store, str(tmp_path))
    twin = Journal(store, one._folder, one._claim, SCHEMA, {}, max_rows=64, max_seconds=20.0)
    one.add(row(1))
    one.flush()
    twin.add(row(2))
    with pytest.raises(StoreError, match=r"seg-0001-\w+-000000\.rows: exists with other content"):
        twin.flush()


def test_shards_do_not_see_each_other(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    other = dataclasses.replace(SHARD, start=100, stop=200)
    for number, shard in enumerate((SHARD, other), start=1):
        attempt = claim(store, folder, shard)
        for i in range(number):
            attempt.add(row(i))
        attempt.flush()
    assert journal.pending(store, folder) == {SHARD.key: 1, other.key: 2}
    claim(store, folder).remove()
    assert journal.pending(store, folder) == {other.key: 2}
    assert {url.split("/")[-2] for url in store.find(folder)} == {other.key}
    store.create(f"{folder}/{dataclasses.replace(other, index=99).part_name}", b"")
    assert journal.pending(store, folder) == {}, "a shard with a part is not pending, whatever its ordinal"
    assert journal.pending(store, f"{folder}/none") == {}


def test_pending_counts_segments_with_long_footers(tmp_path: Any) -> None:
    store = connect(str(tmp_path))
    schema = pa.schema([*SCHEMA, *(pa.field(f"column_{i:03d}" + "x" * 200, pa.int32()) for i in range(300))])
    attempt = Journal.claim(store, str(tmp_path), SHARD, schema, worker="w")
    attempt.add(row(1))
    attempt.flush()
    assert store.info(segments(store, str(tmp_path))[0]).size_bytes > 2 * journal._FOOTER_BYTES
    assert journal.pending(store, str(tmp_path)) == {SHARD.key: 1}


def test_racing_claimers_get_claims_of_their_own(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    first = claim(store, folder)
    first.add(row(0))
    first.flush()
    with ThreadPoolExecutor(6) as threads:
        journals = list(threads.map(lambda i: claim(connect(*anywhere), folder), range(6)))
    assert sorted(attempt._claim.number for attempt in journals) == [2, 3, 4, 5, 6, 7]
    for i, attempt in enumerate(journals):
        assert attempt.done == {("r0", 0)}
        attempt.add(row(i + 1))
        attempt.flush()
    last = max(range(6), key=lambda i: journals[i]._claim.number)
    assert claim(store, folder).done == {("r0", 0), (f"r{last + 1}", 0)}


def test_a_damaged_segment_is_named_and_never_gives_other_rows(tmp_path: Any) -> None:
    """One bit flipped anywhere: an error, or (in the parts of the footer that nobody reads) the very same rows."""
    store, folder, rng = connect(str(tmp_path)), str(tmp_path), random.Random(0)
    attempt = claim(store, folder)
    for i in range(50):
        attempt.add(row(i, text=uuid.UUID(int=rng.getrandbits(128)).hex) | {"weight": i / 3})
    attempt.flush()
    (url,) = segments(store, folder)
    data, found_out = store.read(url), []
    for _ in range(100):
        at = rng.randrange(len(data))
        store.put(url, data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            assert claim(store, folder).table().equals(attempt.table())
        except (CorruptOutputError, OutputConflictError) as error:
            found_out.append(str(error))
    assert len(found_out) > 50
    for message in found_out:
        assert re.fullmatch(rf"{url}: .+; remove {url.rsplit('/', 1)[0]} to generate its rows again", message)


def test_a_missing_or_doubled_or_foreign_segment_is_named(tmp_path: Any) -> None:
    store, folder = connect(str(tmp_path)), str(tmp_path)
    attempt = claim(store, folder)
    for i in range(2):
        attempt.add(row(i))
        attempt.flush()
    second = claim(store, folder)
    first, last = segments(store, folder)
    body = store.read(last)
    with pytest.raises(OutputConflictError, match=rf"^{first}: journalled with other columns .*asked"):
        Journal.claim(store, folder, SHARD, record.output_schema([]), worker="w")
    store.put(last, store.read(first))
    with pytest.raises(CorruptOutputError, match=f"^{last}: holds a row that stands elsewhere already"):
        claim(store, folder)
    store.delete([last])
    with pytest.raises(CorruptOutputError, match=f"^{last}: this journal segment is missing"):
        claim(store, folder)
    assert journal.pending(store, folder) == {SHARD.key: 1}
    store.put(last, body)
    assert claim(store, folder).done == second.done
    newest = max(url for url in store.find(folder) if "claim" in url)
    store.put(newest, b"{}")
    with pytest.raises(CorruptOutputError, match=f"^{newest}: not a claim"):
        claim(store, folder)


class Interrupted:
    """A real store at which something happens right before the n-th call of a verb."""

    def __init__(self, store: Any, verb: str, call: int, then: Any) -> None:
        self._store, self._verb, self._call, self._then = store, verb, call, then

    def __getattr__(self, name: str) -> Any:
        if name == self._verb:
            self._call -= 1
            if self._call == 0:
                self._then()
        return getattr(self._store, name)


@pytest.mark.parametrize("verb", ["find", "read", "create", "tails"])
def test_a_claim_during_a_removal_starts_over(anywhere: Anywhere, verb: str) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    owner = claim(store, folder)
    owner.add(row(1))
    owner.flush()
    late = claim(Interrupted(store, verb, 1, owner.remove), folder)
    assert late.done == set()
    late.add(row(1))
    late.flush()
    assert claim(store, folder).done == {("r1", 0)}


def test_a_removal_that_was_cut_short_leaves_nothing_that_counts_and_nothing_in_the_way(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]

    def killed() -> None:
        raise KeyboardInterrupt

    owner = claim(Interrupted(store, "remove", 1, killed), folder)
    owner.add(row(1))
    owner.flush()
    with pytest.raises(KeyboardInterrupt):
        owner.remove()
    assert len(segments(store, folder)) == 1
    assert journal.pending(store, folder) == {SHARD.key: 0}
    assert claim(store, folder).done == set()


def test_a_flush_whose_answer_is_lost_counts_once(faults: FaultProxy, gcs_folder: Anywhere) -> None:
    folder = gcs_folder[0]
    store = connect(folder, {"endpoint_url": faults.url})
    faults.faults = [Fault("^POST /upload/", "applied"), Fault("^POST /upload/", "applied", status=None, skip=1)]
    attempt = claim(store, folder)
    assert store.retries == 1
    attempt.add(row(1))
    attempt.flush()
    assert store.retries == 2
    attempt.add(row(2))
    attempt.flush()
    assert claim(store, folder).done == {("r1", 0), ("r2", 0)}
    assert [url.rsplit("/", 1)[-1] for url in store.find(folder) if "claim" in url] == [
        "claim-0001.json",
        "claim-0002.json",
    ]


def piece(owner: Journal) -> Piece:
    return Piece(SHARD, 50, 100, owner.claim_name, uuid.uuid4().hex[:12])


def helper(store: Any, folder: str, piece: Piece) -> Journal:
    joined = Journal.join(store, folder, piece, SCHEMA)
    assert joined is not None
    return joined


def test_a_helpers_rows_are_the_owners_and_of_who_comes_after_it(anywhere: Anywhere) -> None:
    folder, options = anywhere
    store = connect(folder, options)
    owner = claim(store, folder)
    owner.add(row(0))
    owner.flush()
    mine, yours = piece(owner), piece(owner)
    first, second = helper(store, folder, mine), helper(store, folder, yours)
    assert first.done == {("r0", 0)}
    first.add(row(1))
    second.add(row(2))
    first.flush()
    owner.merge(mine)
    assert keys(owner.table()) == [("r0", 0), ("r1", 0)]
    second.flush()
    owner.merge(yours)
    assert keys(owner.table()) == [("r0", 0), ("r1", 0), ("r2", 0)]
    assert keys(claim(store, folder).table()) == [("r0", 0), ("r1", 0), ("r2", 0)]


def test_rows_that_two_helpers_did_stand_once(tmp_path: Any) -> None:
    """One was thought dead, its rows were done again, and it wakes up."""
    store, folder = connect(str(tmp_path)), str(tmp_path)
    owner = claim(store, folder)
    lost = piece(owner)
    zombie = helper(store, folder, lost)
    zombie.add(row(1))
    owner.add(row(1))
    owner.add(row(2))
    owner.flush()
    zombie.flush()
    assert helper(store, folder, piece(owner)).done == {("r1", 0), ("r2", 0)}
    owner.merge(lost)
    assert keys(owner.table()) == [("r1", 0), ("r2", 0)]
    assert keys(claim(store, folder).table()) == [("r1", 0), ("r2", 0)]


def test_nobody_helps_under_a_claim_that_is_over(anywhere: Anywhere) -> None:
    folder, options = anywhere
    store = connect(folder, options)
    owner = claim(store, folder)
    given = piece(owner)
    late = helper(store, folder, given)
    late.add(row(1))
    following = claim(store, folder)
    assert Journal.join(store, folder, given, SCHEMA) is None
    late.flush()
    following.merge(given)
    assert following.done == set()
    now = piece(following)
    following.remove()
    assert Journal.join(store, folder, now, SCHEMA) is None


def test_the_journal_stands_where_no_table_reader_looks(tmp_path: Any) -> None:
    store, folder = connect(str(tmp_path)), str(tmp_path)
    attempt = claim(store, folder)
    attempt.add(row(1))
    attempt.flush()
    place = f"{folder}/{STATE_FOLDER}/journal/{SHARD.key}/"
    found = [url.removeprefix(place) for url in store.find(folder)]
    assert found[0] == "claim-0001.json"
    assert found[1].endswith("-000000.rows")
    assert json.loads(store.read(place + found[0])).items() >= {"n": 1, "worker": "w", "accepted": []}.items()


@settings(max_examples=60)
@given(st.data())
def test_any_interleaving_keeps_each_row_once_and_everything_flushed_in_line(data: st.DataObject) -> None:
    """Against a model: workers claim, add, flush and stop at any moment; nobody knows who is alive."""
    folder = f"memory://journal/{uuid.uuid4().hex}"
    store = connect(folder)
    journals: list[Journal] = []
    # What a claim must find: what its predecessor had accepted and what that one had flushed by then.
    flushed: list[set[Key]] = []
    buffered: list[set[Key]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        act = data.draw(st.sampled_from(["claim", "add", "add", "flush"]))
        if act == "claim" or not journals:
            journals.append(claim(store, folder))
            flushed.append(set(flushed[-1]) if flushed else set())
            buffered.append(set())
            assert journals[-1].done == flushed[-1]
            continue
        who = data.draw(st.integers(0, len(journals) - 1))
        if act == "add":
            key = (f"r{data.draw(st.integers(0, 5))}", 0)
            if key not in journals[who].done:
                journals[who].add(row(int(key[0][1:])))
                buffered[who].add(key)
        else:
            journals[who].flush()
            flushed[who] |= buffered[who]
            buffered[who] = set()
        assert keys(journals[who].table()) == sorted(flushed[who] | buffered[who])
    if journals:
        assert journal.pending(store, folder) == {SHARD.key: len(flushed[-1])}
    store.remove(folder)
