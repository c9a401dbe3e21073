"""How a job looks: a progress line on a terminal, log lines elsewhere, JSON lines for machines, and the closing words.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from types import TracebackType

    from batchgen.acceptance import Drift, Group
    from batchgen.clean import Cleaned
    from batchgen.export import Export
    from batchgen.features import Work
    from batchgen.job import Job, Outcome
    from batchgen.status import Status
    from batchgen.survey import Survey
    from batchgen.tally import Tally

Log = Literal["auto", "progress", "plain", "json"]
LOG_SECONDS = 10.0

log = logging.getLogger("batchgen")


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        facts |= {"logger": record.name, "message": record.getMessage()}
        return json.dumps(facts | getattr(record, "facts", {}))


class _ConsoleHandler(logging.Handler):
    """Prints above a live progress line instead of through it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


class Watcher:
    """Shows a submit under way; use as a context manager and pass its methods to `job.submit`."""

    def __init__(self, mode: Log) -> None:
        self._console = Console(stderr=True)
        if mode == "auto":
            mode = "progress" if self._console.is_terminal else "plain"
        self._mode = mode
        self._last: float | None = None
        self._total = 0
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TextColumn("{task.fields[facts]}"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=None, facts="")

    def __enter__(self) -> Self:
        configure_logging(self._mode, self._console)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def started(self, job: Job) -> None:
        """The job is planned."""
        rows = sum(shard.num_rows for shard in job.todo)
        self._total = rows * job.sampling.n
        done = len(job.plan.shards) - len(job.todo)
        draft = f" with draft head {job.spec.model.draft}" if job.kit.draft else ""
        workers = f", {job.spec.workers.count} workers" if job.spec.workers.count > 1 else ""
        log.info(
            "%s: %d of %d rows to do in %d shards (%d shards done), %s%s, %s, up to %d rows at a time%s",
            job.spec.name,
            rows,
            job.plan.num_rows,
            len(job.todo),
            done,
            job.spec.engine.kind if job.kit.target is None else job.spec.model.target,
            draft,
            job.dtype,
            job.spec.batch_size,
            workers,
        )
        if self._mode == "progress" and job.todo:
            self._progress.update(self._task, total=self._total)
            self._progress.start()

    def watch(self, tally: Tally) -> None:
        """Called before the first engine step and after every one."""
        if self._mode == "progress":
            self._progress.update(self._task, completed=min(tally.samples, self._total), facts=_facts(tally))
        elif self._last is None:
            self._last = time.monotonic()  # an engine that has made no step has nothing to tell
        elif time.monotonic() - self._last >= LOG_SECONDS:
            self._last = time.monotonic()
            numbers = dataclasses.asdict(tally) | {"total": self._total, "tokens_per_s": tally.tokens_per_s}
            numbers["acceptance_length"] = tally.acceptance_length
            done = min(tally.samples, self._total)  # rows of a worker that died are counted again
            log.info("%d/%d rows, %s", done, self._total, _facts(tally), extra={"facts": numbers})


def configure_logging(mode: str, console: Console | None = None) -> None:
    """Send the program's own log to stderr as `mode` says; libraries stay silent below warnings."""
    if mode == "json":
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonFormatter())
    elif mode == "progress" and console is not None:
        handler = _ConsoleHandler(console)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)


def _facts(tally: Tally) -> str:
    facts = [f"{tally.running} running"]
    if tally.tokens_per_s:
        facts.insert(0, f"{tally.tokens_per_s:.0f} tokens/s")
    if tally.draft_tokens and tally.acceptance_length:
        facts.append(f"acceptance length {tally.acceptance_length:.2f}")
    return ", ".join(facts)


