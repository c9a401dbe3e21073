"""What there is to do: input files to shards, from Parquet footers alone.

A shard is `(file, file version, row range, generation fingerprint)`; whether it is done is decided by whether its part
exists (`write.parts`), never by counting rows or by position. The fingerprint holds what changes a row's tokens and
nothing else, so that head, tree, batch size and workers may change between two submits of one job.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.record import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.spec import Spec
    from batchgen.store import Entry, Store

# Most footers fit; one that does not is read again in full.
TAIL_BYTES = 64 * 1024
TAILS_AT_ONCE = 1024
_SIGN = re.compile(r"[*?\[]")
_TELLING_INPUT = ("messages", "prompt", "turns", "system", "id", "sampling")
# Of vLLM's EngineArgs (0.32) those that make another model of the same weights, or take other prompts. The others say
# where and how fast it runs, and what a job should not be refused for.
_TELLING = {
    "default_mm_loras",
    "disable_sliding_window",
    "generation_config",
    "hf_config_path",
    "hf_overrides",
    "kv_cache_dtype",
    "kv_cache_dtype_skip_layers",
    "load_format",
    "logits_processors",
    "max_model_len",
    "model_class_overrides",
    "model_weights",
    "override_generation_config",
    "quantization",
    "quantization_config",
    "watermark_config",
}


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """One input file as its footer describes it."""

    url: str
    version: str
    num_rows: int
    schema: pa.Schema


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """All shards of a job in input order, done or not."""

    files: list[File]
    shards: list[Shard]
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Input rows of the job."""
        return sum(file.num_rows for file in self.files)


def make(store: Store, spec: Spec, fingerprint: str) -> Plan:
    """List the input and cut it into shards of `checkpoint.rows_per_part` rows.

    Raises:
        InputError: nothing matches the path, or a file is not Parquet.
    """
    entries = _entries(store, spec.input.path)
    try:
        files = [_file(store, entry, tail) for entry, tail in _tails(store, entries)]
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: was there a moment ago and is gone; run again") from error
    shards: list[Shard] = []
    step = spec.checkpoint.rows_per_part
    for file in files:
        for start in range(0, file.num_rows, step):
            stop = min(start + step, file.num_rows)
            shards.append(Shard(len(shards), file.url, file.version, start, stop, fingerprint))
    return Plan(files, shards, fingerprint)


