"""The nouns: what a row is at each point of its way, and THE output schema.

One file, so that a reader meets every word once. Nothing here reads or writes; the order of the classes is the order in
which a row meets them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from batchgen.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    import pyarrow as pa

Status = Literal["ok", "error", "skipped"]
FinishReason = Literal["stop", "length", "error"]


class Message(TypedDict):
    """One chat message in OpenAI form."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How one row's completion is drawn; defaults are greedy decoding.

    `top_k` None and `top_p` 1.0 leave the distribution alone. `seed` is the job's; a row's own noise is keyed by it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    max_tokens: int = 512
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """A range of rows of one version of one file under one generation fingerprint.

    `index` is an ordinal for people; identity is the hash of the other fields alone.
    """

    index: int
    file: str
    version: str
    start: int
    stop: int
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Input rows in the shard."""
        return self.stop - self.start

    @property
    def key(self) -> str:
        """16 hex digits that name the shard's part and journal."""
        text = "\0".join((self.file, self.version, str(self.start), str(self.stop), self.fingerprint))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def part_name(self) -> str:
        """File name of the shard's part inside the output folder."""
        return f"part-{self.index:05d}-{self.key}.parquet"


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a shard that another worker than its owner generates: those with `start` <= index < `stop` in their file.

    `claim` names the owner's attempt at the shard (`journal.Journal.join`), `nonce` this piece.
    """

    shard: Shard
    start: int
    stop: int
    claim: str
    nonce: str

    @property
    def num_rows(self) -> int:
        """Input rows in the piece."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Why a row is not generated: an `error` is the row's fault, `skipped` is what the job asked for."""

    status: Literal["error", "skipped"]
    error_type: str
    error: str


