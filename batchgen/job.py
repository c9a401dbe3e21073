"""The product's table of contents: submit, status and collection of what dead runs left.

    spec -> plan -> job -> cluster -> worker -> write -> report

A submit plans, drops the shards whose part exists, runs the rest and reconciles from files. Resuming after a crash, a
cron run over new files and doing nothing because all is done are the same act.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from batchgen import (
    acceptance,
    cluster,
    dedupe,
    engines,
    journal,
    ownership,
    plan,
    provenance,
    record,
    report,
    status,
    write,
)
from batchgen.attempt import Task
from batchgen.columns import Columns, check_columns
from batchgen.errors import (
    AcceptanceError,
    DrainedError,
    ModelError,
    ReconciliationError,
    TooManyErrorsError,
)
from batchgen.lease import Lease
from batchgen.speculation import costs
from batchgen.store import connect
from batchgen.worker import Kit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pyarrow as pa

    from batchgen.plan import Plan
    from batchgen.record import Shard
    from batchgen.report import Summary
    from batchgen.spec import Spec
    from batchgen.status import Status
    from batchgen.store import Store
    from batchgen.tally import Tally

log = logging.getLogger("batchgen.job")

# So many are generated or refused before a job is said to be only failing.
FIRST_ROWS = 100
# A run shorter than this says more about warming up than about speed.
MEASURED_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Job:
    """A spec with everything it names found: stores, models, plan. Nothing is loaded onto a device yet.

    `again` has the parts, by their shards' keys, whose failed rows are to be done again.
    """

    spec: Spec
    source: Store
    sink: Store
    kit: Kit
    dtype: str
    plan: Plan
    kept: list[Any]
    columns: Columns
    sampling: record.Sampling
    again: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def output(self) -> str:
        """Folder of the completions."""
        return self.spec.output.path

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Of parts and journal segments."""
        return record.output_schema(
            self.kept, token_ids=self.spec.output.token_ids, answers=self.columns.turns is not None
        )

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """What makes the rows, for job.json, parts and summary; nothing secret."""
        facts = {
            "job": self.spec.name,
            "fingerprint": self.plan.fingerprint,
            "target": self.spec.model.target,
            "target_identity": self.kit.target.identity if self.kit.target else "none",
            "draft": self.spec.model.draft or "none",
            "draft_identity": self.kit.draft.identity if self.kit.draft else "none",
            "engine": self.spec.engine.kind,
            "dtype": self.dtype,
            "machine": provenance.machine(engines.device(self.spec)),
        }
        checkout = provenance.commit()
        if checkout is not None:
            facts["commit"] = checkout
        return facts | {f"version_{name}": version for name, version in provenance.versions().items()}

    def task(self, epoch: int) -> Task:
        """What workers need to know of the job, under the lease of this epoch."""
        checkpoint, speculation = self.spec.checkpoint, self.spec.speculation
        return Task(
            source=self.source,
            sink=self.sink,
            output=self.sink.spelled(self.output),
            schema=self.schema,
            columns=self.columns,
            sampling=self.sampling,
            journal_rows=checkpoint.journal_rows,
            journal_seconds=checkpoint.journal_seconds,
            metadata=self.facts,
            epoch=epoch,
            again=self.again,
            min_acceptance=speculation.min_acceptance,
            below_min=speculation.below_min,
            dedupe=None if self.spec.screen.dedupe == "off" else self.spec.screen.dedupe,
        )

    @functools.cached_property
    def parts(self) -> dict[str, str]:
        """The parts that stand when first asked for, by shard: one listing, which may take seconds."""
        return write.parts(self.sink, self.output)

    def but(self, **changes: Any) -> Job:
        """The same job with other fields, and the parts that it knows."""
        changed = dataclasses.replace(self, **changes)
        vars(changed)["parts"] = self.parts
        return changed

    @functools.cached_property
    def todo(self) -> list[Shard]:
        """Shards without a part, or with one whose failed rows are to be done again, in input order."""
        done = self.parts.keys() - self.again.keys()
        return [shard for shard in self.plan.shards if shard.key not in done]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a submit left behind: the whole job's summary, and this run's tally (None when there was nothing to do).

    `retries` counts the requests to storage that were repeated, by the driver, its lease and the workers.
    """

    summary: Summary
    tally: Tally | None
    output: str
    retries: int


def prepare(spec: Spec, *, weights: bool = True) -> Job:
    """Find everything that `spec` names and plan the job; without `weights`, models on the Hub are only looked up.

    Raises:
        InputError, ModelError, StoreError: something it names is missing or does not fit.
    """
    source = connect(spec.input.path, spec.input.storage_options)
    sink = connect(spec.output.path, spec.output.storage_options)
    kit = Kit.find(spec, weights=weights)
    dtype = engines.dtype(spec)
    fingerprint = plan.fingerprint(
        spec,
        target=kit.target.identity if kit.target else "none",
        template=kit.renderer.template_hash,
        dtype=dtype,
    )
    made = plan.make(source, spec, fingerprint)
    columns = Columns(
        messages=spec.input.messages,
        prompt=spec.input.prompt,
        turns=spec.input.turns,
        system=spec.input.system,
        id=spec.input.id,
        keep=spec.input.keep,
        sampling=spec.input.sampling,
        root=plan.root(source, spec.input.path, made),
    )
    kept = plan.kept_fields(made, lambda schema, file: check_columns(schema, columns, file))
    s = spec.sampling
    sampling = record.Sampling(
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        max_tokens=s.max_tokens,
        n=s.n,
        seed=s.seed,
        stop=s.stop,
        stop_token_ids=s.stop_token_ids,
    )
    return Job(spec, source, sink, kit, dtype, made, kept, columns, sampling)


def submit(
    spec: Spec,
    *,
    mix: bool = False,
    retry_failed: bool = False,
    draining: Callable[[], bool] = lambda: False,
    started: Callable[[Job], None] = lambda job: None,
    watch: Callable[[Tally], None] = lambda tally: None,
) -> Outcome:
    """Run what is left of the job and reconcile. `mix` allows parts of another fingerprint beside this job's.

    `retry_failed` does rows again that stand as errors in parts. `started` is called once all is found and planned,
    `watch` before the first engine step and after every one.

    Raises:
        LeaseHeldError, LeaseLostError: another run writes to the output folder, or took it over.
        OutputConflictError: the output folder holds another job's rows.
        DrainedError: `draining` became true.
        ReconciliationError: the parts do not hold every input row exactly once.
    """
    job = prepare(spec, weights=False)
    with Lease.take(job.sink, job.output, ttl_s=spec.checkpoint.lease_seconds, draining=draining) as lease:
        ownership.claim(job.spec, job.sink, job.plan, job.parts, job.schema, job.facts, mix=mix)
        if retry_failed:
            again = plan.failed(job.sink, job.parts, job.plan)
            job = job.but(again=again)
        if job.todo:
            job = _with_weights(job)
            if draining():
                raise DrainedError(f"drained before anything was begun in {job.output}")
        started(job)
        return _run(job, lease, draining=draining, watch=watch)


def _with_weights(job: Job) -> Job:
    """The job with its models here; who holds no lease, or has nothing to do, need not fetch them."""
    found = job.but(kit=Kit.find(job.spec))
    for name in ("target_identity", "draft_identity"):
        if found.facts[name] != job.facts[name]:
            was, now = job.facts[name], found.facts[name]
            raise ModelError(f"model.{name.partition('_')[0]}: was {was}, and is {now} a moment later; name a revision")
    return found


def collect(spec: Spec, *, remove: bool = True) -> list[str]:
    """URLs of what dead runs left and no submit will use; with `remove`, they are gone.

    Raises:
        LeaseHeldError: a run is under way.
    """
    job = prepare(spec, weights=False)
    with Lease.take(job.sink, job.output, ttl_s=spec.checkpoint.lease_seconds) as lease:
        versions = {file.url: file.version for file in job.plan.files}
        done = {shard.key for shard in job.plan.shards} & job.parts.keys()
        commit = lambda key: write.commit_of(job.sink, job.parts[key])  # noqa: E731
        found = journal.strays(job.sink, job.output, job.plan.fingerprint, versions, done, commit)
        unfinished = job.sink.unfinished(job.output)
        if remove:
            lease.check()
            for folder in found:
                journal.remove(job.sink, folder)
            job.sink.delete(unfinished)
    return found + unfinished


def progress(spec: Spec) -> Status:
    """How far the job is, from files alone."""
    job = prepare(spec, weights=False)
    return status.status(job.sink, job.output, job.plan, job.sampling.n)


def _run(job: Job, lease: Lease, *, draining: Callable[[], bool], watch: Callable[[Tally], None]) -> Outcome:
    """Do what is to do, and reconcile."""
    spec, tally = job.spec, None
    journal.sweep(job.sink, job.output, {shard.key for shard in job.plan.shards} - {shard.key for shard in job.todo})
    if spec.screen.dedupe != "off":
        _mark_duplicates(job, spec.screen.dedupe, lease, draining)
    if job.todo:

        def watched(tally: Tally) -> None:
            lease.check()
            if not job.again:  # whose rows have all failed before
                _only_failing(tally, spec.max_error_rate)
            watch(tally)

        task, costs = job.task(lease.epoch), costs_folder()
        tally = cluster.run(task, job.todo, job.kit, costs, draining=draining, watch=watched)
        _remember_cost(job, tally)
    lease.check()
    summary = report.summarise(job.sink, job.output, job.plan, job.sampling.n)
    stored = report.load(job.sink, job.output) or {}
    if any(stored.get(name) != value for name, value in summary.as_json().items()):
        run = {name: tally and getattr(tally, name) for name in ("tokens_per_s", "speculation")}
        run["retries"] = _retries(job, lease, tally)
        report.save(job.sink, job.output, summary, job.facts | run)
    if summary.problems:
        raise ReconciliationError(f"{job.output}: " + "; ".join(summary.problems))
    if tally is not None and spec.speculation.max_drift is not None:
        _gate_drift(job, spec.speculation.max_drift)
    return Outcome(summary, tally, job.output, _retries(job, lease, tally))


def _mark_duplicates(job: Job, kind: dedupe.Kind, lease: Lease, draining: Callable[[], bool]) -> None:
    def check() -> None:
        lease.check()
        if draining():
            raise DrainedError(f"drained while looking for duplicates; finished files are noted in {job.output}")

    output = job.sink.spelled(job.output)
    found = dedupe.mark(
        job.source,
        job.sink,
        output,
        job.plan.files,
        job.columns,
        job.sampling,
        kind,
        done=dedupe.ranges((shard, job.parts[shard.key]) for shard in job.plan.shards if shard.key in job.parts),
        elsewhere=lambda: plan.answered(job.sink, job.parts, job.plan),
        only_lost=not job.todo,
        check=check,
    )
    nearly = "nearly " if kind == "near" else ""
    log.info("%s of %s rows ask %swhat an earlier one asks", f"{found:,}", f"{job.plan.num_rows:,}", nearly)


def _gate_drift(job: Job, most: float) -> None:
    """Compare what this run has added with the parts that stood when it began.

    Raises:
        AcceptanceError: acceptance surely fell by more than `most`; the rows stand.
    """
    old = set(job.parts.values())
    drift = acceptance.since(job.sink, set(write.parts(job.sink, job.output).values()) - old, old)
    if drift is None:
        return
    found = f"acceptance rate {drift.now:.3f} in this run, {drift.before:.3f} before: {drift.change:+.3f}"
    found += f" ± {drift.error:.3f}"
    if drift.fell_by_more_than(most):
        raise AcceptanceError(f"{found}, below speculation.max_drift {most}; all rows are finished")
    log.info("%s", found)


def _retries(job: Job, lease: Lease, tally: Tally | None) -> int:
    own = job.source.retries + job.sink.retries + lease.retries
    # A worker in this process has the driver's stores.
    return own + (tally.retries if tally and job.spec.on_ray else 0)


def _only_failing(tally: Tally, allowed: float) -> None:
    """Stop a job that would spend its whole time on failing."""
    # What runs has not failed: rows that are refused come before the first that is generated.
    done = tally.ok + tally.error + tally.running
    if done >= FIRST_ROWS and tally.error > max(allowed, 0.5) * done:
        reason, count = max(tally.reasons.items(), key=lambda item: item[1])
        raise TooManyErrorsError(
            f"{tally.error:,} of the first {done:,} rows failed, {count:,} of them with {reason}, and max_error_rate "
            f"is {allowed:g}; finished rows are journalled. Mend the cause, or raise max_error_rate to go on"
        )


def costs_folder() -> Path:
    """Where what was measured on this machine is kept."""
    return Path(platformdirs.user_cache_dir("batchgen")) / "costs"


def cost_key(job: Job) -> str:
    """Names what a job costs on this machine."""
    names = ("machine", "target_identity", "draft_identity", "engine", "dtype", "version_batchgen")
    settings = (
        job.spec.workers.count,
        job.spec.speculation.tree,
        job.spec.batch_size,
        job.sampling.max_tokens,
        job.sampling.temperature,
    )
    return "|".join([*(job.facts[name] for name in names), *map(str, settings)])


def _remember_cost(job: Job, tally: Tally) -> None:
    if tally.ok >= MEASURED_ROWS and tally.tokens_per_s:
        cost = costs.Cost(tally.tokens_per_s, tally.completion_tokens / tally.ok, tally.ok)
        try:
            costs.save(costs_folder(), cost_key(job), cost)
        except OSError as error:  # a read-only home costs an estimate, not a job
            log.info("measured %.0f tokens/s, not kept for `batchgen plan`: %s", tally.tokens_per_s, error)
        else:
            log.info("measured %.0f tokens/s; `batchgen plan` estimates from it", tally.tokens_per_s)
