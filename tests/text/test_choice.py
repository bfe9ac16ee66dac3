from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from official import official

from jinn.engine.messages import FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from jinn.text.choice import Choice, Delta
from jinn.text.message import AssistantMessage, ToolCall
from jinn.text.message_parser import MessageParser
from jinn.text.reasoning import ReasoningFormat, ReasoningParser
from jinn.text.tokenizer import Tokenizer
from jinn.text.tool_formats.calls import Tool
from jinn.text.tools import TOOL_FORMATS, ToolParser
from server.fakes import EOS, ByteTokenizer


def run(
    data: bytes, sizes: Sequence[int] = (), *, ends_with_eos: bool = True, **sampling: object
) -> list[Delta]:
    """Feed `data` in pieces of `sizes` tokens, then the end, and collect the deltas."""
    choice = Choice(0, SamplingParams(**sampling), ByteTokenizer())
    has_logprobs = sampling.get("logprobs") is not None
    deltas = []
    sizes = list(sizes)
    while data and not choice.is_finished:
        size = sizes.pop(0) if sizes else 1
        piece, data = data[:size], data[size:]
        logprobs = tuple(TokenLogprobs(-float(byte)) for byte in piece) if has_logprobs else ()
        reason = None if data or ends_with_eos else FinishReason.LENGTH
        deltas.append(choice.take(TokenOutput("r", 0, tuple(piece), logprobs, finish_reason=reason)))
    if not choice.is_finished:
        logprobs = (TokenLogprobs(-1.0),) if has_logprobs else ()
        deltas.append(choice.take(TokenOutput("r", 0, (EOS,), logprobs, finish_reason=FinishReason.STOP)))
    assert choice.is_finished
    return [delta for delta in deltas if delta is not None]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_no_half_characters() -> None:
    deltas = run("a😀é".encode())
    assert [delta.text for delta in deltas] == ["a", "😀", "é", ""]
    assert deltas[-1].finish_reason == "stop"


def test_cut_character_at_the_end() -> None:
    deltas = run("a😀".encode()[:-1], ends_with_eos=False)
    assert text_of(deltas) == "a\ufffd"
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("sizes", [[1] * 40, [2] * 20, [3] * 14, [40]])
def test_stop_string_is_never_shown(sizes: list[int]) -> None:
    deltas = run(b"one two three", sizes, stop=(" tw", "zzz"))
    assert text_of(deltas) == "one"
    assert deltas[-1].finish_reason == "stop"


def test_held_text_comes_out_when_decided() -> None:
    assert [d.text for d in run(b"aEbEN", stop=("END",))] == ["a", "Eb", "EN"]


def test_stop_string_completed_by_the_last_token() -> None:
    deltas = run(b"abEND", ends_with_eos=False, stop=("END",))
    assert (text_of(deltas), deltas[-1].finish_reason) == ("ab", "stop")


def test_stop_strings_wait_for_min_tokens() -> None:
    deltas = run(b"END and END", stop=("END",), min_tokens=4)
    assert text_of(deltas) == "END and "


def test_tokens_of_a_stop_string_have_no_logprobs() -> None:
    deltas = run(b"abEND!", stop=("END",), logprobs=0)
    entries = [entry for delta in deltas for entry in delta.entries]
    assert [(e.token_id, e.text_offset) for e in entries] == [(ord("a"), 0), (ord("b"), 1)]


def test_logprobs_come_with_their_text() -> None:
    deltas = run("é!".encode(), logprobs=0)
    offsets = [(entry.token_id, entry.text_offset) for d in deltas for entry in d.entries]
    assert offsets == [(0xC3, 0), (0xA9, 0), (0x21, 1)]
    assert all(entry.logprobs.logprob == -entry.token_id for d in deltas for entry in d.entries)


@given(
    st.text(alphabet="aébc😀", max_size=30),
    st.lists(st.text(alphabet="aébc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 7), max_size=40),
)
def test_cut_anywhere_gives_the_same(text: str, stop: list[str], sizes: list[int]) -> None:
    deltas = run(text.encode(), sizes, stop=tuple(stop), logprobs=0)
    whole = run(text.encode(), [1000], stop=tuple(stop), logprobs=0)
    assert text_of(deltas) == text_of(whole)
    assert not any(text in text_of(deltas) for text in stop)
    assert [e for d in deltas for e in d.entries] == [e for d in whole for e in d.entries]
    assert deltas[-1].finish_reason == whole[-1].finish_reason == "stop"


CALLS = {
    "qwen3": '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>',
    "deepseek": (
        "<\uff5ctool▁calls▁begin\uff5c><\uff5ctool▁call▁begin\uff5c>function<\uff5ctool▁sep\uff5c>f\n```json\n"
        '{"a": "é"}\n```<\uff5ctool▁call▁end\uff5c><\uff5ctool▁calls▁end\uff5c>'
    ),
}


def read(tokenizer: Tokenizer, token_ids: list[int], **options: bool) -> tuple[AssistantMessage, Choice, str]:
    """What a choice of these tokens says, that it says it piece by piece, and why it ended."""
    reasoning = ReasoningParser(ReasoningFormat("<think>", "</think>", "</think>"), is_open=False)
    name = "deepseek_v3" if tokenizer is official("deepseek") else "hermes"
    tools = ToolParser(TOOL_FORMATS[name], [Tool("f")], make_id=lambda: "id", **options)
    choice = Choice(0, SamplingParams(), tokenizer, parser=MessageParser(reasoning, tools))
    message, reason = AssistantMessage(), ""
    for position, token_id in enumerate(token_ids):
        is_last = position + 1 == len(token_ids)
        finish_reason = FinishReason.STOP if is_last else None
        if delta := choice.take(TokenOutput("r", 0, (token_id,), finish_reason=finish_reason)):
            reason = delta.finish_reason or ""
            for part in delta.parts:
                message.add(part)
        if choice.is_finished:
            break
    return message, choice, reason


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("parse_special", [True, False])
def test_calls_are_read_from_tags_as_tokens_or_as_text(name: str, parse_special: bool) -> None:
    tokenizer = official(name)
    ids = tokenizer.encode(CALLS[name], parse_special=parse_special, add_bos=False)
    message, choice, reason = read(tokenizer, [*ids, tokenizer.eos_token_ids[0]])
    has_thoughts = "<think>" in CALLS[name]
    assert message == AssistantMessage("Hm." if has_thoughts else "", "", [ToolCall("id", "f", '{"a": "é"}')])
    assert reason == "tool_calls"
    thoughts = CALLS[name].partition("</think>")[0] + "</think>"
    num_thoughts = len(tokenizer.encode(thoughts, parse_special=parse_special, add_bos=False))
    # As text, the last token may hold more than the tag.
    assert abs(choice.num_reasoning_tokens - (num_thoughts if has_thoughts else 0)) <= (not parse_special)


def test_a_choice_ends_with_its_only_call() -> None:
    tokenizer = official("qwen3")
    ids = tokenizer.encode(CALLS["qwen3"] * 2)
    message, choice, reason = read(tokenizer, [*ids, tokenizer.eos_token_ids[0]], parallel=False)
    assert len(message.tool_calls) == 1
    assert reason == "tool_calls"
    assert choice.num_tokens < len(ids) / 2
