from __future__ import annotations

import gc
import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinn.text.message import AssistantMessage, ContentDelta, Part, ToolCall, ToolCallArguments, ToolCallStart
from jinn.text.tool_formats.calls import CallsShape, FreeText, Json, Maybe, Tool
from jinn.text.tool_formats.parameter_types import parameter_json, parameter_types
from jinn.text.tools import TOOL_FORMATS, ToolParser, find_tool_format

WEATHER = Tool(
    "weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "deep": {"$ref": "#/$defs/deep"},
            "note": {"type": ["string", "null"]},
        },
        "required": ["city"],
        "$defs": {"deep": {"type": "object"}},
    },
)
TOOLS = (WEATHER, Tool("now"))


def tool(name: str) -> str:
    return f"<\uff5ctool▁{name}\uff5c>"


BEGIN, END = tool("calls▁begin"), tool("calls▁end")
CALL, CALL_END, SEP = tool("call▁begin"), tool("call▁end"), tool("sep")


def parser(name: str, **options: Any) -> ToolParser:
    return ToolParser(TOOL_FORMATS[name], TOOLS, make_id=map(str, itertools.count()).__next__, **options)


def pushed(parser: ToolParser, pieces: list[str]) -> list[Part]:
    parts = [part for piece in pieces for part in parser.push(piece)]
    return [*parts, *parser.flush()]


def fold(parts: list[Part]) -> AssistantMessage:
    message = AssistantMessage()
    for part in parts:
        message.add(part)
    return message


def read(name: str, text: str, **options: Any) -> AssistantMessage:
    """The message, which must not depend on whether the text comes whole or by the character."""
    whole = fold(pushed(parser(name, **options), [text]))
    assert fold(pushed(parser(name, **options), list(text))) == whole
    return whole


def calls(*pairs: tuple[str, str]) -> list[ToolCall]:
    return [ToolCall(str(index), *pair) for index, pair in enumerate(pairs)]


PARIS = '{"city": "Paris"}'

# Each format's own way to call twice, after a word.
TWO_CALLS = {
    "hermes": (
        f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    ),
    "qwen_xml": (
        "I look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "deepseek_v3": (
        f"I look.{BEGIN}{CALL}function{SEP}weather\n```json\n{PARIS}\n```{CALL_END}\n"
        f"{CALL}function{SEP}now\n```json\n{{}}\n```{CALL_END}{END}"
    ),
    "deepseek_v31": f"I look.{BEGIN}{CALL}weather{SEP}{PARIS}{CALL_END}{CALL}now{SEP}{{}}{CALL_END}{END}",
}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_two_calls(name: str) -> None:
    assert read(name, TWO_CALLS[name]) == AssistantMessage(
        content="I look.", tool_calls=calls(("weather", PARIS), ("now", "{}"))
    )


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_text_around_calls_stays(name: str) -> None:
    message = read(name, f"{TWO_CALLS[name]}\nDone. ")
    assert message.content == "I look.\nDone. "
    assert len(message.tool_calls) == 2


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_one_call_only(name: str) -> None:
    reading = parser(name, parallel=False)
    parts = pushed(reading, list(TWO_CALLS[name]))
    assert fold(parts).tool_calls == calls(("weather", PARIS))
    assert reading.is_finished
    assert not reading.push("more")


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_arguments_are_streamed(name: str) -> None:
    """Id and name come once, before any argument; a long string comes in many fragments."""
    parts = pushed(parser(name), list(TWO_CALLS[name].replace("Paris", "x" * 100)))
    starts = [part for part in parts if isinstance(part, ToolCallStart)]
    assert [(start.index, start.name) for start in starts] == [(0, "weather"), (1, "now")]
    fragments = [part for part in parts if isinstance(part, ToolCallArguments)]
    assert sum(fragment.index == 0 for fragment in fragments) > 90
    assert parts.index(starts[0]) < parts.index(fragments[0])


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_call_that_is_cut_stays_open(name: str) -> None:
    """What a model never finished must not look finished."""
    text = TWO_CALLS[name]
    (call,) = read(name, text[: text.index("Paris") + 3]).tool_calls
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.arguments)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", "<tool_call></tool_call>"),
        ("hermes", '<tool_call>{"name": "f"'),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": 5}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [NaN]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud800 \\x", "arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 5000 + "</tool_call> after"),
        ("hermes", "<tool_call>" + " " * 5000 + "</tool_call> after"),
        ("hermes", "a < b <tool_ <tool_cal"),
        ("qwen_xml", "<tool_call>\n<function=>\n</function>\n</tool_call>"),
        ("qwen_xml", "<tool_call>\nweather()</tool_call>"),
        ("qwen_xml", "<tool_call>\n<function=a\nb>"),
        ("qwen_xml", "<tool_call><function=" + "f" * 5000 + "></tool_call>"),
        ("qwen_xml", "use <function=other> as a tag, or <function=weather"),
        ("deepseek_v3", f"{BEGIN}{END}"),
        ("deepseek_v3", f"{BEGIN}{CALL}function{SEP}f {{}}{CALL_END}{END}"),
        ("deepseek_v3", f"{BEGIN}{CALL}f{SEP}{{}}{CALL_END}{END}"),
        ("deepseek_v31", f"{BEGIN} {CALL}{SEP}{{}}"),
        ("deepseek_v31", f"{BEGIN}{CALL}" + "f" * 5000),
        ("deepseek_v31", f"{CALL}f{SEP}{{}}{CALL_END}"),
    ],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert read(name, text) == AssistantMessage(content=text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>{"name":"now","arguments":{}}</tool_call>', ("now", "{}")),
        (
            '<tool_call>{"name": "now", "parameters": {"a": [1, {"b": "}"}]}}',
            ("now", '{"a": [1, {"b": "}"}]}'),
        ),
        ('<tool_call>{"arguments": {"a": "é"}, "name": "now"}</tool_call>', ("now", '{"a": "é"}')),
        ('<tool_call>{"name": "now"}</tool_call>', ("now", "{}")),
        ('<tool_call>{"name": "n\\u006fw", "arguments": {}}</tool_call>', ("now", "{}")),
        ('<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', ("now", '{"a": 1}')),
        (
            '<tool_call>{"name": "now", "arguments": {"a": "</tool_call> \\" <tool_call>"}}</tool_call>',
            ("now", '{"a": "</tool_call> \\" <tool_call>"}'),
        ),
        ('<tool_call>{"name": "now", "arguments": {"a": 1}\n</tool_call>', ("now", '{"a": 1}')),
        ('<tool_call>{"name": "now", "arguments": {"a": "x\n</tool_call>', ("now", '{"a": "x')),
        ('<tool_call>{"name": "now", "arguments": {"a": nope}}</tool_call>', ("now", '{"a": nope}')),
    ],
)
def test_hermes_calls(text: str, expected: tuple[str, str]) -> None:
    assert read("hermes", text) == AssistantMessage(tool_calls=calls(expected))


