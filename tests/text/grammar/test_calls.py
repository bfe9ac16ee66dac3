"""Calls that are held to a format are read back by its parser, with arguments that satisfy the schema."""

from __future__ import annotations

import json
import random
from collections import Counter

import jsonschema_rs
import pytest
from answers import accepts, matcher_of, walk

from jinn.text.grammar.grammars import GrammarError, GrammarKind, grammar_text
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


def grammar(format_name, tools=TOOLS, parallel=True):
    return grammar_text(GrammarKind.CALLS, {"format": format_name, "tools": tools, "parallel": parallel})


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


@pytest.mark.parametrize("format_name", TOOL_FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_are_read_back(format_name, parallel):
    origin, names, counts = matcher_of(grammar(format_name, parallel=parallel)), set(), Counter()
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


def test_a_refusal_names_the_tool():
    with pytest.raises(GrammarError, match="'not'") as caught:
        grammar("hermes", {"f": {"properties": {"a": {"not": {}}}}})
    assert caught.value.pointer == "/f/properties/a/not"
