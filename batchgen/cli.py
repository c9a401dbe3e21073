"""The command line: click commands and exit codes. Prints, never computes; imports nothing heavy before it must."""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from batchgen import __version__
from batchgen.errors import BatchgenError, DrainedError

if TYPE_CHECKING:
    from types import FrameType

    from batchgen.spec import Spec
    from batchgen.tally import Tally

_SPEC = click.argument("spec", type=click.Path(exists=True, dir_okay=False))
_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the job file (sampling.max_tokens=64) or give a template name a value. Repeatable.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


class _Commands(click.Group):
    """Turns our errors into one line on stderr and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DrainedError as e:
            click.echo(str(e), err=True)
            ctx.exit(e.exit_code)
        except BatchgenError as e:
            for line in str(e).splitlines():
                click.echo(f"error: {line}", err=True)
            ctx.exit(e.exit_code)


_FORMS = ("speculators", "speculators-states", "specforge", "specforge-states", "modelopt", "modelopt-states",
          "messages", "sharegpt")  # fmt: skip


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="batchgen")
def main() -> None:
    """Turn a table of prompts into a table of completions, with a target model and its EAGLE-3 draft head.

    \b
    batchgen plan jobs/quickstart.yaml      what would run
    batchgen screen jobs/quickstart.yaml    its input without what would not run
    batchgen submit jobs/quickstart.yaml    run what is left of it
    batchgen status jobs/quickstart.yaml    how far it is
    batchgen report jobs/quickstart.yaml    where its draft head is right, and where not
    batchgen features jobs/quickstart.yaml  hidden states of its rows
    batchgen export jobs/quickstart.yaml    its rows as training data

    \b
    Exit codes: 0 done; 1 too many error rows, or rows are missing; 2 bad job file, input or model;
    73 the output holds another job's rows; 75 drained, Ray gone, or another run holds the output: run it again.
    """  # noqa: D301  # click reads the backspace itself


@main.command()
@_SPEC
@_SET
@click.option("--mix", is_flag=True, help="Allow an output folder that holds rows of another model or sampling.")
@click.option("--retry-failed", is_flag=True, help="Do rows again that ended as errors, and replace their parts.")
@click.option(
    "--log",
    "log_mode",
    type=click.Choice(["auto", "progress", "plain", "json"]),
    default="auto",
    show_default=True,
    help="Progress line, log lines or JSON lines on stderr; auto: progress on a terminal, else plain.",
)
@_JSON
def submit(spec: str, overrides: tuple[str, ...], mix: bool, retry_failed: bool, log_mode: Any, as_json: bool) -> None:
    """Run what is left of a job, and reconcile its output.

    Shards whose part file exists are done; finished rows of the others are in the journal. So the same command starts a
    job, resumes it after a crash, does what is new in its input, or finds that there is nothing to do.
    """
    loaded = _load(spec, overrides)
    drain = _Drain(at_once=True)
    from batchgen import job, terminal

    with terminal.Watcher(log_mode) as watcher:

        def watch(tally: Tally) -> None:
            drain.later()
            watcher.watch(tally)

        result = job.submit(
            loaded,
            mix=mix,
            retry_failed=retry_failed,
            draining=drain.requested,
            started=watcher.started,
            watch=watch,
        )
    facts = result.summary.as_json() | {"output": result.output, "ran": result.tally is not None}
    click.echo(json.dumps(facts) if as_json else terminal.outcome(result))
    if result.summary.error_rate > loaded.max_error_rate:
        click.echo(
            f"error: {result.summary.error:,} of {result.summary.rows:,} rows are errors, "
            f"more than max_error_rate {loaded.max_error_rate} allows",
            err=True,
        )
        sys.exit(1)


@main.command()
@_SPEC
@_SET
@_JSON
def plan(spec: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a submit would do, without an engine: files, rows, shards, prompt lengths, size and time."""
    loaded = _load(spec, overrides)
    from batchgen import survey, terminal

    found = survey.survey(loaded)
    click.echo(terminal.as_json(found) if as_json else terminal.survey(found))


@main.command()
@_SPEC
@_SET
@click.option("--to", metavar="FOLDER", required=True, help="Where to; the same command resumes there.")
@_JSON
def screen(spec: str, overrides: tuple[str, ...], to: str, as_json: bool) -> None:
    """Write the input's rows that a submit would generate as clean Parquet, and generate nothing.

    With all their columns; personal data is masked, duplicates and rows with a problem are left out, as `screen` in the
    job file says.
    """
    loaded = _load(spec, overrides)
    drain = _Drain()
    from batchgen import clean, terminal

    done = clean.run(loaded, to, draining=drain.requested)
    click.echo(terminal.as_json(done) if as_json else terminal.cleaned(done))


