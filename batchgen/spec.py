"""The job spec: the words of a job file, what each may be, and every mistake in it at once.

`load` reads YAML, applies `--set key=value`, renders templates, and checks types, unknown keys and combinations; all that
is wrong comes as one `SpecError` with one line a problem: place, key, what was found, what is allowed. What the messages
and editors say is allowed is one thing, the JSON schema. A key that this version cannot honour is refused, never ignored.
Relative local paths in a job file are relative to the current directory, not to the file.
"""

from __future__ import annotations

import datetime as dt
import difflib
import fnmatch
import functools
import json
import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_serializer,
    model_validator,
)

from batchgen.errors import SpecError
from batchgen.locate import Document, Key, dotted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _word_or_mapping(value: Any) -> str:
    return "<mapping>" if isinstance(value, dict | BaseModel) else "<word>"


class _Folder(_Part):
    storage_options: dict[str, Any] = Field(
        {}, repr=False, description="Options of the fsspec file system, e.g. endpoint_url; never shown or recorded."
    )

    @field_serializer("storage_options", when_used="json")
    def _hidden(self, value: dict[str, Any]) -> dict[str, str]:
        return dict.fromkeys(value, "***")  # job.json names the options, their values may be secrets


Text = Annotated[str, Field(min_length=1)]
SamplingColumn = Literal["temperature", "top_p", "top_k", "max_tokens", "seed", "stop"]
PiiEntity = Literal["EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS"]


class InputSpec(_Folder):
    """The table of prompts."""

    path: Text = Field(description="Parquet file, folder or pattern; any fsspec URL (gs://, s3://, hf://) or local path.")
    messages: Text | None = Field(None, description="Column with chat messages in OpenAI form; either this or prompt.")
    prompt: Text | None = Field(None, description="Column with the user's message as text; either this or messages.")
    system: Text | None = Field(None, description="System message put before every prompt; only with prompt.")
    id: Text | None = Field(None, description="Column with the row's id; null: <file>#<row>.")
    keep: tuple[Text, ...] = Field((), strict=False, description="Columns copied to the output.")
    sampling: dict[SamplingColumn, Text] = Field(
        {}, description="Sampling setting: column that overrides it row by row, where the column is not null."
    )


class PiiSpec(_Part):
    """What to do with prompts that hold personal data."""

    action: Literal["skip", "redact"] = Field(description="skip: no completion for the row; redact: mask what was found.")
    entities: tuple[PiiEntity, ...] = Field(
        ("EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS"),
        strict=False,
        min_length=1,
        description="Kinds of personal data to look for.",
    )


class ScreenSpec(_Part):
    """Which rows are not generated, and why."""

    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Rows with a longer prompt end as errors; null: only what the model's context allows."
    )
    dedupe: Literal["off", "exact"] = Field("off", description="exact: equal prompts are generated once.")
    pii: Annotated[
        Annotated[Literal["off"], Tag("<word>")] | Annotated[PiiSpec, Tag("<mapping>")],
        Discriminator(_word_or_mapping),
    ] = Field("off", description="Screening of personal data.")
    special_tokens: Literal["text", "reject", "allow"] = Field(
        "text",
        description="Special tokens inside prompts. text: encoded as plain text; reject: the row is an error; allow: kept.",
    )


class ModelSpec(_Part):
    """The target model and its draft head."""

    target: Text = Field(description="Hugging Face model id or local folder; demo:smollm2-135m needs no download.")
    draft: Text | None = Field(None, description="EAGLE-3 head: Hugging Face id or folder; null: no speculation.")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto", description="Number format of the weights; auto: what the model was saved in, where the device has it."
    )


