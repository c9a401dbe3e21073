"""Who began an attempt at a shard, on what, and how the attempts before it ended.

Claims also remember deaths. One that left no *note* of its end died with its worker, maybe of a row: the next one says
so (`deaths`), its worker runs fewer rows at once, at last one by one, each noted before, and a row that was alone at
three deaths in a row is `condemned`. Processes are also killed from outside, so who was alone at the last death
(`suspect`) waits for others the next time, and is alone again only if they get through. So a row that kills its
worker is found whether a worker or the whole run begins again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import uuid
from typing import TYPE_CHECKING, Any

from batchgen.errors import CorruptOutputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.record import Shard
    from batchgen.store import Entry, Store

NAME = re.compile(r"claim-(\d+)\.json")
TIMES_ALONE = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """The claim with one number, the segments that it takes over, and how the ones before it ended.

    At `times` deaths in a row the worker was alone with the row `alone`, a (row_id, sample).
    """

    number: int
    nonce: str
    accepted: tuple[str, ...]
    file: str
    version: str
    fingerprint: str = ""
    deaths: int = 0
    alone: tuple[str, int] | None = None
    times: int = 0

    @property
    def guilty(self) -> bool:
        """Whether `alone` has killed its worker often enough."""
        return self.times >= TIMES_ALONE

    @property
    def name(self) -> str:
        """Of its object."""
        return f"claim-{self.number:04d}.json"

    @property
    def segments(self) -> str:
        """How the names of the segments begin that are written under this claim."""
        return f"seg-{self.number:04d}-{self.nonce}-"

    @property
    def notes(self) -> str:
        """How the names of this claim's notes begin."""
        return f"note-{self.number:04d}-{self.nonce}-"

    @staticmethod
    def after(
        before: Claim | None,
        files: Mapping[str, Entry],
        shard: Shard | None = None,
        alone: tuple[str, int] | None = None,
    ) -> Claim:
        """The next claim, with everything that `before` accepted and wrote; `alone` as that function found it."""
        origin = (shard.file, shard.version, shard.fingerprint) if shard else ("", "", "")
        nonce = uuid.uuid4().hex[:12]
        if before is None:
            return Claim(1, nonce, (), *origin)
        written = sorted(name for name in files if name.startswith(before.segments))
        number, accepted = before.number + 1, (*before.accepted, *written)
        if f"{before.notes}end" in files:
            return Claim(number, nonce, accepted, *origin, before.deaths, before.alone, before.times)
        if f"{before.notes}passed" in files or before.guilty:
            return Claim(number, nonce, accepted, *origin, 1)
        times = 0 if alone is None else before.times + 1 if alone == before.alone else 1
        return Claim(number, nonce, accepted, *origin, before.deaths + 1, alone, times)

    def to_json(self, worker: str, epoch: int) -> bytes:
        """As it is stored."""
        facts = {"n": self.number, "worker": worker, "host": platform.node(), "pid": os.getpid(), "epoch": epoch}
        facts |= {"nonce": self.nonce}
        facts |= {"file": self.file, "version": self.version, "fingerprint": self.fingerprint}
        facts |= {"deaths": self.deaths, "alone": self.alone, "times": self.times}
        return json.dumps(facts | {"accepted": self.accepted}, indent=1).encode()

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Claim:
        """Raises KeyError or TypeError for what is none."""
        alone = facts["alone"] and (facts["alone"][0], facts["alone"][1])
        names = (facts["n"], facts["nonce"], tuple(facts["accepted"]))
        origin = (facts["file"], facts["version"], facts.get("fingerprint", ""))
        return Claim(*names, *origin, facts["deaths"], alone, facts["times"])


def latest(store: Store, files: Mapping[str, Entry]) -> Claim | None:
    """The claim with the highest number."""
    numbers = {int(found[1]): name for name in files if (found := NAME.fullmatch(name))}
    if not numbers:
        return None
    url = files[numbers[max(numbers)]].url
    try:
        return Claim.of(json.loads(store.read(url)))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptOutputError(f"{url}: not a claim as batchgen writes it ({error}); remove its folder") from error


def alone(store: Store, before: Claim | None, files: Mapping[str, Entry]) -> tuple[str, int] | None:
    """The row that `before` noted last."""
    noted = [name for name in files if before and name.startswith(f"{before.notes}trying-")]
    if not noted:
        return None
    row_id, sample = json.loads(store.read(files[max(noted)].url))
    return row_id, sample
