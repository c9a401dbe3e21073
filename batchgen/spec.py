"""The job spec: the words of a job file, what each may be, and every mistake in it at once.

`load` reads YAML, applies `--set key=value`, renders templates, and checks types, unknown keys and combinations. All
that is wrong comes as one `SpecError`, one line a problem: place, key, what was found, what is allowed; the latter is
read from the JSON schema, so messages and editors agree. A key that cannot be honoured is refused, never ignored.
Relative local paths in a job file are relative to the current directory, not to the file.
"""

from __future__ import annotations

import functools
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    model_validator,
)

from batchgen import rules
from batchgen.errors import SpecError
from batchgen.locate import Document, Key, places

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# "a word or a mapping" as a tagged union: one line in messages instead of one for each member.
_WORD, _MAPPING = Tag("<word>"), Tag("<mapping>")
_WORD_OR_MAPPING = Discriminator(lambda value: "<mapping>" if isinstance(value, dict | BaseModel) else "<word>")

Text = Annotated[str, Field(min_length=1)]
SamplingColumn = Literal["temperature", "top_p", "top_k", "max_tokens", "seed", "stop"]
PiiEntity = Literal["EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "PERSON", "LOCATION"]
StorageOptions = Annotated[
    dict[str, Any],
    Field(
        description="Options of the fsspec file system, e.g. endpoint_url; their values are never shown or recorded.",
        json_schema_extra={"writeOnly": True},
        repr=False,
    ),
    PlainSerializer(lambda options: dict.fromkeys(options, "***"), when_used="json"),  # for job.json
]


class InputSpec(_Part):
    """The table of prompts."""

    path: Text = Field(description="Parquet file, folder or pattern; a local path or any fsspec URL.")
    messages: Text | None = Field(default=None, description="Column of chats in OpenAI form, the last turn a user's.")
    prompt: Text | None = Field(
        default=None, description="Instead of messages: column of texts, a user's message each."
    )
    turns: Text | None = Field(
        default=None,
        description="Instead of messages: column of conversations to be answered turn by turn, lists of a user's texts "
        "or chats in OpenAI form, whose answers are left out.",
    )
    system: Text | None = Field(
        default=None, description="Column of system messages, null for none; with prompt, or turns of texts."
    )
    id: Text | None = Field(default=None, description="Column with the row's id; null: its file and number.")
    keep: tuple[Text, ...] = Field(default=(), strict=False, description="Columns copied to the output.")
    sampling: dict[SamplingColumn, Text] = Field(
        default={}, description="Setting: column that overrides it row by row."
    )
    storage_options: StorageOptions = {}


_WITH_A_FORM: tuple[PiiEntity, ...] = ("EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS")


class PiiSpec(_Part):
    """What to do with prompts that hold personal data."""

    action: Literal["skip", "redact"] = Field(description="skip: do not generate the row; redact: mask what was found.")
    by: Literal["presidio", "dlp"] = Field(
        default="presidio", description="presidio: patterns, on this machine; dlp: Google Cloud's service."
    )
    model: Text | None = Field(
        default=None, description="presidio: spaCy model that finds PERSON and LOCATION, a package or folder."
    )
    project: Text | None = Field(default=None, description="dlp: Google Cloud project that is billed.")
    entities: tuple[PiiEntity, ...] = Field(
        default_factory=lambda pii: _WITH_A_FORM + (rules.NAMES if pii["model"] or pii["by"] == "dlp" else ()),
        strict=False,
        min_length=1,
        description="Kinds of personal data to look for; default: all, PERSON and LOCATION with a model or dlp only.",
    )


class ScreenSpec(_Part):
    """Which rows are not generated, and why."""

    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Longer prompts are not generated; null: as long as the model takes."
    )
    dedupe: Literal["off", "exact", "near"] = Field(
        default="off", description="Of equal prompts, over all files, the first is generated; near: of similar ones."
    )
    pii: Annotated[Annotated[Literal["off"], _WORD] | Annotated[PiiSpec, _MAPPING], _WORD_OR_MAPPING] = Field(
        default="off", description="Screening of personal data."
    )
    special_tokens: Literal["text", "reject", "allow"] = Field(
        default="text",
        description="Special tokens in prompts. text: are plain text; reject: make the row an error; allow: act.",
    )


