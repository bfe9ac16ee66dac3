from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinn.text.message import (
    AssistantMessage,
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    merge,
)
from jinn.text.message_parser import MessageParser
from jinn.text.reasoning import ReasoningFormat, ReasoningParser, find_reasoning_format
from jinn.text.tools import TOOL_FORMATS, ToolParser

THINK = ReasoningFormat("<think>", "</think>", "\n</think>")


def fold(pieces: list[str], *, is_open: bool = False, has_tools: bool = False) -> AssistantMessage:
    ids = map(str, itertools.count())
    tools = ToolParser(TOOL_FORMATS["hermes"], (), make_id=ids.__next__) if has_tools else None
    parser, message = MessageParser(ReasoningParser(THINK, is_open=is_open), tools), AssistantMessage()
    for part in (*(part for piece in pieces for part in parser.push(piece)), *parser.flush()):
        message.add(part)
    return message


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nI see.\n</think>\n\nParis", False, "I see.", "Paris"),
        ("\n<think>I see.</think>Paris", False, "I see.", "Paris"),
        ("I see.\n</think>\n\nParis", True, "I see.", "Paris"),
        ("\n\nI\n\nsee.\n\n</think>\n  Paris\n", True, "I\n\nsee.", "  Paris\n"),
        ("I see.\n", True, "I see.", ""),
        ("I see. </thin", True, "I see. </thin", ""),
        ("<think>\n\n</think>\n\nParis", False, "", "Paris"),
        ("Paris", False, "", "Paris"),
        ("  Paris <think>x</think>", False, "", "  Paris <think>x</think>"),
        (" <thin", False, "", " <thin"),
        ("a</think>b", False, "", "a</think>b"),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("", True, "", ""),
    ],
)
def test_thoughts_and_answer(text: str, is_open: bool, reasoning: str, content: str) -> None:
    expected = AssistantMessage(reasoning, content)
    assert fold([text], is_open=is_open) == expected
    assert fold(list(text), is_open=is_open) == expected


def test_calls_follow_thoughts_and_are_not_found_in_them() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    message = fold([f"Maybe {call}?\n</think>\n\n{call}"], is_open=True, has_tools=True)
    assert message.reasoning == f"Maybe {call}?"
    assert (message.content, len(message.tool_calls)) == ("", 1)


PIECES = st.sampled_from(
    [
        *"\n a<",
        "<think>",
        "</think>",
        "</thi",
        "<tool_call>",
        '{"name": "f", "arguments": {}}',
        "</tool_call>",
    ]
)


@given(st.lists(PIECES, max_size=20), st.booleans(), st.booleans(), st.data())
def test_any_cut_gives_the_same_message(
    pieces: list[str], is_open: bool, has_tools: bool, data: st.DataObject
) -> None:
    text = "".join(pieces)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    cut = [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]
    assert fold(cut, is_open=is_open, has_tools=has_tools) == fold(
        [text], is_open=is_open, has_tools=has_tools
    )


@pytest.mark.parametrize(
    ("prompt_end", "is_continued", "is_open"),
    [
        ("assistant\n<think>\n", False, True),
        ("assistant\n<think>\n\n</think>\n\n", False, False),
        ("assistant\n", False, False),
        ("<think>\nLet me", True, True),
        ("<think>\nLet me</think>So", True, False),
        ("Let me", True, False),
    ],
)
def test_whether_the_prompt_leaves_thoughts_open(prompt_end: str, is_continued: bool, is_open: bool) -> None:
    assert THINK.is_open(prompt_end, is_continued=is_continued) is is_open


def test_the_template_shows_the_format() -> None:
    assert find_reasoning_format("no thoughts") is None
    assert find_reasoning_format("'<think>\\n' … '</think>'") == THINK
    bare = find_reasoning_format("<think>…</think>")
    assert bare is not None
    assert bare.closing == "</think>"


def test_neighbours_are_merged() -> None:
    start = ToolCallStart(0, "id", "f")
    parts = [ReasoningDelta("a"), ReasoningDelta("b"), ContentDelta("c"), ContentDelta("d"), start]
    fragments = [ToolCallArguments(0, "{"), ToolCallArguments(0, "}"), ToolCallArguments(1, "{}")]
    assert merge([*parts, *fragments]) == [
        ReasoningDelta("ab"),
        ContentDelta("cd"),
        start,
        ToolCallArguments(0, "{}"),
        ToolCallArguments(1, "{}"),
    ]
