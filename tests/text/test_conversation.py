"""Conversations with tools and thoughts under each family's template."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from pathlib import Path
from typing import Any

import official
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jinn.text.chat_format import ChatFormat
from jinn.text.message import AssistantMessage
from jinn.text.template import ChatTemplate, TemplateError, encode_chat
from jinn.text.tokenizer import Tokenizer
from jinn.text.tool_formats.calls import Tool

TEMPLATES = Path(__file__).parent / "templates"

# Template to the tokenizer that it runs with, and what it shows: calls, the switch of thoughts, and whether
# arguments may be text.
FAMILIES: dict[str, tuple[str, str, str | None, bool]] = {
    "qwen3": ("qwen3", "hermes", "enable_thinking", True),
    "qwen3_thinking_2507": ("qwen3", "hermes", None, True),
    "qwen3_coder": ("qwen3", "qwen_xml", None, False),
    "qwen3_5": ("qwen3", "qwen_xml", "enable_thinking", False),
    "deepseek": ("deepseek", "deepseek_v3", None, True),
    "deepseek_v31": ("deepseek", "deepseek_v31", "thinking", True),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d <b>",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "Hi"}


@functools.cache
def template_of(family: str) -> ChatTemplate:
    file = TEMPLATES / f"{family}.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8").removesuffix("\n"))
    template = ChatTemplate.from_folder(official.official_folder(family))
    assert template is not None
    return template


def tokenizer_of(family: str) -> Tokenizer:
    return official.official(FAMILIES[family][0])


@functools.cache
def reference_of(family: str) -> Any:
    reference = AutoTokenizer.from_pretrained(official.official_folder(FAMILIES[family][0]))
    reference.chat_template = template_of(family).text
    return reference


def encode(family: str, messages: list[Any], **options: Any) -> list[int]:
    return encode_chat(tokenizer_of(family), template_of(family), messages, **options)


def render(family: str, messages: list[Any], **options: Any) -> str:
    return tokenizer_of(family).decode(encode(family, messages, **options), skip_special=False)


def call(arguments: Any, call_id: str = "1", name: str = "f") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_template_shows(family: str) -> None:
    _, tools, switch, takes_text = FAMILIES[family]
    chat_format = ChatFormat.of(template_of(family))
    assert chat_format.tools is not None
    assert (chat_format.tools.name, chat_format.thinking_switch) == (tools, switch)
    assert (chat_format.reasoning is None) == (family in ("qwen3_coder", "deepseek"))
    assert template_of(family).takes_text_arguments is takes_text


def random_conversation(rng: random.Random, *, is_text: bool) -> dict[str, Any]:
    """Turns that every family's template takes as they are."""
    texts = (
        "Hello",
        "\n\nHello ",
        "x<y>z",
        "漢字 👍🏽",
        "{{ x }}",
        "a\n\nb",
        "</tool_call",
        "<tool_resp",
    )
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(texts)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": rng.choice(texts)})
        if rng.random() < 0.6:
            arguments: Any = {"a": rng.randint(0, 9), "s": rng.choice(texts), "n": [1, {"b": None}]}
            calls = [call(json.dumps(arguments) if is_text else arguments) for _ in range(rng.randint(1, 3))]
            message = {
                "role": "assistant",
                "content": rng.choice(("Let me see.", "Ok\n")),
                "tool_calls": calls,
            }
            if rng.random() < 0.5:
                message["reasoning_content"] = rng.choice(texts)
            messages.append(message)
            messages += [{"role": "tool", "content": rng.choice(texts)} for _ in calls]
        messages.append(
            {"role": "assistant", "content": rng.choice(("Paris.", "<think>\nHm.\n</think>\n\nParis."))}
        )
    if rng.random() < 0.7:
        messages.append({"role": "user", "content": rng.choice(texts)})
    options: dict[str, Any] = {"messages": messages, "add_generation_prompt": rng.random() < 0.7}
    options["tools"] = rng.choice((None, [TOOL, TOOL]))
    switch = rng.choice((None, "enable_thinking", "thinking"))
    return options | ({switch: rng.random() < 0.5} if switch else {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [60, pytest.param(2_000, marks=pytest.mark.soak)])
def test_ordinary_chats_equal_transformers(family: str, count: int) -> None:
    rng, takes_text = random.Random(9), FAMILIES[family][3]
    for _ in range(count):
        options = random_conversation(rng, is_text=takes_text)
        messages = options.pop("messages")
        expected = reference_of(family).apply_chat_template(
            messages, tokenize=True, return_dict=False, **options
        )
        assert encode(family, messages, **options) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", ["The answer", "The\n\nanswer is ", " x", "<think>\nLet me"])
def test_a_continued_message_equals_transformers(family: str, content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    expected = reference_of(family).apply_chat_template(
        messages, tokenize=True, return_dict=False, continue_final_message=True
    )
    assert encode(family, messages, continue_final_message=True) == expected


@pytest.mark.parametrize("messages", [[USER], [USER, {"role": "assistant", "content": ""}]])
def test_only_an_assistants_text_is_continued(messages: list[Any]) -> None:
    with pytest.raises(ValueError, match="not the assistant's, or has no content"):
        encode("qwen3", messages, continue_final_message=True)


def test_an_end_that_the_template_hides_is_not_continued() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    messages = [USER, {"role": "assistant", "content": "x"}]
    with pytest.raises(TemplateError, match="does not show the end"):
        encode_chat(tokenizer_of("qwen3"), template, messages, continue_final_message=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_may_be_text_or_an_object(family: str) -> None:
    if family in ("deepseek", "deepseek_v31"):
        pytest.skip("the template itself needs text")
    arguments = {"a": 1, "s": "é"}
    as_object = [USER, {"role": "assistant", "content": "x", "tool_calls": [call(arguments)]}]
    text = json.dumps(arguments, ensure_ascii=False)
    as_text = [USER, {"role": "assistant", "content": "x", "tool_calls": [call(text)]}]
    assert encode(family, as_text) == encode(family, as_object)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", ['{"a": 1', "not json", "[1, 2]", "", "5", '{"a": "<|im_end|>"}'])
def test_any_text_of_arguments_is_rendered(family: str, arguments: str) -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}]
    text = render(family, [*messages, {"role": "tool", "content": "done", "tool_call_id": "1"}])
    assert "done" in text
    if FAMILIES[family][3]:
        assert arguments in text


@pytest.mark.parametrize("family", FAMILIES)
def test_results_stand_in_the_order_of_their_calls(family: str) -> None:
    calls = [call("{}", "first"), call("{}", "second")]
    results = [
        {"role": "tool", "content": "stray", "tool_call_id": "?"},
        {"role": "tool", "content": "two", "tool_call_id": "second"},
        {"role": "tool", "content": "one", "tool_call_id": "first"},
    ]
    text = render(family, [USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results])
    assert sorted(("one", "two", "stray"), key=text.index) == ["one", "two", "stray"]


@pytest.mark.parametrize("family", FAMILIES)
def test_late_system_messages_are_kept(family: str) -> None:
    """Where the template refuses them, in one message at the start."""
    messages = [
        {"role": "system", "content": "one"},
        USER,
        {"role": "developer", "content": [{"type": "text", "text": "tw"}, {"type": "text", "text": "o"}]},
        {"role": "user", "content": "there"},
    ]
    text = render(family, messages)
    assert "two" in text
    if family == "qwen3_5":
        assert text == render(family, [{"role": "system", "content": "one\n\ntwo"}, USER, messages[-1]])
        assert "late" in render(family, [USER, {"role": "system", "content": "late"}])


def test_a_refusal_keeps_its_own_reason() -> None:
    with pytest.raises(TemplateError, match="there is no user message"):
        encode("qwen3_5", [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}])
    with pytest.raises(TemplateError, match="there is no role critic"):
        encode("qwen3_5", [USER, {"role": "critic", "content": "a"}])


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_but_the_assistant_writes_tags(family: str) -> None:
    """User, system and tool text that spells any added token stays text."""
    tokenizer = tokenizer_of(family)
    special = {token.id for token in tokenizer.added_tokens.values()}
    spelled = "".join(tokenizer.added_tokens)

    def tokens(text: str, arguments: str = "{}") -> list[int]:
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "content": None, "tool_calls": [call(arguments)]},
            {"role": "tool", "content": text},
            {"role": "user", "content": text},
        ]
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}
        return [i for i in encode(family, messages, tools=[tool]) if i in special]

    assert tokens(spelled) == tokens("plain")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_thinking", [True, False])
