"""Shards that the driver's desk hands out in a second, and the memory that it takes.

    python examples/bench/desk.py --workers 1000 --shards 100000 --json FILE

Workers are coroutines that do to `batchgen.desk.Desk` what Ray workers do: take a shard, tell twice how it goes, give
up rows when they are ordered to, say that it ended. One in a hundred shards its worker dies. Nothing is generated.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import resource
import sys
import time
import uuid
from pathlib import Path

from batchgen.desk import Desk, Give, Merge, TakeBack
from batchgen.record import Piece, Shard

sys.path.insert(0, str(Path(__file__).parent))
from results import write

ROWS = 4096


class Simulated:
    """A worker of the desk, which begins its rows at once and records them when it is asked next."""

    names = itertools.count()

    def __init__(self, desk: Desk, rng: random.Random) -> None:
        self._desk, self._rng = desk, rng
        self.num_taken = self.num_died = self.num_given = 0

    async def run(self) -> None:
        """Until all is done, hired anew after each death."""
        while not self._desk.over:
            name = str(next(self.names))
            self._desk.join(name)
            await self._live(name)

    async def _live(self, name: str) -> None:
        while not self._desk.over:
            item = self._desk.take(name)
            await asyncio.sleep(0)
            if item is None:
                self._desk.tell(name, ("", 0))
                continue
            self.num_taken += 1
            if isinstance(item, Piece):
                self._desk.ended(name, item)
                continue
            if self._rng.random() < 0.01:
                self._desk.lost(name)
                self.num_died += 1
                return
            await self._own(name, item)

    async def _own(self, name: str, shard: Shard) -> None:
        cursor, limit, out = shard.start, shard.stop, 0
        for share in (3, 1):
            cursor += (limit - cursor) // share if share > 1 else 0
            await asyncio.sleep(0)
            for order in self._desk.tell(name, (shard.key, limit - cursor)):
                num = (limit - cursor) // 2
                if isinstance(order, Give) and num:
                    limit -= num
                    out += 1
                    self.num_given += 1
                    self._desk.gave(name, Piece(shard, limit, limit + num, name, uuid.uuid4().hex))
        while out:
            await asyncio.sleep(0)
            out -= sum(isinstance(order, Merge | TakeBack) for order in self._desk.tell(name, ("", 0)))
        self._desk.ended(name, shard)


async def crew(desk: Desk, num: int) -> list[Simulated]:
    """All workers at once, to the end."""
    rng = random.Random(0)  # noqa: S311
    workers = [Simulated(desk, rng) for _ in range(num)]
    await asyncio.gather(*(worker.run() for worker in workers))
    return workers


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, default=1000)
    options.add_argument("--shards", type=int, default=100_000)
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    ranges = ((i * ROWS, (i + 1) * ROWS) for i in range(args.shards))
    desk = Desk(Shard(i, "gs://in/prompts.parquet", "1", *each, "f" * 16) for i, each in enumerate(ranges))
    began = time.perf_counter()
    workers = asyncio.run(crew(desk, args.workers))
    seconds = time.perf_counter() - began
    fact = {
        "workers": args.workers,
        "shards": args.shards,
        "shards_per_s": round(args.shards / seconds),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "taken": sum(worker.num_taken for worker in workers),
        "given": sum(worker.num_given for worker in workers),
        "died": sum(worker.num_died for worker in workers),
    }
    print(json.dumps(fact))
    write(args.json, [fact], args, "cpu")


if __name__ == "__main__":
    main()