def outcome(result: Outcome) -> str:
    """The closing words of a submit."""
    s, tally = result.summary, result.tally
    lines = [f"{s.rows:,} rows: {s.ok:,} ok, {s.error:,} error, {s.skipped:,} skipped"]
    lines += [f"  {reason}: {count:,}" for reason, count in s.reasons.items()]
    if tally is None:
        lines[0] += " (all done before; nothing to do)"
    elif tally.tokens_per_s:
        resumed = f", {tally.resumed:,} rows taken over from journals" if tally.resumed else ""
        resumed += f", {tally.standing:,} rows left as they stood" if tally.standing else ""
        lines.append(f"{tally.completion_tokens:,} tokens at {tally.tokens_per_s:,.0f} tokens/s{resumed}")
    if s.acceptance_rate is not None and s.acceptance_length is not None:
        per_depth = zip(s.accepted_per_depth, s.drafted_per_depth, strict=True)
        depths = " ".join(f"{accepted / drafted:.3f}" for accepted, drafted in per_depth)
        lines.append(
            f"acceptance rate {s.acceptance_rate:.3f}, acceptance length {s.acceptance_length:.2f} tokens per target "
            f"pass, by depth {depths}"
        )
    if s.lookup_tokens:
        kept, of_all = s.accepted_lookup_tokens / s.lookup_tokens, s.accepted_lookup_tokens / s.completion_tokens
        lines.append(f"looked up beside the head: {kept:.3f} of {s.lookup_tokens:,} tokens kept, {of_all:.1%} of all")
    if tally is not None:
        lines += _tuned(tally.speculation.get("workers") or [tally.speculation])
    if result.retries:
        lines.append(f"{result.retries:,} requests to storage repeated")
    lines.append(f"output: {result.output} ({s.parts:,} part{'s' if s.parts != 1 else ''})")
    if result.tally is not None and result.tally.redacted:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(result.tally.redacted.items()))
        lines.append(f"masked in prompts: {kinds}")
    lines.append(f"open it: python -c \"import polars; print(polars.read_parquet('{result.output}/*.parquet'))\"")
    return "\n".join(lines)


def _tuned(reports: list[dict[str, Any]]) -> list[str]:
    """What `tree: auto` did, over all workers."""
    lines = []
    trees = [report for report in reports if "steps" in report]
    if trees:
        steps = sum(report["steps"] for report in trees)
        share = sum(report["drafting_steps"] for report in trees) / steps
        names = ("nodes_per_row", "tokens_per_step", "expected_tokens_per_step")
        nodes, came, expected = (sum(report["steps"] * report[name] for report in trees) / steps for name in names)
        lines.append(
            f"tree auto: {share:.0%} of steps drafted, {nodes:.2f} nodes a row and step; {came:.2f} tokens a step, "
            f"{expected:.2f} expected"
        )
    chain = next((report for report in reports if "lengths" in report), None)
    if chain is not None and chain["head"]:
        lengths = ", ".join(f"{first}-{last} rows: {length}" for first, last, length in chain["lengths"])
        lines.append(f"tree auto: tokens drafted at {lengths}")
    elif chain is not None:
        lines.append("tree auto: vLLM ran without the head: earlier jobs found that drafts hardly pay here")
    return lines


