"""Hand-out of shards to workers that come, finish, give up rows and die in any order."""

from __future__ import annotations

import dataclasses
import uuid

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchgen.desk import LEAST_ROWS_TO_GIVE, Desk, Give, Leave, Merge, TakeBack
from batchgen.record import Piece, Shard

ROWS = 64


def shards(num: int) -> list[Shard]:
    return [Shard(i, "in.parquet", "1", i * ROWS, (i + 1) * ROWS, "f") for i in range(num)]


def joined(desk: Desk, *workers: str) -> None:
    for worker in workers:
        desk.join(worker)


def half(shard: Shard, claim: str = "seg-") -> Piece:
    return Piece(shard, shard.start + ROWS // 2, shard.stop, claim, uuid.uuid4().hex)


def test_shards_go_out_in_order_to_who_asks():
    desk, todo = Desk(shards(3)), shards(3)
    joined(desk, "a", "b")
    assert [desk.take("a"), desk.take("b"), desk.take("a"), desk.take("b")] == [*todo, None]
    for worker, shard in (("a", 0), ("b", 1), ("a", 2)):
        assert not desk.over
        desk.ended(worker, todo[shard])
    assert desk.over


def test_who_has_none_gets_rows_of_who_has_most():
    desk, todo = Desk(shards(2)), shards(2)
    joined(desk, "a", "b", "c")
    desk.take("a"), desk.take("b")
    desk.tell("a", (todo[0].key, 10))
    desk.tell("b", (todo[1].key, 40))
    assert desk.take("c") is None
    assert desk.tell("a", (todo[0].key, 9)) == []
    assert desk.tell("b", (todo[1].key, 39)) == [Give(todo[1].key)]
    piece = half(todo[1])
    desk.gave("b", piece)
    assert desk.take("c") == piece


def test_the_owner_hears_of_its_piece_finished_or_not():
    desk, [shard] = Desk(shards(1)), shards(1)
    joined(desk, "a", "b", "c")
    desk.take("a")
    first, second = half(shard), half(shard)
    desk.gave("a", first)
    desk.gave("a", second)
    assert [desk.take("b"), desk.take("c")] == [first, second]
    desk.ended("b", first)
    desk.lost("c")
    assert desk.tell("a", ("", 0)) == [Merge(first), TakeBack(second)]


def test_a_piece_that_nobody_could_do_goes_back():
    desk, [shard] = Desk(shards(1)), shards(1)
    joined(desk, "a", "b")
    desk.take("a")
    piece = half(shard)
    desk.gave("a", piece)
    assert desk.take("b") == piece
    desk.refused("b", piece)
    assert desk.tell("a", ("", 0)) == [TakeBack(piece)]


def test_few_rows_are_not_worth_giving():
    desk, [shard] = Desk(shards(1)), shards(1)
    joined(desk, "a", "b")
    desk.take("a")
    desk.tell("a", (shard.key, LEAST_ROWS_TO_GIVE - 1))
    assert desk.take("b") is None
    assert desk.tell("a", (shard.key, LEAST_ROWS_TO_GIVE)) == []


def test_a_dead_owners_shard_waits_for_who_helps_with_it():
    desk, [shard] = Desk(shards(1)), shards(1)
    joined(desk, "a", "b", "c")
    desk.take("a")
    held, queued = half(shard), half(shard)
    desk.gave("a", held)
    assert desk.take("b") == held
    desk.gave("a", queued)
    desk.lost("a")
    assert desk.take("c") is None
    desk.ended("b", held)
    assert desk.take("c") == shard, "whole; nobody has the piece that was not begun"
    assert desk.take("b") is None


def test_who_was_given_up_is_told_to_leave_and_not_heard():
    desk, [shard] = Desk(shards(1)), shards(1)
    joined(desk, "a", "b")
    desk.take("a")
    desk.lost("a")
    assert desk.take("a") is None
    assert desk.tell("a", (shard.key, 50)) == [Leave()]
    desk.gave("a", half(shard))
    assert desk.take("b") == shard
    desk.ended("a", shard)
    assert not desk.over


class Workers(RuleBasedStateMachine):
    """Workers at a desk, each with the rows that it has begun and recorded; all rows must be recorded in the end."""

    @dataclasses.dataclass
    class Own:
        limit: int
        cursor: int
        given: dict[str, Piece]
        recorded: set[int]

    @initialize(num=st.integers(0, 5))
    def open(self, num: int) -> None:
        self.desk, self.todo = Desk(shards(num)), shards(num)
        self.workers: dict[str, dict[str, Workers.Own]] = {}
        self.helping: dict[str, list[Piece]] = {}
        self.journal: dict[str, set[int]] = {shard.key: set() for shard in self.todo}
        self.done: list[str] = []
        self.num_hired = 0

    def hire(self) -> str:
        self.num_hired += 1
        name = f"{self.num_hired:04d}"
        self.desk.join(name)
        self.workers[name], self.helping[name] = {}, []
        return name

    def step(self, name: str) -> None:
        """A worker does all that it can at once."""
        item = self.desk.take(name)
        if isinstance(item, Piece):
            self.helping[name].append(item)
        elif item is not None:
            assert item.key not in self.done
            assert all(item.key not in own for own in self.workers.values()), "one owner at a time"
            own = Workers.Own(item.stop, item.start, {}, set())
            own.recorded = self.journal[item.key]
            self.workers[name][item.key] = own

    @rule()
    def join(self) -> None:
        if len(self.workers) < 4:
            self.hire()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def takes(self, data) -> None:
        self.step(data.draw(st.sampled_from(sorted(self.workers))))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), rows=st.integers(1, ROWS))
    def works(self, data, rows: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        for key, own in self.workers[name].items():
            stop = min(own.limit, own.cursor + rows)
            self.journal[key] |= set(range(own.cursor, stop))
            own.cursor = stop

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def tells(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        left = {key: own.limit - own.cursor for key, own in self.workers[name].items()}
        spare = max(left.items(), key=lambda each: each[1], default=("", 0))
        for order in self.desk.tell(name, spare):
            self.obey(name, order)
        for shard in self.todo:
            own = self.workers[name].get(shard.key)
            if own and not own.given and own.cursor == own.limit:
                assert self.journal[shard.key] == set(range(shard.start, shard.stop)), "no row is forgotten"
                del self.workers[name][shard.key]
                self.done.append(shard.key)
                self.desk.ended(name, shard)

    def obey(self, name: str, order: Give | Merge | TakeBack | Leave) -> None:
        assert not isinstance(order, Leave)
        if isinstance(order, Give):
            own = self.workers[name].get(order.key)
            num = (own.limit - own.cursor) // 2 if own else 0
            piece = None
            if own and num:
                shard = next(shard for shard in self.todo if shard.key == order.key)
                own.limit -= num
                piece = Piece(shard, own.limit, own.limit + num, name, uuid.uuid4().hex)
                own.given[piece.nonce] = piece
            self.desk.gave(name, piece)
            return
        own = self.workers[name][order.piece.shard.key]
        del own.given[order.piece.nonce]
        if isinstance(order, TakeBack):
            self.journal[order.piece.shard.key] |= set(range(order.piece.start, order.piece.stop))

    @precondition(lambda self: any(self.helping.values()))
    @rule(data=st.data())
    def helps(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, pieces in self.helping.items() if pieces)))
        piece = self.helping[name].pop()
        self.journal[piece.shard.key] |= set(range(piece.start, piece.stop))
        self.desk.ended(name, piece)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def dies(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        del self.workers[name], self.helping[name]
        self.desk.lost(name)

    @invariant()
    def it_is_over_when_all_is_done(self) -> None:
        if hasattr(self, "desk"):
            assert self.desk.over == (len(self.done) == len(self.todo))
            assert len(set(self.done)) == len(self.done)

    def teardown(self) -> None:
        """One worker can always finish what is left, once the others are gone."""
        if not hasattr(self, "desk"):
            return
        for name in list(self.workers):
            del self.workers[name], self.helping[name]
            self.desk.lost(name)
        last = self.hire()
        for _ in self.todo:
            self.step(last)
        assert {*self.workers[last], *self.done} == {shard.key for shard in self.todo}


TestWorkers = Workers.TestCase