class ModelSpec(_Part):
    """The target model and its draft head."""

    target: Text = Field(
        description="Hugging Face model id or local folder; demo:smollm2-135m is small and always there."
    )
    draft: Text | None = Field(default=None, description="EAGLE-3 head, as a model id or folder; null: none.")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        default="auto", description="Number format of the weights; auto: bfloat16 where the hardware computes it."
    )
    aux_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        strict=False,
        description="Layers after which the head listens to the target; null: as its checkpoint says.",
    )


class EngineSpec(_Part):
    """What generates."""

    kind: Literal["torch", "vllm", "rehearsal"] = Field(
        default="torch", description="torch: our own; vllm: vLLM; rehearsal: made-up text, to try a job out."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda if there is one.")
    options: dict[str, Any] = Field(default={}, description="vllm: its EngineArgs; rehearsal: its script.")


class Tree(_Part):
    """Shape of the draft tree; width 1 is a chain."""

    depth: int = Field(ge=1, le=16, description="Draft steps: the most tokens a row can gain from one tree.")
    width: int = Field(default=1, ge=1, le=16, description="Children looked at per node, and nodes expanded per depth.")
    nodes: int = Field(
        default_factory=lambda tree: min(63, tree["depth"] * tree["width"]),
        ge=1,
        le=63,
        description="Drafted tokens verified at a step; default: depth x width, at most 63.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        most = self.width + (self.depth - 1) * self.width**2
        if not self.depth <= self.nodes <= most:
            size = f"depth {self.depth} and width {self.width}"
            holds = f"{most} nodes" if most == self.depth else f"{self.depth} to {min(most, 63)} nodes"
            raise ValueError(f"a tree of {size} holds {holds}, not {self.nodes}")
        if (self.depth - 1) * self.width > 63:
            size = f"depth {self.depth} and width {self.width}"
            raise ValueError(f"a tree of {size} drafts too much: (depth - 1) x width is at most 63")
        return self


class SpeculationSpec(_Part):
    """How the draft head is used; it never changes a row's tokens, only how soon they come."""

    tree: Annotated[Annotated[Literal["auto", "off"], _WORD] | Annotated[Tree, _MAPPING], _WORD_OR_MAPPING] = Field(
        default="auto", description="auto: what pays, step by step; off: no drafting; or a fixed shape."
    )
    lookup: bool = Field(
        default=True, description="With auto, on the torch engine: verify what a row repeats of its own text, too."
    )
    min_acceptance: float | None = Field(
        default=None, ge=0, le=1, description="Least share of drafted tokens to be accepted."
    )
    below_min: Literal["warn", "disable", "fail"] = Field(
        default="warn", description="What to do below min_acceptance: go on, stop drafting or stop the job."
    )
    max_drift: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="By how much acceptance in a run's new parts may surely be below that in the parts before; exit 1.",
    )


class SamplingSpec(_Part):
    """How completions are drawn; input.sampling overrides it row by row."""

    temperature: float = Field(default=0.0, ge=0, description="0: always the likeliest token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Keep the likeliest tokens up to this probability.")
    top_k: int | None = Field(default=None, ge=1, description="Keep this many of the likeliest tokens; null: all.")
    max_tokens: int = Field(default=512, ge=1, description="Longest completion, in tokens.")
    n: int = Field(default=1, ge=1, description="Completions per row.")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Seed of the job; equal seeds give equal tokens.")
    stop: tuple[Text, ...] = Field(default=(), strict=False, description="Texts that end a completion; not part of it.")
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), strict=False, description="Token ids that end it, besides the model's own."
    )


class WorkersSpec(_Part):
    """How many engines run, and where."""

    count: int = Field(default=1, ge=1, description="Engines at work; 1: in this process, more: Ray actors.")
    gpus: float | None = Field(
        default=None, ge=0, description="GPUs that each Ray worker claims, also parts of one; null: 1 on cuda, else 0."
    )
    cpus: int | None = Field(
        default=None, ge=1, description="Cores that each Ray worker claims; null: with a GPU 1, else an even share."
    )
    address: Text | None = Field(
        default=None, description="Ray cluster to join: auto, or its address; null: a local one, for more than 1."
    )
    start_seconds: float = Field(
        default=rules.START_SECONDS, gt=0, description="A Ray worker that has loaded no engine by then is replaced."
    )
    silent_seconds: float = Field(
        default=rules.SILENT_SECONDS, gt=0, description="A Ray worker that has made no step for so long is replaced."
    )


