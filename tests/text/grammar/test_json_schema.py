"""What is refused, by name and place; and what llguidance alone would take for an answer."""

from __future__ import annotations

import json

import jsonschema_rs
import llguidance
import pytest
from answers import accepts
from random_schemas import UNSUPPORTED

from jinn.text.grammar import json_schema
from jinn.text.grammar.grammars import GrammarError, GrammarKind, grammar_text
from jinn.text.grammar.json_schema import MAX_ENUM_VALUES, SchemaError, normalized


def grammar(schema):
    return grammar_text(GrammarKind.JSON_SCHEMA, schema)


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED = [
    ({"not": {}}, "/not"),
    ({"properties": {"a/b": {"items": {"uniqueItems": True}}}}, "/properties/a~1b/items/uniqueItems"),
    ({"anyOf": [{}, {"if": {}}]}, "/anyOf/1/if"),
    ({"$ref": "#/$defs/A", "$defs": {"A": {"contains": {}}}}, "/$defs/A/contains"),
    ({"oneOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"nullable": True}}}, "/$defs/A/nullable"),
    ({"x-guidance": {"lenient": True}}, "/x-guidance"),
    ({"unheard-of": 1}, "/unheard-of"),
    ({"type": "any"}, "/type"),
    ({"type": []}, "/type"),
    ({"properties": []}, "/properties"),
    ({"properties": {"a": 1}}, "/properties/a"),
    ({"required": [1]}, "/required"),
    ({"anyOf": []}, "/anyOf"),
    ({"enum": []}, "/enum"),
    ({"enum": list(range(MAX_ENUM_VALUES + 1))}, f"/enum/{MAX_ENUM_VALUES}"),
    ({"const": 2**53}, "/const"),
    ({"const": [0.1234567890123456789]}, "/const/0"),
    ({"const": "\x01"}, "/const"),
    ({"minimum": "1"}, "/minimum"),
    ({"minimum": 2**60}, ""),
    ({"multipleOf": 0}, "/multipleOf"),
    ({"multipleOf": 5_001}, "/multipleOf"),
    ({"multipleOf": 0.01, "minimum": 1e14}, ""),
    ({"multipleOf": 123.456}, "/multipleOf"),
    ({"allOf": [{"multipleOf": 997}, {"multipleOf": 1_009}]}, "/allOf/1/multipleOf"),
    ({"maxLength": -1}, "/maxLength"),
    ({"maxItems": 10**9}, "/maxItems"),
    ({"minLength": 1.5}, "/minLength"),
    ({"minProperties": 2}, "/minProperties"),
    ({"pattern": "(?=a)"}, "/pattern"),
    ({"patternProperties": {"(": {}}}, "/patternProperties/("),
    ({"patternProperties": {"a": {"const": 1}, "(?:a)": {"const": 2}}}, "/patternProperties/(?:a)"),
    ({"format": "ipvfuture"}, "/format"),
    ({"$ref": "other.json"}, "/$ref"),
    ({"$ref": "#name"}, "/$ref"),
    ({"$ref": "#/$defs/none"}, "/$ref"),
    ({"$ref": "#/a%20b", "a b": {}}, "/$ref"),
    ({"$schema": "http://json-schema.org/draft-04/schema#"}, "/$schema"),
    ({"properties": {"a": {"$id": "x"}}}, "/properties/a/$id"),
    ({"items": [{}]}, "/items"),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "/prefixItems"),
    (deep(40), "/items" * 33),
    ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}, ""),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, ""),
    ([], ""),
    ("string", ""),
]


@pytest.mark.parametrize(("schema", "pointer"), REFUSED, ids=[str(pointer)[:40] for _, pointer in REFUSED])
def test_refusals_name_the_place(schema, pointer):
    with pytest.raises(SchemaError) as caught:
        normalized(schema)
    assert caught.value.pointer == pointer
    keyword = pointer.rpartition("/")[2]
    if keyword in UNSUPPORTED:
        assert f"'{keyword}'" in str(caught.value)


# Answers that llguidance takes for these schemas as they stand, though they break them.
FAULTS = [
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0"),
    ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0"),
    ({"properties": {"a": {"type": "integer"}}, "type": "object"}, '{"\\u0061":"x"}'),
    ({"type": "string", "pattern": "^a.b$"}, '"a\\rb"'),
    ({"type": "string", "pattern": "^[a&&b]$", "maxLength": 0}, '""'),
    ({"type": "object", "minProperties": 2}, '{"a":1,"a":1}'),
    ({"type": "string", "format": "date"}, '"2023-02-29"'),
    ({"type": "string", "format": "date-time"}, '"2023-02-29T00:00:00Z"'),
    ({"not": {"type": "null"}, "x-guidance": {"lenient": True}}, "null"),
    ({"const": 9007199254740993}, "9007199254740992"),
    ({"nullable": False, "dependencies": 3, "unknown": 1}, "null"),
]


@pytest.mark.parametrize(("schema", "answer"), FAULTS)
def test_what_llguidance_alone_gets_wrong(schema, answer):
    try:
        text = grammar(schema)
    except GrammarError:
        return
    assert not accepts(text, answer)


def test_at_least_one_fault_is_llguidances_own():
    """Or the above would test nothing."""
    alone = [llguidance.LLMatcher.grammar_from_json_schema(schema) for schema, _ in FAULTS]
    assert sum(accepts(text, answer) for text, (_, answer) in zip(alone, FAULTS, strict=True)) >= 7


@pytest.mark.parametrize(
    ("schema", "answers"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.1", "0.5", "0.000001"]),
        ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}, ["4", "5"]),
        ({"type": "integer", "minimum": -(2**63)}, ["-7", "123456789012345678901"]),
        ({"type": "integer", "format": "int32"}, ["-2147483647", "2147483647"]),
        ({"type": "object", "additionalProperties": False}, ["{}", "{ }"]),
        ({}, ["null", "6.02e23", '[{"a":[1]}]']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"', '"1999-12-31"']),
        ({"enum": ["é", 'q"', 1, 1.5, None, {"a": []}]}, ['"é"', '"q\\""', "1", "1.5", "null", '{"a":[]}']),
    ],
)
def test_what_satisfies_a_schema_can_be_written(schema, answers):
    for answer in answers:
        assert accepts(grammar(schema), answer), answer
        assert jsonschema_rs.is_valid(schema, json.loads(answer))


def test_annotations_change_nothing():
    plain = {"type": "object", "properties": {"a": {"type": "string"}}}
    noted = {
        "title": "T",
        "description": "d",
        "x-order": 1,
        "$comment": "c",
        "type": "object",
        "properties": {"a": {"type": "string", "examples": ["b"], "deprecated": True, "default": 1}},
    }
    assert normalized(noted) == normalized(plain)


def test_the_walk_is_bounded():
    wide = {"anyOf": [{"const": i} for i in range(json_schema.MAX_SUBSCHEMAS + 1)]}
    with pytest.raises(SchemaError, match="more than"):
        normalized(wide)
    long = {"properties": {"a" * json_schema.MAX_CHARACTERS: {}, "b": {}}}
    with pytest.raises(SchemaError, match="characters"):
        normalized(long)
