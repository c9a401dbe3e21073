"""Runs a job's shards on a rehearsal engine that writes down every row it finishes; `resume_driver.py SPEC LOG`."""

from __future__ import annotations

import os
import sys

from batchgen import job, record, spec
from batchgen.engines.rehearsal import RehearsalEngine, Script
from batchgen.lease import Lease
from batchgen.worker import Worker


class Logged(RehearsalEngine):
    def step(self) -> list[record.Completion]:
        done = super().step()
        os.write(log, "".join(f"{completion.key[1]}\n" for completion in done).encode())
        return done


log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
loaded = spec.load(sys.argv[1])
found = job.prepare(loaded)
with Lease.take(found.sink, found.output, ttl_s=loaded.checkpoint.lease_seconds) as lease:
    engine = Logged(batch_size=loaded.batch_size, script=Script.of(loaded.engine.options))
    task = found.task(lease.epoch)
    Worker(task, engine, found.kit.renderer, found.kit.screen).run(found.todo)