class CheckpointSpec(_Part):
    """How much work a crash can cost."""

    rows_per_part: int = Field(default=4096, ge=1, description="Input rows per output file.")
    journal_rows: int = Field(default=64, ge=1, description="Save finished rows after this many ...")
    journal_seconds: float = Field(default=20.0, gt=0, description="... or seconds, whichever comes first.")
    lease_seconds: float = Field(
        default=20.0, ge=2, description="A run that shows no sign of life for so long may be taken over."
    )


class OutputSpec(_Part):
    """The table of completions."""

    path: Annotated[Text, AfterValidator(lambda path: path.rstrip("/") or path)] = Field(
        description="Folder for the completions; any fsspec URL or local path."
    )
    token_ids: bool = Field(default=True, description="Write token ids, the lossless source for training.")
    storage_options: StorageOptions = {}


class Spec(_Part):
    """A job: a table of prompts in, a table of completions out."""

    version: int = Field(default=1, ge=1, le=1, description="Version of this format.")
    name: Text = Field(default="batchgen", description="Name of the job in logs and reports.")
    input: InputSpec = Field(description="The table of prompts.")
    screen: ScreenSpec = Field(default=ScreenSpec(), description="Which rows are not generated, and why.")
    model: ModelSpec = Field(description="The target model and its draft head.")
    engine: EngineSpec = Field(default=EngineSpec(), description="What generates.")
    speculation: SpeculationSpec = Field(default=SpeculationSpec(), description="How the draft head is used.")
    sampling: SamplingSpec = Field(default=SamplingSpec(), description="How completions are drawn.")
    batch_size: int = Field(default=64, ge=1, le=1024, description="Rows generated at the same time, per worker.")
    workers: WorkersSpec = Field(default=WorkersSpec(), description="How many engines run, and where.")
    checkpoint: CheckpointSpec = Field(default=CheckpointSpec(), description="How much work a crash can cost.")
    output: OutputSpec = Field(description="The table of completions.")
    max_error_rate: float = Field(
        default=0.0, ge=0, le=1, description="Share of error rows above which the job exits with 1."
    )

    @property
    def on_ray(self) -> bool:
        """Whether workers are Ray actors."""
        return self.workers.count > 1 or self.workers.address is not None


_NOT_OFFERED: dict[Key, str] = {
    ("input", "sampling", "n"): "cannot differ by row, as the number of output rows must be known beforehand",
    ("model", "trust_remote_code"): "not offered; batchgen runs no code that comes with a model",
}


def load(
    path: str,
    overrides: Sequence[str] = (),
    *,
    now: datetime | None = None,
    env: Mapping[str, str] | None = None,
) -> Spec:
    """The job in the file at `path`, with `overrides`: "sampling.n=4", or "name=value" for templates.

    `now` (default: the local time) gives {{ date }} and {{ yesterday }}, `env` (default: the process's) {{ env.NAME }}.

    Raises:
        SpecError: the file cannot be read, or anything in it or in `overrides` is wrong; `problems` has all of it.
    """
    document = Document(path, _places(), _NOT_OFFERED)
    try:
        document.parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: cannot be read: not UTF-8 text") from error
    if not isinstance(document.value, dict):
        raise SpecError(*document.problems)
    today = now or datetime.now().astimezone()
    names = {"date": f"{today:%Y-%m-%d}", "yesterday": f"{today - timedelta(days=1):%Y-%m-%d}"}
    document.render(names, document.override(overrides), os.environ if env is None else env)
    spec = None
    try:
        spec = Spec.model_validate(document.value)
    except ValidationError as error:
        _blame(document, error)
    for key, why in rules.broken(document.values()):
        document.blame(tuple(key.split(".")), why)
    if spec is None or document.problems:
        raise SpecError(*document.problems)
    return spec


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a job file, for editors."""
    schema = Spec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "batchgen job"}


@functools.cache
def _places() -> dict[Key, dict[str, Any]]:
    return dict(places(Spec.model_json_schema()))


def _blame(document: Document, error: ValidationError) -> None:
    """Say pydantic's findings in our words, each once."""
    for problem in error.errors(include_url=False):
        key = tuple(part for part in problem["loc"] if part not in {_WORD.tag, _MAPPING.tag})
        known = any(bad[: len(key)] == key for bad in document.bad)
        if known or problem["type"] == "default_factory_not_called":
            continue
        if problem["type"] == "extra_forbidden" or key[-1] == "[key]":
            document.blame_unknown(tuple(part for part in key if part != "[key]"))
        elif problem["type"] == "value_error":
            document.blame(key, str(problem["ctx"]["error"]))
        else:
            document.blame_value(key, missing=problem["type"] == "missing")