def test_hermes_keeps_what_follows_the_arguments() -> None:
    message = read("hermes", '<tool_call>{"name": "now", "arguments": {}, "x": 1}\n</tool_call> and on')
    assert message.content == ', "x": 1}\n and on'


def xml(body: str) -> str:
    return f"<tool_call>\n<function=weather>\n{body}\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        ("\n7\n", "days", "7"),
        ("7", "days", "7"),
        ("\nseven\n", "days", '"seven"'),
        ("\n7.5\n", "days", '"7.5"'),
        ("\n7\n", "city", '"7"'),
        ("\nnull\n", "city", '"null"'),
        ("\nnull\n", "note", "null"),
        ("\nNone\n", "note", "null"),
        ("\n7\n", "note", '"7"'),
        ('\n{"a": [True]}\n', "deep", '"{\\"a\\": [True]}"'),
        ('\n{"a": [true]}\n', "deep", '{"a": [true]}'),
        ("\n\n two\nlines \n\n", "city", '"\\n two\\nlines \\n"'),
        ('\n"quoted" \\ </param\n', "city", '"\\"quoted\\" \\\\ </param"'),
        ("\n7\n", "unknown", '"7"'),
        ("", "city", '""'),
    ],
)
def test_xml_values_follow_the_schema(value: str, name: str, expected: str) -> None:
    message = read("qwen_xml", xml(f"<parameter={name}>{value}</parameter>"))
    assert message == AssistantMessage(tool_calls=calls(("weather", f'{{"{name}": {expected}}}')))


def test_xml_oddities() -> None:
    city = "<parameter=city>\nParis\n</parameter>"
    unopened = xml(city).removeprefix("<tool_call>\n")
    assert read("qwen_xml", unopened).tool_calls == calls(("weather", PARIS))
    two = f"<tool_call><function=now></function><function=weather>{city}</function></tool_call>"
    assert read("qwen_xml", two) == AssistantMessage(tool_calls=calls(("now", "{}"), ("weather", PARIS)))
    between = read("qwen_xml", xml(f"Let me see.\n{city}"))
    assert between == AssistantMessage(content="\nLet me see.", tool_calls=calls(("weather", PARIS)))
    bad_name = read("qwen_xml", xml(f"<parameter=\n>{city}"))
    assert bad_name == AssistantMessage(content="\n<parameter=\n>", tool_calls=calls(("weather", PARIS)))


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"enum": [1, None, "a", 2.5]}, {"integer", "null", "string", "number"}),
        ({"enum": [True, [], {}]}, {"boolean", "array", "object"}),
        ({"const": 1}, {"integer"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"string", "null"}),
        ({"$ref": "#/$defs/loop"}, set()),
        ({"$ref": "#/nowhere/at/all"}, set()),
        ({"type": 5, "anyOf": 7, "enum": 8}, set()),
        ({}, set()),
        (True, set()),
    ],
)  # fmt: skip
def test_parameter_types(schema: Any, types: set[str]) -> None:
    root = {"properties": {"p": schema}, "$defs": {"loop": {"$ref": "#/$defs/loop"}}}
    assert parameter_types(root, "p") == types
    assert not parameter_types({"properties": 5}, "p")