class EngineSpec(_Part):
    """What generates."""

    kind: Literal["torch", "vllm", "rehearsal"] = Field(
        "torch", description="torch: batchgen's own; vllm: vLLM; rehearsal: made-up text without a model, to try a job out."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one, else cpu.")
    options: dict[str, Any] = Field({}, description="Passed to the vllm or rehearsal engine as they are.")


class Tree(_Part):
    """Shape of the draft tree; width 1 is a chain."""

    depth: int = Field(ge=1, le=16, description="Draft steps: the most tokens a row can gain from one tree.")
    width: int = Field(1, ge=1, le=16, description="Children looked at per node, and nodes expanded per depth.")
    nodes: int = Field(
        default_factory=lambda tree: min(63, tree["depth"] * tree["width"]),
        ge=1,
        le=63,
        description="Drafted tokens verified per step, the root not counted; default: depth x width, at most 63.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        most = self.width + (self.depth - 1) * self.width**2
        if not self.depth <= self.nodes <= most:
            size = f"depth {self.depth} and width {self.width}"
            holds = f"{most} nodes" if most == self.depth else f"{self.depth} to {min(most, 63)} nodes"
            raise ValueError(f"a tree of {size} holds {holds}, not {self.nodes}")
        return self


class SpeculationSpec(_Part):
    """How the draft head is used; it never changes a row's tokens, only how soon they come."""

    tree: Annotated[
        Annotated[Literal["auto", "off"], Tag("<word>")] | Annotated[Tree, Tag("<mapping>")],
        Discriminator(_word_or_mapping),
    ] = Field("auto", description="auto: sized at every step by measured cost and acceptance; off; or a fixed shape.")
    min_acceptance: float | None = Field(
        None, ge=0, le=1, description="Share of drafted tokens that must be accepted after warm-up; null: any."
    )
    below_min: Literal["warn", "disable", "fail"] = Field(
        "warn", description="Below min_acceptance. warn: go on; disable: go on without drafting; fail: stop the job."
    )


class SamplingSpec(_Part):
    """How completions are drawn; input.sampling overrides it row by row."""

    temperature: float = Field(0.0, ge=0, description="0: always the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the likeliest tokens that together reach this probability.")
    top_k: int | None = Field(None, ge=1, description="Keep this many of the likeliest tokens; null: all.")
    max_tokens: int = Field(512, ge=1, description="Longest completion, in tokens.")
    n: int = Field(1, ge=1, description="Completions per row.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the job; equal seeds give equal tokens.")
    stop: tuple[Text, ...] = Field((), strict=False, description="Texts that end a completion; not part of it.")
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), strict=False, description="Token ids that end a completion, besides the model's own."
    )


class WorkersSpec(_Part):
    """How many engines run, and where."""

    count: int = Field(1, ge=1, description="Engines at work; 1: in this process.")
    gpus: int | None = Field(None, ge=0, description="GPUs that each Ray worker claims; null: as engine.device says.")
    address: Text | None = Field(None, description="Ray cluster: auto or its address; null: a local one.")


class CheckpointSpec(_Part):
    """How much work a crash can cost."""

    rows_per_part: int = Field(4096, ge=1, description="Input rows per output file.")
    journal_rows: int = Field(64, ge=1, description="Save finished rows after this many ...")
    journal_seconds: float = Field(20.0, gt=0, description="... or after this many seconds, whichever comes first.")


class OutputSpec(_Folder):
    """The table of completions."""

    path: Text = Field(description="Folder for the completions; any fsspec URL or local path.")
    token_ids: bool = Field(True, description="Write prompt and completion token ids, the lossless source for training.")


class Spec(_Part):
    """A job: a table of prompts in, a table of completions out."""

    version: int = Field(1, ge=1, le=1, description="Version of this format.")
    name: Text = Field("batchgen", description="Name of the job in logs and reports.")
    input: InputSpec = Field(description="The table of prompts.")
    screen: ScreenSpec = Field(ScreenSpec(), description="Which rows are not generated, and why.")
    model: ModelSpec = Field(description="The target model and its draft head.")
    engine: EngineSpec = Field(EngineSpec(), description="What generates.")
    speculation: SpeculationSpec = Field(SpeculationSpec(), description="How the draft head is used.")
    sampling: SamplingSpec = Field(SamplingSpec(), description="How completions are drawn.")
    batch_size: int = Field(64, ge=1, le=1024, description="Rows generated at the same time, per worker.")
    workers: WorkersSpec = Field(WorkersSpec(), description="How many engines run, and where.")
    checkpoint: CheckpointSpec = Field(CheckpointSpec(), description="How much work a crash can cost.")
    output: OutputSpec = Field(description="The table of completions.")
    max_error_rate: float = Field(0.0, ge=0, le=1, description="Share of error rows above which the job exits with 1.")
