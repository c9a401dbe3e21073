"""The third step of a row's way: a conversation to the token ids that the target model was trained to see.

User text stays text. A prompt that holds `<|im_end|>` is a prompt about `<|im_end|>`: only the chat template may make
control tokens. So the template is rendered twice, once with marks around what the messages say, which shows for each
character who wrote it; where text of a message would become a control token, the stretches between the template's own
are encoded by a copy of the tokenizer that has no control tokens. What is in doubt is an error, never a guess.

Where a template would add a system message of its own, that message becomes explicit, so that the output's `messages`
are what the model saw. Refused: models without a chat template or without a fast tokenizer. Templates run in
transformers' sandbox.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from batchgen.errors import ModelError
from batchgen.record import Answer, Message, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from batchgen.record import Completion, Row

# A template is a program: besides its own refusals it can fail like any other on a conversation nobody thought of.
_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Renderer:
    """Conversations to prompts of one model.

    `special_tokens` says what becomes of control strings in messages: `text` (they stay text), `reject` (the row is an
    error) or `allow` (they act as control tokens). Prompts above `max_prompt_tokens`, or which leave no room for an
    answer in `max_model_tokens` (None: the positions that the model's config.json states), are skipped.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        special_tokens: Literal["text", "reject", "allow"] = "text",
        max_prompt_tokens: int | None = None,
        max_model_tokens: int | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
            template: str = tokenizer.get_chat_template()
        except (OSError, ValueError) as error:
            why = str(error).strip().partition("\n")[0][:200]
            raise ModelError(f"{model_path}: no tokenizer with a chat template ({why}); give a chat model") from error
        if not tokenizer.is_fast:
            raise ModelError(f"{model_path}: has no tokenizer.json, without which control tokens cannot be told apart")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        base = self._backend.get_vocab(with_added_tokens=False)
        added = self._backend.get_added_tokens_decoder()
        # An added token that the base vocabulary has too and that is not special is ordinary text: Gemma's blank lines.
        self._controls = {id_: token for id_, token in added.items() if token.special or token.content not in base}
        longest_first = sorted((token.content for token in self._controls.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._special_tokens = special_tokens
        if max_model_tokens is None:
            max_model_tokens = _positions(model_path)
        self._limits = [] if max_prompt_tokens is None else [(max_prompt_tokens, "screen.max_prompt_tokens")]
        if max_model_tokens is not None:
            self._limits.append((max_model_tokens - 1, f"the model's {max_model_tokens} positions, one for an answer"))
        file = model_path / "tokenizer.json"
        vocabulary = file.read_bytes() if file.is_file() else self._backend.to_str().encode()
        self._template_hash = hashlib.sha256(template.encode() + b"\0" + vocabulary).hexdigest()
        self._max_token_chars = _max_token_chars(self._backend)
        self._system = self._injected_system()

    @property
    def template_hash(self) -> str:
        """64 hex digits that change when the chat template or the tokenizer does."""
        return self._template_hash

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, special ones left out, spaces as they are."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, each with `prompt_token_ids` and the messages as rendered, or with a verdict."""
        for row in rows:
            if row.verdict is None:
                assert row.messages is not None, "a row without messages was given a verdict by read"
                messages = row.messages
                if self._special_tokens == "reject" and any(map(self._acts, row.ahead)):
                    row.verdict = Verdict("error", "special_tokens", "a later turn holds a control token")
                    yield row
                    continue
                if self._system is not None and messages[0]["role"] != "system":
                    messages = [Message(role="system", content=self._system), *messages]
                rendered = self._prompt(messages)
                if isinstance(rendered, Verdict):
                    row.verdict = rendered
                else:
                    row.messages, row.prompt_token_ids = messages, rendered
            yield row

    def _prompt(self, messages: list[Message]) -> list[int] | Verdict:
        try:
            text = self._render(messages)
        except _FAILURES as error:
            return _template_fails(error)
        # Megabytes are told by their length: encoding them would take longer than many an answer.
        at_least = len(text) // self._max_token_chars if self._max_token_chars else 0
        ids = None if self._too_long(at_least) else self._encode(messages, text)
        if isinstance(ids, Verdict):
            return ids
        if ids is None:
            return self._no_room(f"at least {at_least}")
        return self._no_room(str(len(ids))) if self._too_long(len(ids)) else ids

    def next_turn(self, row: Row, completion: Completion) -> Row | Verdict:
        """The row with this answer and the user's next turn after it.

        What was read and written stays token for token, also where the template would leave thoughts of an earlier
        answer out: encoded is only what follows the answer.
        """
        assert row.messages is not None, "a row that was answered has messages"
        assert row.prompt_token_ids is not None, "and a prompt"
        following = Message(role="user", content=row.ahead[0])
        messages = [*row.messages, Message(role="assistant", content=completion.text), following]
        found = self._after_answer(messages)
        if isinstance(found, Verdict):
            return found
        text, said = found
        kept, start = completion.token_ids, len(row.prompt_token_ids)
        end = self._controls.get(kept[-1]) if kept and completion.finish_reason == "stop" else None
        # SentencePiece templates have a space before the end token, which the model does not write.
        ended = end is not None and text.lstrip(" ").startswith(end.content)
        if ended:
            said = said[len(text) - len(text.lstrip(" ")) :]
            text = text.lstrip(" ")
        elif end is not None:
            kept = kept[:-1]  # another end token than the template's, from which no conversation goes on
        at_least = len(text) // self._max_token_chars if self._max_token_chars else 0
        if self._too_long(start + len(kept) + at_least):
            return self._no_room(f"at least {start + len(kept) + at_least}")
        rest = self._encode_within(following, text, said)
        if isinstance(rest, Verdict):
            return rest
        ids = [*row.prompt_token_ids, *kept, *(rest[1:] if ended else rest)]
        if self._too_long(len(ids)):
            return self._no_room(str(len(ids)))
        answer = Answer(start, start + len(kept), completion)
        return dataclasses.replace(
            row, messages=messages, prompt_token_ids=ids, ahead=row.ahead[1:], answers=(*row.answers, answer)
        )

    def _after_answer(self, messages: list[Message]) -> tuple[str, bytearray] | Verdict:
        """What the template puts after the last answer in `messages`, the user's turn included, and who says it."""
        at = len(messages) - 2
        try:
            text = self._render(messages)
        except _FAILURES as error:
            return _template_fails(error)
        *before, _, following = messages
        mark = _mark(text, messages)
        # Empty, so that the template has nothing to trim or to cut out.
        marks = Message(role="assistant", content=f"{mark}{at}s{mark}{mark}{at}e{mark}")
        try:
            rendered = self._render([*before, marks, self._with_marks(following, at + 1, mark)]) if mark else ""
        except _FAILURES:
            rendered = ""
        rest = rendered.partition(f"{mark}{at}e{mark}")[2] if rendered else ""
        found = _speakers(rest, mark) if rest else None
        if found is None or not text.endswith(found[0]):
            return Verdict("error", "template", "the chat template does not show where an earlier answer ends")
        return found

    def _encode_within(self, message: Message, text: str, said: bytearray) -> list[int] | Verdict:
        """Token ids of a stretch that follows others, of which `message` says what `said` marks."""
        ids = self._encode_said([message], text, said)
        if isinstance(ids, Verdict) or any(text.startswith(token.content) for token in self._controls.values()):
            return ids
        # Without a control token before it, SentencePiece would put the space there that begins a text.
        return self._encode_as_text(text, bytearray(len(text)) if self._special_tokens == "allow" else said, later=True)

    def _too_long(self, num_tokens: int) -> bool:
        return any(num_tokens > limit for limit, _ in self._limits)

    def _no_room(self, num_tokens: str) -> Verdict:
        limit, name = min(self._limits)
        why = f"the prompt has {num_tokens} tokens, allowed are {limit} ({name})"
        return Verdict("skipped", "prompt_too_long", why)

    def _render(self, messages: list[Message]) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _injected_system(self) -> str | None:
        """The system message that the template adds to a conversation without one, if saying it gives the same text."""
        mark, user = "\ue000system\ue000", Message(role="user", content="\ue001user\ue001")
        try:
            head, marked, tail = self._render([Message(role="system", content=mark), user]).partition(mark)
            default = self._render([user])
            found = default.removeprefix(head).removesuffix(tail)
            if not marked or not found or user["content"] in found or head + found + tail != default:
                return None
            return found if self._render([Message(role="system", content=found), user]) == default else None
        except _FAILURES:  # no system messages in this template
            return None

    def _encode(self, messages: list[Message], text: str) -> list[int] | Verdict:
        return self._encode_said(
            messages, text, None if self._special_tokens == "allow" else self._said(messages, text)
        )

    def _encode_said(self, messages: list[Message], text: str, said: bytearray | None) -> list[int] | Verdict:
        """Token ids of `text`, of which `messages` said what `said` marks; None: that is not known."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._special_tokens == "allow":
            return ids
        if said is None:
            # Harmless unless the messages hold control strings.
            if any(self._could_act(message["content"]) for message in messages):
                why = "the chat template treats this text specially, and the text holds (parts of) control tokens"
                return Verdict("error", "special_tokens", f"{why}; screen.special_tokens: allow lets them act")
            return ids
        places = (encoding.token_to_chars(i) for i, id_ in enumerate(ids) if id_ in self._controls)
        acting = next((text[start:stop] for start, stop in places if 1 in said[start:stop]), None)
        if acting is None:
            return ids
        if self._special_tokens == "reject":
            return Verdict("error", "special_tokens", f"the messages hold the control token {ascii(acting)[:100]}")
        return self._encode_as_text(text, said)

    def _said(self, messages: list[Message], text: str) -> bytearray | None:
        """For each character of the rendered `text` 1 if a message says it and 0 if the template does.

        None if that cannot be told: the template renders marked messages to another text, or no mark is left to use.
        """
        mark = _mark(text, messages)
        if mark is None:
            return None
        try:
            rendered = self._render([self._with_marks(message, i, mark) for i, message in enumerate(messages)])
        except _FAILURES:
            return None
        found = _speakers(rendered, mark)
        return found[1] if found is not None and found[0] == text else None

    def _with_marks(self, message: Message, number: int, mark: str) -> Message:
        """The message with marks inside its outer white space, which templates trim, and before control strings."""
        content, start, end = message["content"], f"{mark}{number}s{mark}", f"{mark}{number}e{mark}"
        core = content.strip()
        if not core:
            return message
        head, _, tail = content.partition(core)
        core = self._pattern.sub(lambda found: start + found[0], core)
        return Message(role=message["role"], content=head + start + core + end + tail)

    def _acts(self, content: str) -> bool:
        return any(id_ in self._controls for id_ in self._backend.encode(content, add_special_tokens=False).ids)

    def _could_act(self, content: str) -> bool:
        """Whether the text holds a control string, or could complete one at its ends."""
        if self._acts(content):
            return True
        core, strings = content.strip(), [token.content for token in self._controls.values()]
        heads = tuple(string[:i] for string in strings for i in range(1, len(string)))
        tails = tuple(string[i:] for string in strings for i in range(1, len(string)))
        return core.startswith(tails) or core.endswith(heads)

    def _encode_as_text(self, text: str, said: bytearray, *, later: bool = False) -> list[int] | Verdict:
        """Token ids with the template's control strings as control tokens and everything else as plain text.

        `later` says that other text stands before this one.
        """
        by_content = {token.content: (id_, token) for id_, token in self._controls.items()}
        first, within = self._without_controls
        plain = within if later else first
        ids: list[int] = []
        at = num_controls = 0
        for stretch in re.finditer(b"\0+", said):
            for found in self._pattern.finditer(text, stretch.start(), stretch.end()):
                id_, token = by_content[found[0]]
                before = text[at : found.start()]
                ids += plain.encode(before.rstrip() if token.lstrip else before, add_special_tokens=False).ids
                ids.append(id_)
                num_controls += 1
                at = _skip_space(text, found.end()) if token.rstrip else found.end()
                plain = within
        ids += plain.encode(text[at:], add_special_tokens=False).ids
        if sum(id_ in self._controls for id_ in ids) != num_controls:
            what = "the messages hold text that this tokenizer cannot but encode as a control token"
            return Verdict("error", "special_tokens", f"{what}; screen.special_tokens: allow lets it act")
        return ids

    @functools.cached_property
    def _without_controls(self) -> tuple[Any, Any]:
        """Copies of the tokenizer that have no control tokens: for a text's beginning, and for what follows it."""
        from tokenizers import Tokenizer

        controls = {token.content for token in self._controls.values()}
        parts = json.loads(self._backend.to_str())
        parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in controls]
        parts["post_processor"] = None
        if parts["model"]["type"] == "Unigram":
            # It prefers the longest pieces, so its vocabulary must not spell them (U+FDD0 is no character of any text).
            for piece in parts["model"]["vocab"]:
                piece[0] = f"\ufdd0{piece[0]}" if piece[0] in controls else piece[0]
        first = Tokenizer.from_str(json.dumps(parts))
        # SentencePiece's space before the first word, which a stretch after a control token does not get.
        splitter = json.dumps(parts["pre_tokenizer"])
        without_space = splitter.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        if splitter == without_space:
            return first, first
        return first, Tokenizer.from_str(json.dumps(parts | {"pre_tokenizer": json.loads(without_space)}))


class PlainRenderer(Renderer):
    """Prompts for an engine without a model (rehearsals): roles and contents as lines, tokens are UTF-8 bytes."""

    def __init__(self, *, max_prompt_tokens: int | None = None) -> None:
        self._limits = [] if max_prompt_tokens is None else [(max_prompt_tokens, "screen.max_prompt_tokens")]
        self._max_token_chars, self._system, self._template_hash = None, None, "none"
        # Nothing in a text can act.
        self._special_tokens, self._controls, self._pattern = "allow", {}, re.compile(r"(?!)")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these UTF-8 bytes."""
        return bytes(ids).decode(errors="replace")

    def _render(self, messages: list[Message]) -> str:
        return "".join(f"{message['role']}\n{message['content']}\n\n" for message in messages)

    def _encode_said(self, messages: list[Message], text: str, said: bytearray | None) -> list[int] | Verdict:
        return list(text.encode())

    def _encode_as_text(self, text: str, said: bytearray, *, later: bool = False) -> list[int] | Verdict:
        return list(text.encode())


def _template_fails(error: Exception) -> Verdict:
    why = str(error).strip().partition("\n")[0][:200]
    return Verdict("error", "template", f"the chat template fails on this conversation: {why}")


def _mark(text: str, messages: list[Message]) -> str | None:
    """A character that neither the text nor the messages hold, None when there is none."""
    used = set(text).union(*(message["content"] for message in messages))
    return next((sign for sign in map(chr, range(0xE000, 0xF900)) if sign not in used), None)


def _speakers(rendered: str, mark: str | None) -> tuple[str, bytearray] | None:
    """A rendered text without its marks, and for each character 1 if a message says it; None if that is not clear."""
    said, plain, at, speaker = bytearray(), [], 0, None
    for found in re.finditer(f"{mark}([0-9]+)([se]){mark}|\\Z", rendered):
        plain.append(rendered[at : found.start()])
        said += (b"\0" if speaker is None else b"\1") * len(plain[-1])
        at = found.end()
        # Templates may cut the beginning of a message (the thoughts of an earlier answer), hence an end without a
        # start is fine; a start without its end would leave open where the template goes on.
        if speaker not in (None, found[1]):
            return None
        speaker = found[1] if found[2] == "s" else None
    return "".join(plain), said


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _positions(model_path: Path) -> int | None:
    """Positions of the model, where its config.json states them."""
    file = model_path / "config.json"
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    positions = config.get("text_config", config).get("max_position_embeddings")
    return None if positions is None else int(positions)


def _max_token_chars(backend: Any) -> int | None:
    """The most characters that one token can stand for, where that is certain.

    It is for byte-level BPE: every byte has a token, so none is dropped or merged into an unknown, and none is
    normalised away; a token stands for as many bytes, hence at most as many characters, as its name is long.
    """
    from tokenizers import models, pre_tokenizers

    splitter = b"" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
    if not isinstance(backend.model, models.BPE) or backend.normalizer is not None or b'"ByteLevel"' not in splitter:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not all(sign in vocabulary for sign in pre_tokenizers.ByteLevel.alphabet()):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None
    return max(map(len, vocabulary))
