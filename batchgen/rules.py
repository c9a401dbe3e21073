"""What never makes sense in a job file, however right each of its words is by itself."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import posixpath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from batchgen import urls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# Personal data that has no pattern.
NAMES: tuple[Literal["PERSON", "LOCATION"], ...] = ("PERSON", "LOCATION")

# How long a Ray worker may load its engine, and be silent, unless a job file says otherwise.
START_SECONDS, SILENT_SECONDS = 1800.0, 600.0

# "key to name: why": when.
_IMPOSSIBLE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "input: messages, prompt or turns is missing; name the column that has the prompts": lambda v: not _asked(v),
    "input.prompt: found both messages and prompt, expected one of them": (
        lambda v: {"messages", "prompt"} <= set(_asked(v))
    ),
    "input.turns: found another column of prompts besides, expected one of them": (
        lambda v: "turns" in _asked(v) and len(_asked(v)) > 1
    ),
    "input.turns: an answer that a stop text ends would go on with tokens that messages do not show; leave out stop": (
        lambda v: v["input.turns"] is not None and (bool(v["sampling.stop"]) or "stop" in v["input.sampling"])
    ),
    "input.system: goes with prompt or turns; with messages, the system message is one of them": (
        lambda v: v["input.system"] is not None and v["input.messages"] is not None
    ),
    "input.keep: names a column twice": lambda v: len(set(v["input.keep"])) < len(v["input.keep"]),
    "screen.pii: PERSON and LOCATION have no pattern; name a spaCy model, or use by: dlp": (
        lambda v: bool(set(NAMES) & set(_pii(v, "entities"))) and not (_pii(v, "model") or _pii(v, "by") == "dlp")
    ),
    "screen.pii: model finds PERSON and LOCATION, and entities names neither; leave one of them out": (
        lambda v: bool(_pii(v, "model") and _pii(v, "entities")) and not set(NAMES) & set(_pii(v, "entities"))
    ),
    "screen.pii: model is for presidio, and project for dlp; leave out what is not used": (
        lambda v: bool(_pii(v, "model" if _pii(v, "by") == "dlp" else "project"))
    ),
    "screen.pii: by: dlp needs project, the Google Cloud project that is billed": (
        lambda v: _pii(v, "by") == "dlp" and not _pii(v, "project")
    ),
    "engine.options: the torch engine takes none; they are for vllm and rehearsal": (
        lambda v: v["engine.kind"] == "torch" and v["engine.options"] != {}
    ),
    "engine.device: the rehearsal engine runs no model; leave it out": (
        lambda v: v["engine.kind"] == "rehearsal" and v["engine.device"] != "auto"
    ),
    "speculation.tree: vLLM drafts chains; use width 1, auto or off": (
        lambda v: v["engine.kind"] == "vllm" and _width(v["speculation.tree"]) > 1
    ),
    "speculation.tree: a tree needs a draft head; set model.draft, or use auto or off": (
        lambda v: isinstance(v["speculation.tree"], dict) and not _drafts(v)
    ),
    "speculation.min_acceptance: nothing is drafted without a draft head; set model.draft or leave this out": (
        lambda v: v["speculation.min_acceptance"] is not None and not _drafts(v)
    ),
    "engine.options: speculative_config names ngram or suffix, which draft without a head; leave model.draft out": (
        lambda v: v["model.draft"] is not None and _method(v) in ("ngram", "suffix")
    ),
    "engine.options: speculative_config needs model.draft, unless its method is ngram or suffix": (
        lambda v: v["model.draft"] is None and _method(v) not in (None, "ngram", "suffix")
    ),
    "engine.options: speculative_config drafts, and speculation.tree is off; leave one of them out": (
        lambda v: v["speculation.tree"] == "off" and _method(v) is not None
    ),
    "speculation.tree: speculative_config in engine.options sets how many tokens are drafted, too; leave one out": (
        lambda v: isinstance(v["speculation.tree"], dict) and _sets_length(v)
    ),
    "speculation.below_min: vLLM cannot stop drafting by suffixes; use warn or fail": (
        lambda v: v["speculation.below_min"] == "disable" and _method(v) == "suffix"
    ),
    "speculation.min_acceptance: nothing is drafted with speculation.tree: off; leave one of them out": (
        lambda v: v["speculation.min_acceptance"] is not None and v["speculation.tree"] == "off"
    ),
    "speculation.max_drift: nothing is drafted without a draft head, or with tree: off; leave it out": (
        lambda v: v["speculation.max_drift"] is not None and (not _drafts(v) or v["speculation.tree"] == "off")
    ),
    "speculation.below_min: has no effect without speculation.min_acceptance": (
        lambda v: v["speculation.below_min"] != "warn" and v["speculation.min_acceptance"] is None
    ),
    "sampling.n: at temperature 0 all samples of a row are equal; raise sampling.temperature or use 1": (
        lambda v: v["sampling.n"] > 1 and v["sampling.temperature"] == 0 and "temperature" not in v["input.sampling"]
    ),
    "workers.gpus: is for Ray workers; leave it out, or set workers.count or workers.address": (
        lambda v: v["workers.gpus"] is not None and not _on_ray(v)
    ),
    "workers.start_seconds: is for Ray workers; leave it out, or set workers.count or workers.address": (
        lambda v: v["workers.start_seconds"] != START_SECONDS and not _on_ray(v)
    ),
    "workers.silent_seconds: is for Ray workers; leave it out, or set workers.count or workers.address": (
        lambda v: v["workers.silent_seconds"] != SILENT_SECONDS and not _on_ray(v)
    ),
    "workers.gpus: a worker has whole GPUs or a part of one": (
        lambda v: v["workers.gpus"] is not None and v["workers.gpus"] > 1 and v["workers.gpus"] % 1 > 0
    ),
    "workers.gpus: engine.device is cpu; leave one of them out": (
        lambda v: bool(v["workers.gpus"]) and v["engine.device"] == "cpu"
    ),
    "workers.cpus: is for Ray workers; leave it out, or set workers.count or workers.address": (
        lambda v: v["workers.cpus"] is not None and not _on_ray(v)
    ),
    "workers.gpus: the tensor- and pipeline-parallel sizes in engine.options need as many GPUs for each worker": (
        lambda v: _on_ray(v) and _parallel(v) > 1 and v["workers.gpus"] != _parallel(v)
    ),
    "workers: memory:// is one process's own; use another path, or one worker": (
        lambda v: _on_ray(v) and "memory://" in (v["input.path"][:9], v["output.path"][:9])
    ),
    "input.path: a URL with a signature or password would stand in logs and in the output; use storage_options": (
        lambda v: urls.holds_secret(v["input.path"])
    ),
    "output.path: a URL with a signature or password would stand in logs; use storage_options": (
        lambda v: urls.holds_secret(v["output.path"])
    ),
    "output.path: rows are safe only where a create is atomic: gs://, s3://, az:// or a local path": (
        lambda v: urls.scheme(v["output.path"]) not in urls.WRITABLE
    ),
    "output.path: is one folder; * and ? are not allowed": lambda v: bool(set("*?") & set(v["output.path"])),
    "output.path: input.path would find what is written there; choose a folder that it does not reach": (
        lambda v: _finds(v["input.path"], v["output.path"])
    ),
}


def broken(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The key to name and the reason, of each rule that `values`, by dotted key, break.

    A rule is skipped where a key that it reads is missing, which is one that has a problem of its own.
    """
    for message, breaks in _IMPOSSIBLE.items():
        key, _, why = message.partition(": ")
        with contextlib.suppress(KeyError):
            if breaks(values):
                yield key, why