@main.command()
@_SPEC
@_SET
@_JSON
def status(spec: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show how far a job is, from its files."""
    loaded = _load(spec, overrides)
    from batchgen import job, terminal

    found = job.progress(loaded)
    click.echo(terminal.as_json(found) if as_json else terminal.status(found))


@main.command()
@_SPEC
@_SET
@click.option("--by", metavar="COLUMN,...", help="Columns of the output; length, prompt_length, position.")
@click.option("--against", metavar="FOLDER", help="The output folder of another run, of other days or another head.")
@click.option("--max-drift", type=click.FloatRange(0, 1), help="Exit with 1 if acceptance surely fell by more.")
@_JSON
def report(
    spec: str, overrides: tuple[str, ...], by: str | None, against: str | None, max_drift: float | None, as_json: bool
) -> None:
    """Show where the draft head is right and where not, and whether that has changed.

    Reads the parts that are finished. What is uncertain is said beside each rate; rows vary, so few rows say little.
    """
    loaded = _load(spec, overrides)
    if max_drift is not None and against is None:
        raise click.UsageError("--max-drift needs --against")
    from batchgen import acceptance, terminal
    from batchgen.store import connect

    store = connect(loaded.output.path, loaded.output.storage_options)
    output = loaded.output.path
    groups = acceptance.by(store, output, by.split(",") if by else [])
    drift = None
    if against is not None:
        other = connect(against, loaded.output.storage_options)
        drift = acceptance.against(store, output, other, against.rstrip("/"))
    click.echo(terminal.as_json({"groups": groups, "drift": drift}) if as_json else terminal.report(groups, drift))
    if drift is not None and max_drift is not None and drift.fell_by_more_than(max_drift):
        click.echo(f"error: acceptance fell by more than --max-drift {max_drift}", err=True)
        sys.exit(1)


@main.command()
@_SPEC
@_SET
@click.option(
    "--to", metavar="FOLDER", help="Where to; by default features/ among what the job keeps beside its parts."
)
@click.option("--layers", metavar="N,N,...", help="After how many decoder layers; by default its head's, and the last.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@_JSON
def features(
    spec: str, overrides: tuple[str, ...], to: str | None, layers: str | None, dtype: str, as_json: bool
) -> None:
    """Capture the target's hidden states of a job's finished rows, for training a draft head.

    The target reads prompt and completion once more, by the job's engine. What is captured already is left alone, so
    the same command resumes, and does what is new after the next submit.
    """
    loaded = _load(spec, overrides)
    try:
        at = None if layers is None else [int(layer) for layer in layers.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{layers!r}: expected numbers such as 2,15,27,30", param_hint="--layers") from error
    drain = _Drain()
    from batchgen import features, terminal

    def started(work: Any) -> None:
        click.echo(terminal.features(work), err=True)

    def stored(file: Any) -> None:
        click.echo(f"{file.name}: {file.stop - file.start:,} rows, {file.num_tokens:,} tokens", err=True)

    work = features.run(loaded, to=to, layers=at, dtype=dtype, draining=drain.requested, started=started, stored=stored)
    click.echo(terminal.as_json(work) if as_json else f"features: {work.folder} ({len(work.files):,} files)")


@main.command()
@_SPEC
@_SET
@click.option("--form", type=click.Choice(_FORMS), required=True, help="Whose input it is to be.")
@click.option("--to", metavar="FOLDER", required=True, help="Where to; an earlier export there is replaced.")
@click.option("--where", metavar="SQL", help="Rows to take, over the output's columns: acceptance_rate < 0.5")
@click.option("--sample", type=click.FloatRange(0, min_open=True), help="That many at random, or below 1 that share.")
@click.option(
    "--hold-out", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Share of rows kept for validation."
)
@click.option("--states", metavar="FOLDER", help="Where the hidden states are; by default where `features` puts them.")
@_JSON
def export(
    spec: str,
    overrides: tuple[str, ...],
    form: str,
    to: str,
    where: str | None,
    sample: float | None,
    hold_out: float,
    states: str | None,
    as_json: bool,
) -> None:
    """Write a job's finished rows as training data for a draft head.

    speculators: JSON lines of token ids and loss mask; specforge, modelopt: JSON lines of conversations; with -states:
    what their trainers read, with hidden states; messages, sharegpt: Parquet. The same rows are chosen whenever and
    wherever it runs.
    """
    loaded = _load(spec, overrides)
    from batchgen import export, terminal

    done = export.run(loaded, form, to, export.Selection(where, sample, hold_out), states=states)
    click.echo(terminal.as_json(done) if as_json else terminal.export(done))


@main.command()
@_SPEC
@_SET
@click.option("--dry-run", is_flag=True, help="Only name it.")
@_JSON
def gc(spec: str, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Remove what dead runs left and no submit will use.

    Journals of shards that have their part, or whose input file was changed since, and on disk unfinished files that
    are an hour old. Parts are never touched.
    """
    loaded = _load(spec, overrides)
    from batchgen import job, terminal

    found = job.collect(loaded, remove=not dry_run)
    click.echo(
        terminal.as_json({"removed": not dry_run, "found": found})
        if as_json
        else terminal.garbage(found, removed=not dry_run)
    )


@main.command()
@_SPEC
@_SET
def validate(spec: str, overrides: tuple[str, ...]) -> None:
    """Check a job file; report everything that is wrong with it at once."""
    loaded = _load(spec, overrides)
    click.echo(f"{spec}: valid; {loaded.input.path} to {loaded.output.path}")


@main.command()
def schema() -> None:
    """Print the JSON schema of job files, for editors."""
    from batchgen.spec import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


def _load(path: str, overrides: tuple[str, ...]) -> Spec:
    from batchgen import spec

    return spec.load(path, overrides)


class _Drain:
    """Asks the job to drain on the first SIGINT or SIGTERM; a second one ends the process at once.

    With `at_once` the first one ends, until `later` is called, whatever is waited for: a model may take longer to load
    than a machine that is preempted has left.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self._requested, self._at_once = False, at_once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        click.echo(
            f"{signal.Signals(number).name}: draining; once more ends at once (nothing journalled is lost)", err=True
        )
        signal.signal(number, signal.SIG_DFL)
        if self._at_once:
            raise DrainedError("drained before the first step; the same command begins again")

    def later(self) -> None:
        self._at_once = False

    def requested(self) -> bool:
        return self._requested