def test_references_that_multiply_are_followed_once() -> None:
    links = {str(level): {"anyOf": [{"$ref": f"#/$defs/{level + 1}"}] * 1000} for level in range(20)}
    schema = {"properties": {"p": {"$ref": "#/$defs/0"}}, "$defs": {**links, "20": {"type": "integer"}}}
    assert parameter_types(schema, "p") == {"integer"}
    chain = {str(level): {"$ref": f"#/$defs/{level + 1}"} for level in range(100_000)}
    assert not parameter_types({"properties": {"p": {"$ref": "#/$defs/0"}}, "$defs": chain}, "p")


def test_values_that_are_no_json_are_text() -> None:
    for text in ("NaN", "[" * 100_000, "9" * 10_000, "[1,", "True dat"):
        assert json.loads(parameter_json(text, frozenset(("number", "array", "integer", "boolean")))) == text
    assert parameter_json("True", frozenset(("boolean",))) == "true"


PIECES = st.sampled_from(
    [
        *"{}[]\"\\:,=>\n aé",
        "<tool_call>", "</tool_call>", "<function=weather>", "<function=", "</function>", "<parameter=city>",
        "<parameter=days>", "</parameter>", '{"name": "weather", "arguments": ', '{"name"', PARIS,
        BEGIN, END, CALL, CALL_END, SEP, "function", "weather", "\n```json\n", "\n```", "<", "</tool", "  \n",
    ]
)  # fmt: skip


@given(name=st.sampled_from(sorted(TOOL_FORMATS)), pieces=st.lists(PIECES, max_size=30), data=st.data())
def test_any_cut_gives_the_same_message(name: str, pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    cut = [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]
    parts = pushed(parser(name), cut)
    assert fold(parts) == fold(pushed(parser(name), [text]))
    assert [part.index for part in parts if isinstance(part, ToolCallStart)] == list(
        range(sum(isinstance(part, ToolCallStart) for part in parts))
    )


@given(name=st.sampled_from(sorted(TOOL_FORMATS)), pieces=st.lists(PIECES, max_size=30))
def test_nothing_visible_is_lost_without_a_call(name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    parts = pushed(parser(name), [text])
    if all(isinstance(part, ContentDelta) for part in parts):
        assert fold(parts).content == text


TEXTS = st.text(st.characters(codec="utf-8"))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


@pytest.mark.parametrize("name", ["hermes", "deepseek_v3", "deepseek_v31"])
@given(arguments=st.dictionaries(TEXTS, JSON_VALUES, max_size=3))
def test_any_arguments_come_back(name: str, arguments: dict[str, Any]) -> None:
    text = json.dumps(arguments, ensure_ascii=False)
    message = read(name, TWO_CALLS[name].replace(PARIS, text))
    assert message.tool_calls == calls(("weather", text), ("now", "{}"))


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("unit", ['{"', " ", "\n", "<", "<tool_call>", '"\\', BEGIN, "<parameter=city>"])
def test_time_is_linear(name: str, unit: str) -> None:
    """Four times the text takes about four times as long; 16 times would be quadratic."""

    def seconds(num_units: int) -> float:
        text = TWO_CALLS[name][: TWO_CALLS[name].index("Paris")] + unit * num_units
        reading, pieces = parser(name), list(text)
        gc.disable()
        started = time.process_time()
        for piece in pieces:
            reading.push(piece)
        taken = time.process_time() - started
        gc.enable()
        return taken

    assert min(seconds(8_000) for _ in range(3)) < 9 * max(min(seconds(2_000) for _ in range(3)), 0.005)


def test_shapes_read_back() -> None:
    """A call written by a format's shape is read as that call."""
    for name, tool_format in TOOL_FORMATS.items():
        shape = tool_format.shape(TOOLS)
        text = (
            shape.begin + shape.separator.join(write(shape, name) for name in ("weather", "now")) + shape.end
        )
        assert read(name, text).tool_calls == calls(("weather", PARIS), ("now", "{}")), name


def write(shape: CallsShape, tool_name: str) -> str:
    values = {Json: PARIS if tool_name == "weather" else "{}", FreeText: "Paris", Maybe: ""}
    return "".join(
        piece if isinstance(piece, str) else values[type(piece)] for piece in shape.calls[tool_name]
    )


def test_shape_of_xml_parameters() -> None:
    pieces = TOOL_FORMATS["qwen_xml"].shape([WEATHER]).calls["weather"]
    assert pieces[:4] == (
        "<tool_call>\n<function=weather>\n",
        "<parameter=city>\n",
        FreeText("\n</parameter>\n", {"type": "string"}),
        "\n</parameter>\n",
    )
    assert pieces[4] == Maybe(("<parameter=days>\n", Json({"type": "integer"}), "\n</parameter>\n"))


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('<tool_call>\\n{"name": <function-name>', "hermes"),
        ("<tool_call>\n<function=example>", "qwen_xml"),
        (f"{BEGIN}function{SEP} ```json", "deepseek_v3"),
        (f"{BEGIN}{SEP}", "deepseek_v31"),
        ("<|im_start|>", None),
    ],
)
def test_the_template_shows_the_format(template: str, name: str | None) -> None:
    found = find_tool_format(template)
    assert (found and found.name) == name