def _asked(v: Mapping[str, Any]) -> list[str]:
    """Which keys name a column of prompts."""
    return [name for name in ("messages", "prompt", "turns") if v[f"input.{name}"] is not None]


def _pii(v: Mapping[str, Any], name: str) -> Any:
    return v["screen.pii"].get(name, ()) if isinstance(v["screen.pii"], dict) else ()


def _method(v: Mapping[str, Any]) -> str | None:
    """What vLLM is told to draft by in engine.options, None if it is not told to."""
    speculative = v["engine.options"].get("speculative_config") if v["engine.kind"] == "vllm" else None
    return str(speculative.get("method", "eagle3")) if isinstance(speculative, dict) else None


def _sets_length(v: Mapping[str, Any]) -> bool:
    speculative = v["engine.options"].get("speculative_config")
    return _method(v) is not None and any(str(key).startswith("num_speculative_tokens") for key in speculative)


def _on_ray(v: Mapping[str, Any]) -> bool:
    return v["workers.count"] > 1 or v["workers.address"] is not None


def _parallel(v: Mapping[str, Any]) -> int:
    """GPUs that one vLLM engine takes."""
    sizes = [v["engine.options"].get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    return math.prod(size for size in sizes if isinstance(size, int)) if v["engine.kind"] == "vllm" else 1


def _width(tree: Any) -> int:
    return int(tree.get("width", 1)) if isinstance(tree, dict) else 1


def _drafts(v: Mapping[str, Any]) -> bool:
    return v["model.draft"] is not None or _method(v) is not None


def _finds(pattern: str, folder: str) -> bool:
    """Whether `pattern`, a file, folder or glob, finds a part written to `folder`."""

    def parts(path: str) -> list[str]:
        kind, below = urls.scheme(path), path.partition("://")[2] or path
        path = f"{kind}://{below}" if kind else str(Path(below).expanduser().absolute())
        return posixpath.normpath(path).rstrip("/").split("/")

    def match(names: list[str], globs: list[str]) -> bool:
        if globs[:1] == ["**"]:
            return any(match(names[skip:], globs[1:]) for skip in range(len(names) + 1))
        if not names or not globs:
            return not names and not globs
        return fnmatch.fnmatchcase(names[0], globs[0]) and match(names[1:], globs[1:])

    # A folder may be called like a file: Spark writes `data.parquet/part-0.parquet`.
    whole = [] if set("*?[") & set(pattern) else ["**"]
    return match([*parts(folder), "part-00000-0123456789abcdef.parquet"], parts(pattern) + whole)