def survey(found: Survey) -> str:
    """What `batchgen plan` prints."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("files", f"{found.files:,}")
    table.add_row("rows", f"{found.rows:,}, {found.rows_todo:,} to do")
    table.add_row("shards", f"{found.shards:,}, {found.shards - found.shards_todo:,} done, {found.shards_todo:,} to do")
    if found.sampled:
        generated = len(found.prompt_tokens)
        table.add_row(
            "sample",
            f"{found.sampled:,} rows: {generated:,} would be generated"
            + ", duplicates aside" * (found.dedupe != "off"),
        )
        for reason, count in sorted(found.verdicts.items()):
            table.add_row("", f"{count:,} {reason}")
        for label, count in _histogram(found.prompt_tokens):
            bar = "#" * max(1, round(30 * count / generated))
            table.add_row("prompt tokens" if label.startswith("up to") else "", f"{label:>15} {count:>6,} {bar}")
    if found.rows_todo:
        table.add_row("output", f"about {_bytes(found.output_bytes)}")
        if found.estimate_s is None:
            table.add_row("time", "unknown: this model was not run on this machine yet; the first submit measures it")
        else:
            table.add_row("time", f"about {_duration(found.estimate_s)}, going by the last run on this machine")
    return _plain(table)


def _plain(table: Table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _histogram(lengths: list[int]) -> list[tuple[str, int]]:
    """Counts per power of two, from the shortest to the longest prompt."""
    buckets: dict[int, int] = {}
    for length in lengths:
        bucket = max(16, 1 << (length - 1).bit_length())
        buckets[bucket] = buckets.get(bucket, 0) + 1
    labelled: list[tuple[str, int]] = []
    for bucket in sorted(buckets):
        label = f"up to {bucket:,}" if not labelled else f"{bucket // 2 + 1:,}-{bucket:,}"
        labelled.append((label, buckets[bucket]))
    return labelled


def status(found: Status) -> str:
    """What `batchgen status` prints."""
    left = found.rows - found.rows_done - found.rows_journalled
    return "\n".join(
        [
            f"shards: {found.shards_done:,} of {found.shards:,} done",
            f"rows:   {found.rows_done:,} of {found.rows:,} done, {found.rows_journalled:,} in journals, {left:,} left",
        ]
    )


def report(groups: list[Group], drift: Drift | None) -> str:
    """What `batchgen report` prints."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("rows", "tokens", "passes", "acceptance rate", "length", "by depth"):
        table.add_column(column, justify="left" if column == "by depth" else "right")
    for group in groups:
        rate = "nothing drafted" if group.rate is None else f"{group.rate:.3f}"
        rate += "" if group.error is None else f" ± {group.error:.3f}"
        length = "" if group.length is None else f"{group.length:.2f}"
        depths = " ".join(f"{share:.3f}" for share in group.by_depth)
        counts = (f"{group.rows:,}", f"{group.tokens:,}", f"{group.passes_share:.0%}")
        table.add_row(group.name, *counts, rate, length, depths)
    lines = [_plain(table)]
    if drift is not None:
        which = f"{drift.rows:,} rows that both have" if drift.rows else "all rows of either, no row is in both"
        verdict = "beyond noise" if drift.beyond_noise else "within noise"
        change = f"{drift.change:+.3f} ± {drift.error:.3f}, {verdict}"
        lines.append(f"acceptance rate {drift.before:.3f} before, {drift.now:.3f} now: {change} ({which})")
    return "\n".join(lines)


def features(work: Work) -> str:
    """What `batchgen features` prints before it starts."""
    tokens = sum(file.num_tokens for file in work.todo)
    after = ", ".join(map(str, work.layers))
    return (
        f"{len(work.todo):,} of {len(work.files):,} files to do: {tokens:,} tokens, after layers {after}, in "
        f"{work.dtype}: {_bytes(work.num_bytes)}"
    )


def export(done: Export) -> str:
    """What `batchgen export` prints."""
    apart = f", {done.held_out:,} of them held out" if done.held_out else ""
    lines = [f"{done.rows:,} rows{apart}: {done.tokens:,} tokens, {done.target_tokens:,} of them the target's own"]
    lines += [f"left out: {count:,} {why}" for why, count in done.left_out.items() if count]
    if done.train_data_ratio is not None:
        lines.append(f"the rows held out are the last: train with --train-data-ratio {done.train_data_ratio:.9f}")
    return "\n".join([*lines, f"export: {done.folder} ({len(done.files):,} files)"])


def cleaned(done: Cleaned) -> str:
    """What `batchgen screen` prints."""
    lines = [f"{done.kept:,} of {done.rows:,} rows kept"]
    lines += [f"  {reason}: {count:,}" for reason, count in sorted(done.refused.items())]
    if done.redacted:
        lines.append(f"masked: {', '.join(f'{count:,} {kind}' for kind, count in sorted(done.redacted.items()))}")
    return "\n".join([*lines, f"clean input: {done.folder} ({done.files:,} files)"])


def garbage(found: list[str], *, removed: bool) -> str:
    """What `batchgen gc` prints."""
    verb = "removed" if removed else "would remove"
    return "\n".join(f"{verb} {url}" for url in found) or "nothing to remove"


def as_json(facts: Any) -> str:
    """`--json`: the same facts for machines."""
    return json.dumps(facts, default=dataclasses.asdict)


def _bytes(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
