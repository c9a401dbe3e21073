"""The second step of a row's way: what can be judged about a conversation without a tokenizer.

Accepted is a chat that every template understands: an optional system message, then user and assistant in turn, the
last word the user's and not blank. All else is an error that names the message, never a repair: who wrote `human` for
`user` or two questions in a row has a table to mend, and a guess would be in the training data before anyone saw it.
Control characters, bidi marks and other oddities of real text pass: the model sees what the user wrote.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

from batchgen import pii
from batchgen.record import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from batchgen.record import Message, Row
    from batchgen.spec import ScreenSpec

_ROLES = ("system", "user", "assistant")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Separators, control and format characters; private and unassigned ones count as visible: some font may show them.
_INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf"}
# Shown as nothing though Unicode does not call them spaces or format characters: fillers, variation selectors, and the
# braille pattern without dots.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)


class Screen:
    """What a job does with rows before a tokenizer sees them.

    `finder` finds personal data; `skip` refuses rows that hold any, else it is masked, and `redacted` counts that.
    """

    def __init__(self, finder: pii.Finder | None = None, *, skip: bool = False) -> None:
        self._finder, self._skip = finder, skip
        self.redacted: Counter[str] = Counter()

    @staticmethod
    def of(spec: ScreenSpec) -> Screen:
        """The screen that a job file asks for.

        Raises:
            SpecError: as `pii.finder`.
        """
        if spec.pii == "off":
            return Screen()
        return Screen(pii.finder(spec.pii), skip=spec.pii.action == "skip")

    def fresh(self) -> Screen:
        """The same screen, with counts of its own."""
        return Screen(self._finder, skip=self._skip)

    def rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, with a verdict for each conversation that cannot be rendered or is not wanted.

        Raises:
            ScreenError: as `pii.Finder.find`.
        """
        return judged(self._cleaned(self._finder, rows) if self._finder else rows)

    def _cleaned(self, finder: pii.Finder, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows without personal data, also those that are refused for something else."""
        stream = iter(rows)
        while some := list(itertools.islice(stream, finder.at_once)):
            texts = [[one["content"] for one in row.messages or ()] + list(row.ahead) for row in some]
            found = iter(finder.find([text for own in texts for text in own]))
            for row, own in zip(some, texts, strict=True):
                yield self._clean(row, [pii.masked(text, next(found)) for text in own])

    def _clean(self, row: Row, masked: list[tuple[str, Counter[str]]]) -> Row:
        """The row with these texts in place of its own."""
        found = sum((kinds for _, kinds in masked), Counter[str]())
        if not found or row.messages is None:
            return row
        if not self._skip:
            contents = [content for content, _ in masked]
            said, row.ahead = contents[: len(row.messages)], tuple(contents[len(row.messages) :])
            row.messages = [one | {"content": content} for one, content in zip(row.messages, said, strict=True)]
            self.redacted += found
            return row
        kinds_found = ", ".join(f"{kind} {count}" for kind, count in sorted(found.items()))
        row.messages, row.ahead = None, ()
        row.verdict = row.verdict or Verdict("skipped", "pii", f"the conversation holds {kinds_found}")
        return row


def judged(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, with a verdict for each conversation that cannot be rendered."""
    for row in rows:
        if row.verdict is None:
            assert row.messages is not None, "a row without messages was given a verdict by read"
            row.verdict = judge(row.messages, row.ahead)
            if row.verdict is not None and row.verdict.error_type == "bad_text":
                # No table can hold this text, so the output could not be written.
                row.messages, row.ahead = None, ()
        yield row


def judge(messages: list[Message], ahead: Sequence[str] = ()) -> Verdict | None:
    """What is wrong with a conversation, whose later user turns are `ahead`, or None."""
    if not messages:
        return Verdict("error", "empty_messages", "the conversation has no messages")
    if any(_SURROGATE.search(text) for text in ahead):
        return Verdict("error", "bad_text", "a later turn holds a lone surrogate, which is not Unicode text")
    for i, message in enumerate(messages):
        if _SURROGATE.search(message["role"]) or _SURROGATE.search(message["content"]):
            return Verdict("error", "bad_text", f"messages[{i}] holds a lone surrogate, which is not Unicode text")
        if message["role"] not in _ROLES:
            found = ascii(message["role"])[:100]
            return Verdict("error", "bad_role", f"messages[{i}].role is {found}, expected one of {', '.join(_ROLES)}")
    problem = _misplaced([message["role"] for message in messages])
    problem = problem or _blank(messages[-1]["content"], f"messages[{len(messages) - 1}], the last,")
    for i, text in enumerate(ahead, 1):
        problem = problem or _blank(text, f"user turn {i}, the first being 0,")
    return problem


def _misplaced(roles: list[str]) -> Verdict | None:
    first = 1 if roles[0] == "system" else 0
    for i, role in enumerate(roles[first:], first):
        expected = "assistant" if (i - first) % 2 else "user"
        if role != expected:
            return Verdict("error", "bad_role_order", f"messages[{i}] is the {role}'s, expected the {expected}'s")
    if roles[-1] != "user":
        last = len(roles) - 1
        return Verdict(
            "error", "bad_role_order", f"messages[{last}], the last, is the {roles[-1]}'s, expected the user's"
        )
    return None


def _blank(text: str, which: str) -> Verdict | None:
    if any(unicodedata.category(sign) not in _INVISIBLE and not _BLANK.match(sign) for sign in text):
        return None
    what = f"holds only characters that show nothing ({len(text)} of them)" if text else "is empty"
    return Verdict("error", "empty_prompt", f"{which} {what}")