@dataclasses.dataclass(slots=True)
class Row:
    """One input row on its way; a row with a `verdict` passes every later step untouched.

    `index` is the 0-based row number in its file. `read` fills the first block, `render` the second. Of a conversation
    that is given as user turns, `ahead` are those that follow when `messages` is answered, `answers` what was answered.
    """

    row_id: str
    index: int
    sampling: Sampling
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)
    messages: list[Message] | None = None
    ahead: tuple[str, ...] = ()
    verdict: Verdict | None = None

    prompt_token_ids: list[int] | None = None
    answers: tuple[Answer, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One sample to generate, as engines see it.

    `key` is the caller's own and unique among an engine's unfinished requests; the sampling noise is keyed by `noise`
    and the output position, and by nothing else. `turn` counts the answers before this one in its conversation.
    """

    key: Hashable
    row_id: str
    sample: int
    prompt_token_ids: list[int]
    sampling: Sampling
    turn: int = 0

    @property
    def noise(self) -> str:
        """Seed, row, sample and turn."""
        turn = (self.turn,) if self.turn else ()
        return "\0".join(map(str, (self.sampling.seed, self.row_id, self.sample, *turn)))


STRETCH_TOKENS = 32


# Error types of rows that were skipped because another row asks the same.
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"


class Stretch(NamedTuple):
    """What speculation did from one output position to another: 0 to 31, 32 to 63, 64 to 127, 128 to 255, ..."""

    target_steps: int = 0
    draft_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_lookup_tokens: int = 0

    def __add__(self, other: Stretch) -> Stretch:  # type: ignore[override]
        return Stretch(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclasses.dataclass(slots=True)
class Acceptance:
    """What speculation did for one sample: what is drafted is the head's, what only a lookup gave is counted apart.

    `target_steps` counts target forward passes after prefill in which the sample took part; `drafted_per_depth[d]`
    those that verified a draft token at depth d + 1 (the root is depth 0), `accepted_per_depth[d]` those that kept one.
    """

    target_steps: int = 0
    draft_tokens: int = 0
    drafted_per_depth: list[int] = dataclasses.field(default_factory=list)
    accepted_per_depth: list[int] = dataclasses.field(default_factory=list)
    by_position: list[Stretch] = dataclasses.field(default_factory=list)
    lookup_tokens: int = 0
    accepted_lookup_tokens: int = 0

    @property
    def draft_steps(self) -> int:
        """Target passes that had drafted tokens."""
        return self.drafted_per_depth[0] if self.drafted_per_depth else 0

    @property
    def accepted_tokens(self) -> int:
        """Draft tokens that are part of the completion."""
        return sum(self.accepted_per_depth)

    def drafted(self, tokens: int, deepest: int, accepted: int) -> None:
        """Count what a target pass verified of the head's: of `deepest` levels the first `accepted` were kept."""
        self.draft_tokens += tokens
        for per_depth, levels in ((self.drafted_per_depth, deepest), (self.accepted_per_depth, accepted)):
            per_depth.extend([0] * (deepest - len(per_depth)))
            for level in range(levels):
                per_depth[level] += 1

    def looked_up(self, tokens: int, accepted: int) -> None:
        """Count what a target pass verified that only a lookup gave, and what it kept of it."""
        self.lookup_tokens += tokens
        self.accepted_lookup_tokens += accepted

    def note(self, position: int, drafted: int, accepted: int, looked_up: int = 0) -> None:
        """Count a target pass whose first token is output token `position` (0 for the first) in `by_position`.

        It kept `accepted` of `drafted` tokens, and `looked_up` that only a lookup gave.
        """
        place = (position // STRETCH_TOKENS).bit_length()
        while len(self.by_position) <= place:
            self.by_position.append(Stretch())
        self.by_position[place] += Stretch(1, int(drafted > 0), drafted, accepted, looked_up)


@dataclasses.dataclass(slots=True)
class Completion:
    """One finished sample; times are wall-clock seconds from submit to admission, first token and end.

    `token_ids` ends with the end-of-sequence or stop token where there is one; `text` has neither it nor a stop string.
    A sample that the engine could not generate has `finish_reason` "error" and both error fields set. `attempts` counts
    how often it was begun: more than once where an engine died.
    """

    key: Hashable
    sample: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    acceptance: Acceptance
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    attempts: int = 1
    error_type: str | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A turn of a conversation that was answered: tokens `start` <= i < `stop` of the row's are the target's own."""

    start: int
    stop: int
    completion: Completion


_KEY = (("row_id", "string"), ("sample", "int32"))
_TEXT = (("messages", "messages"), ("completion", "string"), ("finish_reason", "string"))
_TOKEN_IDS = (("prompt_token_ids", "list<int32>"), ("completion_token_ids", "list<int32>"))
_ANSWERS = (("answers", "answers"),)
_FACTS = (
    ("status", "string"),
    ("error_type", "string"),
    ("error", "string"),
    ("attempts", "int32"),
    ("prompt_tokens", "int32"),
    ("completion_tokens", "int32"),
    ("target_steps", "int32"),
    ("draft_steps", "int32"),
    ("draft_tokens", "int32"),
    ("accepted_tokens", "int32"),
    ("acceptance_rate", "float32"),
    ("acceptance_length", "float32"),
    ("drafted_per_depth", "list<int32>"),
    ("accepted_per_depth", "list<int32>"),
    ("lookup_tokens", "int32"),
    ("accepted_lookup_tokens", "int32"),
    ("by_position", "stretches"),
    ("queue_s", "float32"),
    ("prefill_s", "float32"),
    ("decode_s", "float32"),
    ("engine", "string"),
    ("worker", "string"),
    ("shard", "string"),
)
_OF_ANSWERS = (*Stretch._fields[:4], "lookup_tokens", "accepted_lookup_tokens")
RESERVED_COLUMNS = frozenset(name for name, _ in _KEY + _TEXT + _TOKEN_IDS + _FACTS)


def output_schema(kept: list[pa.Field], *, token_ids: bool = True, answers: bool = False) -> pa.Schema:
    """The schema of every part and journal segment, kept input columns after the key.

    With `answers` a row is a conversation: `prompt_token_ids`, `completion` and `completion_token_ids` are of its last
    turn, `prompt_token_ids` holding all before, and `answers` says where each answer is in both together. Counts and
    times are sums over all: `completion_tokens` are what the target wrote, `prompt_tokens` all others.

    Raises:
        SpecError: a kept column has the name of an output column.
    """
    # Engines import this module on machines that have torch and nothing else.
    import pyarrow as pa

    columns = _TEXT + (_TOKEN_IDS if token_ids else ()) + (_ANSWERS if answers else ()) + _FACTS
    reserved = RESERVED_COLUMNS.union(name for name, _ in columns)
    taken = sorted(field.name for field in kept if field.name in reserved)
    if taken:
        raise SpecError(f"input.keep: {', '.join(taken)} would overwrite output columns; rename them in the input")
    types = {
        "string": pa.string(),
        "int32": pa.int32(),
        "float32": pa.float32(),
        "list<int32>": pa.list_(pa.int32()),
        "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    }
    counts = ("start", "stop", *_OF_ANSWERS)
    answer = [("finish_reason", pa.string()), *((name, pa.int32()) for name in counts)]
    types["stretches"] = pa.list_(pa.struct([(name, pa.int32()) for name in Stretch._fields]))
    types["answers"] = pa.list_(pa.struct(answer))
    fields = [pa.field(name, types[of]) for name, of in _KEY]
    fields += [field.with_nullable(True) for field in kept]
    fields += [pa.field(name, types[of]) for name, of in columns]
    return pa.schema(fields)


def finished(
    row: Row, completion: Completion, why: FinishReason, *, engine: str, worker: str, shard: str
) -> dict[str, Any]:
    """The output row of one sample whose last turn is generated, keys as in `output_schema`; `why` it ends there."""
    start, failed = len(row.prompt_token_ids or ()), completion.finish_reason == "error"
    answers = [*row.answers, Answer(start, start + len(completion.token_ids), completion)]
    done = [answer.completion for answer in answers]
    acceptance = _sum([each.acceptance for each in done])
    drafted, num_tokens = acceptance.draft_tokens, sum(answer.stop - answer.start for answer in answers)
    passes = sum(max(0, answer.stop - answer.start - 1) for answer in answers)
    return row.kept | {
        "row_id": row.row_id,
        "sample": completion.sample,
        "messages": row.messages,
        "completion": None if failed else completion.text,
        "finish_reason": why,
        "prompt_token_ids": row.prompt_token_ids,
        "completion_token_ids": completion.token_ids,
        "answers": [_facts(answer) for answer in answers],
        "status": "error" if failed else "ok",
        "error_type": completion.error_type,
        "error": completion.error,
        "attempts": max(each.attempts for each in done),
        "prompt_tokens": answers[-1].stop - num_tokens,
        "completion_tokens": num_tokens,
        "target_steps": acceptance.target_steps,
        "draft_steps": acceptance.draft_steps,
        "draft_tokens": drafted,
        "accepted_tokens": acceptance.accepted_tokens,
        "acceptance_rate": acceptance.accepted_tokens / drafted if drafted else None,
        "acceptance_length": passes / acceptance.target_steps if acceptance.target_steps else None,
        "drafted_per_depth": acceptance.drafted_per_depth,
        "accepted_per_depth": acceptance.accepted_per_depth,
        "lookup_tokens": acceptance.lookup_tokens,
        "accepted_lookup_tokens": acceptance.accepted_lookup_tokens,
        "by_position": [stretch._asdict() for stretch in acceptance.by_position] or None,
        "queue_s": sum(each.queue_s for each in done),
        "prefill_s": sum(each.prefill_s for each in done),
        "decode_s": sum(each.decode_s for each in done),
        "engine": engine,
        "worker": worker,
        "shard": shard,
    }


def _sum(of: list[Acceptance]) -> Acceptance:
    drafted = itertools.zip_longest(*(each.drafted_per_depth for each in of), fillvalue=0)
    accepted = itertools.zip_longest(*(each.accepted_per_depth for each in of), fillvalue=0)
    stretches = itertools.zip_longest(*(each.by_position for each in of), fillvalue=Stretch())
    return Acceptance(
        sum(each.target_steps for each in of),
        sum(each.draft_tokens for each in of),
        [sum(counts) for counts in drafted],
        [sum(counts) for counts in accepted],
        [sum(some, Stretch()) for some in stretches],
        sum(each.lookup_tokens for each in of),
        sum(each.accepted_lookup_tokens for each in of),
    )


def _facts(answer: Answer) -> dict[str, Any]:
    acceptance = answer.completion.acceptance
    return {
        "start": answer.start,
        "stop": answer.stop,
        "finish_reason": answer.completion.finish_reason,
        **{name: getattr(acceptance, name) for name in _OF_ANSWERS},
    }


def ids_and_mask(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """All tokens of an output row, and for each 1 if the target wrote it and 0 if not."""
    prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
    mask = [0] * len(prompt) + [1] * len(completion)
    for answer in row.get("answers") or ():
        mask[answer["start"] : answer["stop"]] = [1] * (answer["stop"] - answer["start"])
    return [*prompt, *completion], mask


def refused(row: Row, verdict: Verdict, sample: int, *, engine: str, worker: str, shard: str) -> dict[str, Any]:
    """The output row of one sample that was never generated, keys as in `output_schema`."""
    return row.kept | {
        "row_id": row.row_id,
        "sample": sample,
        "messages": row.messages,
        "prompt_token_ids": row.prompt_token_ids,
        "finish_reason": "error" if verdict.status == "error" else None,
        "status": verdict.status,
        "error_type": verdict.error_type,
        "error": verdict.error,
        "attempts": 0,
        "prompt_tokens": len(row.prompt_token_ids) if row.prompt_token_ids is not None else None,
        "completion_tokens": 0,
        "engine": engine,
        "worker": worker,
        "shard": shard,
    }