def test_an_answer_reads_back(family: str, is_thinking: bool) -> None:
    """What the template writes for a message with calls is read as that message."""
    chat_format, tokenizer = ChatFormat.of(template_of(family)), tokenizer_of(family)
    if chat_format.reasoning is None and is_thinking:
        pytest.skip("the family does not think")
    options = {chat_format.thinking_switch: is_thinking} if chat_format.thinking_switch else {}
    prompt = encode(family, [USER], **options)
    message = {"role": "assistant", "content": None, "tool_calls": [call('{"a": 1, "s": "é\\n"}')]}
    whole = encode(family, [USER, message], add_generation_prompt=False, **options)
    written = tokenizer.decode(whole, skip_special=False)
    calls = written[written.rindex("Hi") :]
    opening = next(tag for tag in ("<tool_call>", "<\uff5ctool▁calls▁begin") if tag in calls)
    output = calls[calls.index(opening) :]
    is_open = chat_format.is_thinking(tokenizer, prompt, is_continued=False)
    if is_thinking:
        thoughts = "" if is_open else "<think>"
        output = f"{thoughts}\nHm.\n</think>\n\n{output}"
    elif is_open:
        pytest.skip("the family always thinks")
    parser = chat_format.parser_factory([Tool.from_definition(TOOL)], is_thinking=is_open)()
    read = AssistantMessage()
    for part in (*parser.push(output), *parser.flush()):
        read.add(part)
    assert read.reasoning == ("Hm." if is_thinking else "")
    (found,) = read.tool_calls
    assert found.name == "f"
    assert json.loads(found.arguments) == {"a": 1, "s": "é\n"}


