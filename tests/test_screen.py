"""What every chat template understands passes; what is wrong with anything else is said, and nothing is mended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen import screen
from batchgen.record import Message, Row, Sampling, Verdict


def conversation(*turns: str) -> list[Message]:
    """Messages from `role: content` texts."""
    pairs = [turn.partition(":") for turn in turns]
    return [Message(role=role, content=content) for role, _, content in pairs]


@pytest.mark.parametrize(
    "messages",
    [
        conversation("user:hi"),
        conversation("system:be terse", "user:hi"),
        conversation("system:", "user:hi"),
        conversation("user:hi", "assistant:yes?", "user:bye"),
        conversation("user:hi", "assistant:", "user:bye"),
        conversation("user:", "assistant:you said nothing", "user:sorry"),
        conversation("user:\x00\x1b[31mred\x07"),
        conversation("user:\u202eabc\u202c"),
        conversation("user:👍"),
        conversation("user:.\ufe0f"),
        conversation("user:\ue000"),
        conversation("user:\uffff"),
        conversation("user:" + " " * 5000 + "?"),
    ],
)
def test_what_people_write_passes(messages: list[Message]) -> None:
    assert screen.judge(messages) is None


@pytest.mark.parametrize(
    ("messages", "error_type", "error"),
    [
        ([], "empty_messages", "the conversation has no messages"),
        (conversation("tool:4"), "bad_role", "messages[0].role is 'tool', expected one of system, user, assistant"),
        (conversation("developer:x", "user:hi"), "bad_role", "messages[0].role is 'developer'"),
        (conversation("user:hi", "USER:hi"), "bad_role", "messages[1].role is 'USER'"),
        (conversation(" user:hi"), "bad_role", "messages[0].role is ' user'"),
        (conversation("us\u200ber:hi"), "bad_role", "messages[0].role is 'us\\u200ber'"),
        (conversation("👍" * 1000 + ":hi"), "bad_role", "messages[0].role is '" + r"\U0001f44d" * 9),
        (conversation("user:a", "user:b"), "bad_role_order", "messages[1] is the user's, expected the assistant's"),
        (
            conversation("assistant:a", "user:b"),
            "bad_role_order",
            "messages[0] is the assistant's, expected the user's",
        ),
        (conversation("system:a", "system:b", "user:c"), "bad_role_order", "messages[1] is the system's"),
        (conversation("user:a", "system:b", "user:c"), "bad_role_order", "messages[1] is the system's"),
        (conversation("user:a", "assistant:b"), "bad_role_order", "messages[1], the last, is the assistant's"),
        (conversation("system:a"), "bad_role_order", "messages[0], the last, is the system's, expected the user's"),
        (conversation("user:"), "empty_prompt", "messages[0], the last, is empty"),
        (
            conversation("user:a", "assistant:b", "user: \n\t\u3000"),
            "empty_prompt",
            "messages[2], the last, holds only",
        ),
        (conversation("user:\u200b\u200c\u2060\ufeff\u00ad"), "empty_prompt", "(5 of them)"),
        (conversation("user:\u2800\u3164\uffa0\u115f\ufe0f"), "empty_prompt", "(5 of them)"),
        (conversation("user:" + "\x00" * 64), "empty_prompt", "(64 of them)"),
        (conversation("user:\U000e0041\U000e007f\U000e0100"), "empty_prompt", "(3 of them)"),
        (conversation("user:half \ud83d"), "bad_text", "messages[0] holds a lone surrogate"),
        (conversation("user:a", "assis\udc00tant:b", "user:c"), "bad_text", "messages[1] holds a lone surrogate"),
    ],
)
def test_what_cannot_be_rendered_is_an_error_that_names_the_message(
    messages: list[Message], error_type: str, error: str
) -> None:
    verdict = screen.judge(messages)
    assert verdict is not None
    assert (verdict.status, verdict.error_type) == ("error", error_type)
    assert error in verdict.error


def test_rows_come_out_in_order_whatever_they_hold() -> None:
    judged = Row("a", 0, Sampling(), verdict=Verdict("error", "null_messages", "why"))
    good = Row("b", 1, Sampling(), messages=conversation("user:hi"))
    bad = Row("c", 2, Sampling(), messages=conversation("user:"))
    broken = Row("d", 3, Sampling(), messages=conversation("user:\ud800"))
    rows = list(screen.Screen().rows([judged, good, bad, broken]))
    assert [row.row_id for row in rows] == ["a", "b", "c", "d"]
    assert [row.verdict and row.verdict.error_type for row in rows] == [
        "null_messages",
        None,
        "empty_prompt",
        "bad_text",
    ]
    assert bad.messages == conversation("user:")
    assert broken.messages is None, "no table could hold it"


MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant"]) | st.text(st.characters(), max_size=200),
        "content": st.text(st.characters(), max_size=500),
    }
)


@given(messages=st.lists(MESSAGE, max_size=5))
def test_any_conversation_is_judged_in_one_short_line_of_plain_text(messages: list[Message]) -> None:
    verdict = screen.judge(messages)
    if verdict is not None:
        assert len(verdict.error) <= 300
        assert verdict.error.isascii()
        assert "\n" not in verdict.error