def fingerprint(spec: Spec, *, target: str, template: str, dtype: str) -> str:
    """16 hex digits over everything that changes a row's tokens.

    `target` is the model's identity, `template` the hash of chat template and tokenizer, `dtype` the resolved one.
    """
    said = asked(spec.model_dump(mode="json"))
    facts = {
        "target": target,
        "template": template,
        "dtype": dtype,
        "engine": spec.engine.kind,
        "columns": said["input"],
        "screen": said["screen"],
        "sampling": said["sampling"],
    }
    if chosen := said["engine.options"]:
        facts["options"] = chosen
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def asked(said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a job file, as JSON has it, changes a row's tokens or its verdict, not only its speed or rounding."""
    given, screen, options = said["input"], dict(said["screen"]), said["engine"]["options"]
    if isinstance(screen.get("pii"), dict):
        screen["pii"] = {name: value for name, value in screen["pii"].items() if name != "project"}
    return {
        "input": {name: given[name] for name in _TELLING_INPUT if name in given},
        "screen": screen,
        "sampling": said["sampling"],
        "engine.options": {name: options[name] for name in sorted(_TELLING & options.keys())},
    }


def kept_fields(plan: Plan, check: Callable[[pa.Schema, str], list[pa.Field]]) -> list[pa.Field]:
    """The kept columns, which every file must have alike; `check` is `check_columns` bound to the job's columns.

    Raises:
        InputError: a file lacks a column or has it with another type than the first file.
    """
    first: list[pa.Field] | None = None
    seen: list[pa.Schema] = []
    for file in plan.files:
        if file.schema in seen:
            continue
        seen.append(file.schema)
        fields = check(file.schema, file.url)
        if first is None:
            first = fields
        for field, expected in zip(fields, first, strict=True):
            if field.type != expected.type:
                raise InputError(
                    f"{file.url}: column {field.name} is {field.type}, in {plan.files[0].url} it is {expected.type}; "
                    f"kept columns must have one type in all files"
                )
    return first or []


def root(store: Store, path: str, made: Plan) -> str:
    """The part of `made`'s file URLs that `path` fixes: the folder before its first glob sign, itself or its file's.

    Without a slash at the end, except for the root of the local disk.
    """
    folder = store.spelled(path)
    sign = _SIGN.search(folder) if _SIGN.search(path) else None
    if sign is not None:
        folder = folder[: sign.start()].rpartition("/")[0]
    elif not any(file.url.startswith(f"{folder}/") for file in made.files):
        folder = folder.rpartition("/")[0]
    return folder or "/"


def strangers(store: Store, parts: Mapping[str, str], made: Plan) -> list[str]:
    """One line for each part that `made` does not know but whose rows it would write again.

    `parts` maps shard keys to URLs in one folder, as `write.parts` does. A part of this fingerprint whose file is still
    input holds another version of that file, or was cut at other rows. Parts of files that are input no longer and
    parts of another fingerprint stand beside this job's without harm.
    """
    own = {shard.key for shard in made.shards}
    versions = {file.url: file.version for file in made.files}
    lines = []
    for url, footer in _footers(store, {url for key, url in parts.items() if key not in own}):
        if isinstance(footer, Exception):
            lines.append(f"{url}: cannot be read ({_first_line(footer)}), so whose rows it holds is not known")
            continue
        facts = _facts(footer)
        file, version, rows = (facts.get(name, "") for name in ("file", "file_version", "rows"))
        if facts.get("fingerprint") != made.fingerprint or file not in versions:
            continue
        if version != versions[file]:
            why = f"which has changed (version {version}, now {versions[file]})"
        else:
            why = "which is cut at other rows now (checkpoint.rows_per_part)"
        lines.append(f"{url}: holds rows {rows} of {file}, {why}")
    return lines


def answered(store: Store, parts: Mapping[str, str], made: Plan) -> list[tuple[str, str, int, int]]:
    """The rows of `parts` of this fingerprint that `made` does not know: file, its version, first row and last + 1."""
    own = {shard.key for shard in made.shards}
    footers = _footers(store, {url for key, url in parts.items() if key not in own})
    facts = [_facts(footer) for _, footer in footers if not isinstance(footer, Exception)]
    mine = [f for f in facts if f.get("fingerprint") == made.fingerprint]
    return [(f["file"], f["file_version"], *map(int, f["rows"].split("-"))) for f in mine]  # type: ignore[misc]


def failed(store: Store, parts: Mapping[str, str], made: Plan) -> dict[str, str]:
    """Those of `parts`, shard keys to URLs, that are of this plan and hold rows with status "error"."""
    keys = {parts[shard.key]: shard.key for shard in made.shards if shard.key in parts}
    return {keys[url]: url for url, footer in _footers(store, set(keys)) if _may_hold_errors(footer)}


def _may_hold_errors(footer: pq.FileMetaData | Exception) -> bool:
    """By the smallest status of each row group: "error" stands before "ok" and "skipped"."""
    if isinstance(footer, Exception):
        return False  # reconciliation names it
    groups = (footer.row_group(i) for i in range(footer.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    found = (column.statistics for column in columns if column.path_in_schema == "status")
    return any(known is None or not known.has_min_max or known.min == "error" for known in found)


def _footers(store: Store, urls: set[str]) -> Iterator[tuple[str, pq.FileMetaData | Exception]]:
    """The footer of each object, or why it has none, by sorted URL; what is not there is left out."""
    folders = {url.rpartition("/")[0] for url in urls}
    found = {url: entry for folder in folders for url, entry in store.find(folder, recursive=False).items()}
    entries = [found[url] for url in sorted(urls & found.keys())]
    for entry, tail in _tails(store, entries):
        try:
            yield entry.url, _footer(store, entry, tail)
        except (ValueError, OSError, pa.ArrowException) as error:
            yield entry.url, error


def _tails(store: Store, entries: Sequence[Entry]) -> Iterator[tuple[Entry, bytes]]:
    """The end of each object, many at a time, and not all at once: they may be a hundred thousand."""
    for start in range(0, len(entries), TAILS_AT_ONCE):
        some = entries[start : start + TAILS_AT_ONCE]
        yield from zip(some, store.tails(some, TAIL_BYTES), strict=True)


def _facts(footer: pq.FileMetaData) -> dict[str, str]:
    """What `write.commit` noted in a part about its shard."""
    noted = {key.decode(errors="replace"): value for key, value in (footer.metadata or {}).items()}
    names = ("fingerprint", "file", "file_version", "rows")
    return {name: noted[f"batchgen.{name}"].decode() for name in names if f"batchgen.{name}" in noted}


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _entries(store: Store, path: str) -> list[Entry]:
    if _SIGN.search(path):
        found = list(store.glob(path).values())
    else:
        found = _file_entry(store, path) if path.rstrip("/").endswith(".parquet") else []
        # Spark calls its folders `x.parquet`, too.
        found = found or _below(store, path)
    if not found:
        raise InputError(f"input.path: no Parquet file at {path}")
    return sorted(found, key=lambda entry: entry.url)


def _file_entry(store: Store, path: str) -> list[Entry]:
    try:
        return [store.info(path)]
    except FileNotFoundError:
        return []


def _below(store: Store, path: str) -> list[Entry]:
    """The Parquet files in a folder; as Parquet readers do, what begins with _ or . below it is not data."""
    folder = store.spelled(path)
    found = []
    for url, entry in store.find(path).items():
        names = url.removeprefix(f"{folder}/").split("/")
        if url.endswith(".parquet") and not any(name.startswith(("_", ".")) for name in names):
            found.append(entry)
    return found


def _file(store: Store, entry: Entry, tail: bytes) -> File:
    try:
        metadata = _footer(store, entry, tail)
        schema = metadata.schema.to_arrow_schema()
    except (ValueError, OSError) as e:
        raise InputError(f"{entry.url}: not a readable Parquet file ({e})") from e
    return File(entry.url, entry.version, metadata.num_rows, schema.remove_metadata())


def _footer(store: Store, entry: Entry, tail: bytes) -> pq.FileMetaData:
    if tail[-4:] != b"PAR1":
        raise ValueError(f"it ends in {tail[-4:]!r}, not in PAR1")
    if int.from_bytes(tail[-8:-4], "little") + 8 <= len(tail):
        # A footer is read from the end: any file with the same tail has the same footer.
        return pq.read_metadata(io.BytesIO(b"PAR1" + tail))
    with store.open(entry.url) as f:
        return pq.read_metadata(f)