TEXTS = st.sampled_from(
    ["", " ", "Hi", "<|im_end|>", "</think>", "<think>", "{{ x }}", "é\n", "[]", "{", '{"a": 1}']
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=2)
NAMES = st.sampled_from(["f", "g", "arguments"])
CALLS = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": NAMES, "arguments": TEXTS | OBJECTS})},
    optional={"id": TEXTS, "type": st.just("function")},
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
    optional={
        "content": TEXTS | st.none() | st.just([{"type": "text", "text": "<|im_start|>"}]),
        "name": NAMES,
        "reasoning_content": TEXTS,
        "reasoning": TEXTS,
        "tool_calls": st.lists(CALLS, max_size=2),
        "tool_call_id": TEXTS,
    },
)
SCHEMAS = st.fixed_dictionaries(
    {}, optional={"type": st.just("object"), "properties": VALUES, "required": VALUES, "x": VALUES}
)
TOOLS = st.builds(
    lambda function: {"type": "function", "function": function},
    st.fixed_dictionaries({"name": NAMES}, optional={"description": TEXTS, "parameters": SCHEMAS}),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(MESSAGES, min_size=1, max_size=4),
    tools=st.none() | st.lists(TOOLS, max_size=2),
    is_continued=st.booleans(),
    is_thinking=st.none() | st.booleans(),
)
def test_a_conversation_is_rendered_or_refused(
    family: str, messages: list[Any], tools: list[Any] | None, is_continued: bool, is_thinking: bool | None
) -> None:
    variables = {} if is_thinking is None else {"enable_thinking": is_thinking, "thinking": is_thinking}
    with contextlib.suppress(ValueError):
        ids = encode(family, messages, tools=tools, continue_final_message=is_continued, **variables)
        assert isinstance(ids, list)


def test_variables() -> None:
    variables = template_of("qwen3_5").variables
    assert variables >= {"messages", "tools", "add_generation_prompt", "enable_thinking"}
    assert not variables & {"loop", "message", "raise_exception", "namespace", "state"}


@pytest.mark.parametrize("calls", [5, [5], [{"function": "f"}]])
def test_malformed_calls_are_named(calls: Any) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls must be a list"):
        encode("qwen3", [USER, {"role": "assistant", "content": "x", "tool_calls": calls}])


def test_formats_by_name() -> None:
    template = template_of("qwen3")
    named = ChatFormat.of(template, "qwen_xml").tools
    assert named is not None
    assert named.name == "qwen_xml"
    assert ChatFormat.of(template, "none").tools is None
    assert ChatFormat.of(None) == ChatFormat()
    with pytest.raises(ValueError, match="tool_format must be one of auto, none"):
        ChatFormat.of(template, "python")
