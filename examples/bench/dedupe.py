"""How long looking for equal (or nearly equal) prompts takes and how much memory, in a process of its own.

    python examples/bench/dedupe.py --rows 5000000 --files 50 --json examples/bench/results/dedupe-cpu.json
    python examples/bench/dedupe.py --rows 5000000 --files 50 --kind near

Synthetic chats of about 200 characters on the local disk, a tenth of them repeating others, are looked through twice:
`seconds` for files that are new, `again_s` for a night on which one of them is. `peak_mb` is the largest resident size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from results import write

from batchgen import dedupe, plan
from batchgen.columns import Columns
from batchgen.record import Sampling
from batchgen.store import connect


def table(path: Path, first: int, rows: int) -> None:
    """A file of chats; each tenth asks what the one before asks."""
    numbers = pl.int_range(first, first + rows, eager=True)
    numbers = pl.Series([n - 1 if n % 10 == 9 else n for n in numbers])
    text = pl.format("Write a line about the number {}. " + "It should be a good one. " * 7, numbers)
    content = pl.select(text).to_series()
    chats = pl.DataFrame({"role": ["user"] * rows, "content": content}).to_struct("m").reshape((rows, 1))
    pl.DataFrame({"messages": chats.arr.to_list()}).write_parquet(path)


def look(folder: Path, files: int, rows: int, kind: dedupe.Kind, facts: Any) -> None:
    """Put seconds, repetitions and the largest resident size into `facts`."""
    store = connect(str(folder))
    columns = Columns(messages="messages")
    names = [str(folder / f"{i:04d}.parquet") for i in range(files)]
    found = [plan.File(name, store.info(name).version, rows // files, pa.schema([])) for name in names]
    began = time.perf_counter()
    facts["repetitions"] = dedupe.mark(store, store, f"{folder}/out", found, columns, Sampling(), kind)
    facts["seconds"] = round(time.perf_counter() - began, 1)
    Path(names[-1]).touch()
    found[-1] = plan.File(names[-1], store.info(names[-1]).version, rows // files, pa.schema([]))
    began = time.perf_counter()
    dedupe.mark(store, store, f"{folder}/out", found, columns, Sampling(), kind)
    facts["again_s"] = round(time.perf_counter() - began, 1)
    facts["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=5_000_000)
    options.add_argument("--files", type=int, default=50)
    options.add_argument("--kind", choices=["exact", "near"], default="exact")
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as name, multiprocessing.get_context("spawn").Manager() as manager:
        for i in range(args.files):
            table(Path(name) / f"{i:04d}.parquet", i * (args.rows // args.files), args.rows // args.files)
        facts = manager.dict({"kind": args.kind, "rows": args.rows, "files": args.files})
        process = multiprocessing.get_context("spawn").Process(
            target=look, args=(Path(name), args.files, args.rows, args.kind, facts)
        )
        process.start()
        process.join()
        fact = dict(facts)
    print(json.dumps(fact))
    write(args.json, [fact], args, "cpu")


if __name__ == "__main__":
    main()
