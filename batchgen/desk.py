"""Which worker has which shard: hand-out one at a time, work that moves to who has none, shards of the dead.

Plain bookkeeping on one thread, without Ray, storage or clocks: `actors` puts it into one that workers ask, and
examples/bench/desk.py asks it in the name of a thousand. A worker takes a shard when it has room for more rows, so a
slow one holds up nobody. Once none is left, who has rows to spare is ordered to give some of them up (`Give`), and they
go as a `Piece` to who asks next. A piece comes back to the shard's owner, finished (`Merge`) or not (`TakeBack`);
a shard whose owner died waits for pieces of it that are under way, because their rows count for its next owner, too.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TYPE_CHECKING

from batchgen.record import Piece, Shard

if TYPE_CHECKING:
    from collections.abc import Iterable

# A piece costs a dozen requests to the storage.
LEAST_ROWS_TO_GIVE = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Give:
    """Give up rows of the shard `key` that are not begun (`worker.Worker.give`)."""

    key: str


@dataclasses.dataclass(frozen=True, slots=True)
class Merge:
    """`piece` is finished; take its rows in (`worker.Worker.take_back`)."""

    piece: Piece


@dataclasses.dataclass(frozen=True, slots=True)
class TakeBack:
    """`piece` is not finished and will not be; do what is left of it (`worker.Worker.take_back`)."""

    piece: Piece


@dataclasses.dataclass(frozen=True, slots=True)
class Leave:
    """The worker was given up as lost, and others do its rows; it may write no more."""


Order = Give | Merge | TakeBack | Leave


@dataclasses.dataclass(slots=True)
class _Holder:
    """What one worker has."""

    shards: dict[str, Shard] = dataclasses.field(default_factory=dict)
    pieces: dict[str, Piece] = dataclasses.field(default_factory=dict)
    orders: list[Order] = dataclasses.field(default_factory=list)
    asked: bool = False


class Desk:
    """Hands out `shards` in their order to workers, which are known by a name that none has had before."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._queue: deque[Shard | Piece] = deque(shards)
        self._left = len(self._queue)
        self._holders: dict[str, _Holder] = {}
        self._owner: dict[str, str] = {}
        self._pieces: dict[str, set[str]] = {}
        self._orphans: dict[str, Shard] = {}
        self._spare: dict[str, tuple[str, int]] = {}

    @property
    def over(self) -> bool:
        """Whether every shard is done."""
        return self._left == 0

    def join(self, worker: str) -> None:
        """There is a new worker."""
        self._holders[worker] = _Holder()

    def take(self, worker: str) -> Shard | Piece | None:
        """What `worker` is to do next; None if there is nothing now."""
        holder = self._holders.get(worker)
        if holder is None:
            return None
        if not self._queue:
            self._ask(worker)
            return None
        item = self._queue.popleft()
        if isinstance(item, Piece):
            holder.pieces[item.nonce] = item
        else:
            holder.shards[item.key] = item
            self._owner[item.key] = worker
        return item

    def ended(self, worker: str, item: Shard | Piece) -> None:
        """`worker` has committed a shard or journalled a piece; whose claim on it was lost meanwhile is not heard."""
        holder = self._holders.get(worker)
        if holder is None:
            return
        if isinstance(item, Shard):
            if holder.shards.pop(item.key, None) is not None:
                del self._owner[item.key]
                self._pieces.pop(item.key, None)
                self._left -= 1
        elif holder.pieces.pop(item.nonce, None) is not None:
            self._back(item, Merge(item))

    def refused(self, worker: str, piece: Piece) -> None:
        """`worker` could not do a piece, because the attempt that gave it is over."""
        holder = self._holders.get(worker)
        if holder is not None and holder.pieces.pop(piece.nonce, None) is not None:
            self._back(piece, TakeBack(piece))

    def tell(self, worker: str, spare: tuple[str, int]) -> list[Order]:
        """What `worker` is to do beside its rows. It could give up so many rows of a shard (its key, their number)."""
        holder = self._holders.get(worker)
        if holder is None:
            return [Leave()]
        self._spare.pop(worker, None)
        if spare[1] >= LEAST_ROWS_TO_GIVE and not holder.asked:
            self._spare[worker] = spare
        orders, holder.orders = holder.orders, []
        return orders

    def gave(self, worker: str, piece: Piece | None) -> None:
        """The answer to `Give`."""
        holder = self._holders.get(worker)
        if holder is None:
            return  # its shard begins again, whole
        holder.asked = False
        if piece is not None and self._owner.get(piece.shard.key) == worker:
            self._pieces.setdefault(piece.shard.key, set()).add(piece.nonce)
            self._queue.append(piece)

    def lost(self, worker: str) -> None:
        """`worker` is no more; what it had goes to others."""
        holder = self._holders.pop(worker, _Holder())
        self._spare.pop(worker, None)
        for key, shard in holder.shards.items():
            del self._owner[key]
            waiting = [item for item in self._queue if isinstance(item, Piece) and item.shard.key == key]
            for piece in waiting:
                self._queue.remove(piece)
                self._pieces[key].discard(piece.nonce)
            self._orphans[key] = shard
            self._requeue(key)
        for piece in holder.pieces.values():
            self._back(piece, TakeBack(piece))

    def _ask(self, worker: str) -> None:
        """Order who has most rows to spare to give some up."""
        others = (item for item in self._spare.items() if item[0] != worker)
        victim, (key, _) = max(others, key=lambda item: item[1][1], default=("", ("", 0)))
        if victim:
            del self._spare[victim]
            self._holders[victim].asked = True
            self._holders[victim].orders.append(Give(key))

    def _back(self, piece: Piece, order: Order) -> None:
        key = piece.shard.key
        self._pieces[key].discard(piece.nonce)
        owner = self._owner.get(key)
        if owner is not None:
            self._holders[owner].orders.append(order)
        self._requeue(key)

    def _requeue(self, key: str) -> None:
        """A shard without an owner begins again once nobody works on it."""
        if key in self._orphans and not self._pieces.get(key):
            self._queue.appendleft(self._orphans.pop(key))
