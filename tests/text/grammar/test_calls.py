"""Calls that are held to a format are read back by its parser, with arguments that satisfy the schema."""

from __future__ import annotations

import json
import random
from collections import Counter

import jsonschema_rs
import pytest
from answers import accepts, matcher_of, walk

from jinn.text.grammar.grammars import GrammarError, GrammarKind, grammar_text
from jinn.text.grammar.worker import compiled
from jinn.text.message import ToolCallArguments, ToolCallStart
from jinn.text.tool_formats.calls import Tool
from jinn.text.tools import TOOL_FORMATS, ToolParser

WEATHER = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "where": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
}
TOOLS = {"get_weather": WEATHER, "now": {}}


def grammar(format_name, tools=TOOLS, parallel=True, **fields):
    value = {"format": format_name, "tools": tools, "is_parallel": parallel, **fields}
    return grammar_text(GrammarKind.CALLS, value)


def calls_in(format_name, text):
    """(name, arguments) of each call, and what is left as content."""
    tools = [Tool(name, parameters) for name, parameters in TOOLS.items()]
    parser = ToolParser(TOOL_FORMATS[format_name], tools)
    calls, content = [], ""
    for part in (*parser.push(text), *parser.flush()):
        if isinstance(part, ToolCallStart):
            calls.append([part.name, ""])
        elif isinstance(part, ToolCallArguments):
            calls[-1][1] += part.fragment
        else:
            content += part.text
    return calls, content


def calls_of(format_name, **fields):
    """Some answers of random calls."""
    origin = matcher_of(grammar(format_name, **fields))
    walks = [walk(origin.deep_copy(), random.Random(seed)) for seed in range(20)]
    return [answer.decode() for answer, outcome in walks if outcome == "stop"]


CONTROL_TEXTS = TOOL_FORMATS["deepseek_v3"].control_texts
DEEPSEEK = ["deepseek_v3", "deepseek_v31"]


@pytest.mark.parametrize(
    ("format_name", "control_texts"),
    [*((name, ()) for name in TOOL_FORMATS), *((name, CONTROL_TEXTS) for name in DEEPSEEK)],
)
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_are_read_back(format_name, parallel, control_texts):
    text = grammar(format_name, parallel=parallel, control_texts=control_texts)
    origin, names, counts = matcher_of(text), set(), Counter()
    assert not origin.is_error(), origin.get_error()
    for seed in range(60):
        answer, outcome = walk(origin.deep_copy(), random.Random(seed))
        if outcome != "stop":
            continue
        calls, content = calls_in(format_name, answer.decode())
        assert not content.strip()
        counts[len(calls)] += 1
        for name, arguments in calls:
            names.add(name)
            value = json.loads(arguments)
            assert isinstance(value, dict)
            if name == "get_weather":
                assert jsonschema_rs.is_valid(WEATHER, value), answer
    assert names == set(TOOLS)
    assert set(counts) == {1} if not parallel else len(counts) > 1
    assert counts.total() > 40


def test_a_string_that_is_written_bare():
    tools = {"say": {"properties": {"text": {"type": "string"}}, "required": ["text"]}}
    call = "<tool_call>\n<function=say>\n<parameter=text>\n{}\n</parameter>\n</function>\n</tool_call>"
    for text in ("", "Hi", 'a\n"b" </parameter> c', "é\n\n"):
        assert accepts(grammar("qwen_xml", tools), call.format(text)), text
    assert not accepts(grammar("qwen_xml", tools), call.format("a\n</parameter>\n<parameter=text>\nb"))


@pytest.mark.parametrize("format_name", TOOL_FORMATS)
def test_strict_calls_may_follow_any_text(format_name):
    text = grammar(format_name, content="")
    for said in ("", "I look.\n", "a < b, <tool", "é\n\n"):
        assert accepts(text, said), said
        for calls in calls_of(format_name)[:4]:
            assert accepts(text, said + calls), said + calls
            assert calls_in(format_name, said + calls)[1].strip() == said.strip()
    for opening in TOOL_FORMATS[format_name].openings.texts:
        assert not accepts(text, f"I look. {opening}")
    spoilt = [calls.replace("get_weather", "get_wether") for calls in calls_of(format_name)]
    assert not any(accepts(text, calls) for calls in spoilt if "wether" in calls)


@pytest.mark.parametrize("format_name", DEEPSEEK)
def test_control_tokens_are_not_spelled_out(format_name):
    """Text may hold their names, since it does not hold the tokens."""
    text = grammar(format_name, content="", control_texts=CONTROL_TEXTS)
    assert accepts(text, f"I look. {CONTROL_TEXTS[0]}")
    (calls, *_) = calls_of(format_name)
    assert not accepts(grammar(format_name, control_texts=CONTROL_TEXTS), calls)
    answers = calls_of(format_name, control_texts=CONTROL_TEXTS)
    assert len(answers) > 10
    assert all(accepts(grammar(format_name), answer) for answer in answers)


def test_a_clients_grammar_names_no_control_token():
    with pytest.raises(GrammarError, match="special token"):
        compiled(GrammarKind.GRAMMAR, f'start: "a" {CONTROL_TEXTS[0]}')


@pytest.mark.parametrize(
    ("kind", "value", "answer", "other"),
    [
        (GrammarKind.JSON_SCHEMA, {"type": "array", "maxItems": 1}, '["<tool_call>"]', "[1, 2]"),
        (GrammarKind.JSON_OBJECT, None, "{}", "[]"),
        (GrammarKind.REGEX, "[a-z]+", "abc", "ABC"),
        (GrammarKind.GRAMMAR, 'root ::= "yes" | "no"', "no", "none"),
    ],
)
def test_calls_in_the_place_of_an_answer(kind, value, answer, other):
    text = grammar("hermes", content=grammar_text(kind, value))
    assert accepts(text, answer)
    assert not accepts(text, other)
    (calls, *_) = calls_of("hermes")
    assert accepts(text, calls)
    assert not accepts(text, answer + calls)
    assert not accepts(text, calls + answer)


def test_a_refusal_names_the_tool():
    with pytest.raises(GrammarError, match="'not'") as caught:
        grammar("hermes", {"f": {"properties": {"a": {"not": {}}}}})
    assert caught.value.pointer == "/f/properties/a/not"
