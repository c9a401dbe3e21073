"""Whose an output folder is: the first submit notes its job there, and no other may put a row beside, or twice."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from batchgen import journal, plan, urls
from batchgen.errors import CorruptOutputError, OutputConflictError
from batchgen.store import STATE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa

    from batchgen.plan import Plan
    from batchgen.spec import Spec
    from batchgen.store import Store

JOB = f"{STATE_FOLDER}/job.json"


def claim(
    spec: Spec,
    sink: Store,
    made: Plan,
    parts: Mapping[str, str],
    schema: pa.Schema,
    facts: Mapping[str, str],
    *,
    mix: bool,
) -> None:
    """Claim the output folder for the job of `spec`, or see that it is its own already.

    `parts` are those that stand there, `facts` what the job notes of itself beside its spec.

    Raises:
        OutputConflictError: it holds rows of another job and `mix` does not allow for that, rows with other columns, or
            rows that this job would write again.
        CorruptOutputError: what the folder says of its job cannot be read.
    """
    output = spec.output.path
    columns = [f"{field.name}: {field.type}" for field in schema]
    url = f"{output}/{JOB}"
    mine = {"fingerprint": made.fingerprint, "columns": columns, "rows_per_part": spec.checkpoint.rows_per_part}
    text = json.dumps({**mine, **facts, "spec": _public(spec)}, indent=2).encode()
    theirs: dict[str, Any] = mine if sink.create(url, text) else _stored(sink, url)
    other = any(theirs.get(name) != value for name, value in mine.items())
    if other and not parts and not any(journal.pending(sink, output).values()):
        sink.put(url, text)  # a submit that never finished a row holds nothing
        return
    elsewhere = "choose another output.path"
    if theirs.get("columns") != columns:
        found = ", ".join(sorted(set(theirs.get("columns", ())) ^ set(columns))) or "their order"
        raise OutputConflictError(f"{output}: its parts have other columns than this job's ({found}); {elsewhere}")
    same = theirs.get("fingerprint") == mine["fingerprint"]
    if not same and not mix:
        raise OutputConflictError(
            f"{output}: holds rows of another job, which differs in {_difference(theirs, spec, facts)}; "
            f"{elsewhere}, or --mix to keep both in one folder"
        )
    if same and theirs.get("rows_per_part") != mine["rows_per_part"]:
        rows, wanted = theirs.get("rows_per_part"), mine["rows_per_part"]
        raise OutputConflictError(
            f"{output}: its parts hold {rows} rows each; checkpoint.rows_per_part {wanted} would write "
            f"the same rows again; keep {rows}, or {elsewhere}"
        )
    doubled = plan.strangers(sink, parts, made)
    if doubled:
        raise OutputConflictError(
            f"{output}: {len(doubled)} parts could hold rows that this job would write again: "
            f"{'; '.join(doubled[:3])}; remove them, or {elsewhere}"
        )


def _stored(sink: Store, url: str) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(sink.read(url))
        _ = facts["fingerprint"]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptOutputError(f"{url}: not what batchgen notes of a job ({error}); choose another output.path, or "
                                 f"remove it if the folder holds this job's rows only") from error  # fmt: skip
    return facts


def _difference(theirs: dict[str, Any], spec: Spec, facts: Mapping[str, str]) -> str:
    """What makes the fingerprints of two jobs differ, for people."""
    before = plan.asked(theirs["spec"]) if "spec" in theirs else {}
    differs = [f"{name} ({theirs.get(name)}, now {facts[name]})" for name in ("target_identity", "dtype", "engine")
               if theirs.get(name) != facts[name]]  # fmt: skip
    differs += [name for name, value in plan.asked(_public(spec)).items() if before.get(name) != value]
    return ", ".join(differs) or "the chat template"


def _public(spec: Spec) -> dict[str, Any]:
    """The spec as it may be stored: storage options can hold secrets."""
    shown: dict[str, Any] = spec.model_dump(mode="json")
    for folder in ("input", "output"):
        shown[folder].pop("storage_options", None)
    shown["engine"]["options"] = _masked(shown["engine"]["options"])
    return shown


def _masked(options: Any) -> Any:
    """Engine options without what may be secret among them."""
    if isinstance(options, list | tuple):
        return [_masked(option) for option in options]
    if isinstance(options, str):
        return urls.without_secrets(options)
    if not isinstance(options, dict):
        return options
    secret = re.compile("token$|secret|passw|credential|auth|(api|access)[-_]?key", re.IGNORECASE)
    return {name: "not stored" if secret.search(str(name)) else _masked(value) for name, value in options.items()}
