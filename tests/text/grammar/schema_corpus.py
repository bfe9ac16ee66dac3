"""Schemas as people write them: for extraction, agents, forms and records; each must be supported whole."""

from __future__ import annotations

from typing import Any

_STRING = {"type": "string"}


def _record(properties: dict[str, Any], required: list[str] | None = None, **further: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **further,
    }


CORPUS: dict[str, dict[str, Any]] = {
    "weather call": _record(
        {
            "location": {"type": "string", "description": "City and state, e.g. San Francisco, CA"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        ["location"],
    ),
    "steps of a proof": _record(
        {
            "steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}},
            "final_answer": _STRING,
        },
        title="MathReasoning",
        **{"$defs": {"Step": _record({"explanation": _STRING, "output": _STRING}, title="Step")}},
    ),
    "a tree of widgets": _record(
        {
            "type": {"type": "string", "enum": ["div", "button", "header", "section", "field", "form"]},
            "label": _STRING,
            "children": {"type": "array", "items": {"$ref": "#"}},
            "attributes": {"type": "array", "items": _record({"name": _STRING, "value": _STRING})},
        }
    ),
    "a linked list": {
        **_record({"linked_list": {"$ref": "#/$defs/node"}}),
        "$defs": {
            "node": _record(
                {"value": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}
            )
        },
    },
    "a calendar event": _record(
        {
            "name": _STRING,
            "date": {"type": "string", "format": "date"},
            "starts_at": {"type": "string", "format": "date-time"},
            "participants": {"type": "array", "items": _STRING, "minItems": 1, "maxItems": 20},
        }
    ),
    "pydantic's user": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "User",
        "type": "object",
        "properties": {
            "id": {"title": "Id", "type": "integer", "exclusiveMinimum": 0},
            "email": {"title": "Email", "type": "string", "format": "email"},
            "nickname": {"anyOf": [_STRING, {"type": "null"}], "default": None, "title": "Nickname"},
            "role": {"$ref": "#/$defs/Role", "default": "user"},
            "tags": {"type": "array", "items": _STRING, "default": []},
        },
        "required": ["id", "email"],
        "$defs": {"Role": {"enum": ["admin", "user"], "title": "Role", "type": "string"}},
    },
    "pydantic's tagged union": {
        "title": "Shape",
        "oneOf": [{"$ref": "#/$defs/Circle"}, {"$ref": "#/$defs/Square"}],
        "discriminator": {
            "propertyName": "kind",
            "mapping": {"circle": "#/$defs/Circle", "square": "#/$defs/Square"},
        },
        "$defs": {
            "Circle": {
                "type": "object",
                "properties": {"kind": {"const": "circle", "type": "string"}, "radius": {"type": "number"}},
                "required": ["kind", "radius"],
            },
            "Square": {
                "type": "object",
                "properties": {"kind": {"const": "square", "type": "string"}, "side": {"type": "number"}},
                "required": ["kind", "side"],
            },
        },
    },
    "zod's form": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "phone": {"type": "string", "pattern": "^\\+?[1-9]\\d{6,14}$"},
            "website": {"type": "string", "format": "uri"},
            "point": {"type": "array", "items": [{"type": "number"}, {"type": "number"}], "minItems": 2},
        },
        "required": ["age"],
        "additionalProperties": False,
    },
    "an invoice": _record(
        {
            "number": {"type": "string", "pattern": "^INV-[0-9]{6}$"},
            "currency": {"enum": ["EUR", "USD", "CHF"]},
            "lines": {
                "type": "array",
                "minItems": 1,
                "items": _record(
                    {
                        "text": {"type": "string", "minLength": 1, "maxLength": 200},
                        "quantity": {"type": "integer", "minimum": 1},
                        "price": {"type": "number", "minimum": 0, "multipleOf": 0.01},
                    }
                ),
            },
            "paid": {"type": "boolean"},
        }
    ),
    "a map of counts": {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 0},
        "minProperties": 1,
    },
    "names by pattern": {
        "type": "object",
        "patternProperties": {"^[a-z]{2}$": _STRING, "^[A-Z]{3}$": {"type": "number"}},
        "additionalProperties": False,
    },
    "sentiment": _record(
        {
            "sentiment": {"enum": ["positive", "negative", "neutral"]},
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        }
    ),
    "entities": _record(
        {
            "entities": {
                "type": "array",
                "maxItems": 50,
                "items": _record(
                    {
                        "text": _STRING,
                        "label": {"enum": ["PERSON", "ORG", "PLACE"]},
                        "span": {
                            "type": "array",
                            "prefixItems": [
                                {"type": "integer", "minimum": 0},
                                {"type": "integer", "minimum": 0},
                            ],
                            "items": False,
                            "minItems": 2,
                        },
                    }
                ),
            }
        }
    ),
    "extended by allOf": {
        "allOf": [
            {"$ref": "#/definitions/base"},
            {"type": "object", "properties": {"extra": {"type": "boolean"}}, "required": ["extra"]},
        ],
        "definitions": {
            "base": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
        },
    },
    "a network host": _record(
        {
            "host": {
                "anyOf": [{"format": "ipv4", "type": "string"}, {"format": "hostname", "type": "string"}]
            },
            "port": {"type": "integer", "minimum": 1, "maximum": 65535},
            "id": {"type": "string", "format": "uuid"},
        }
    ),
    "escaped references": {
        "type": "object",
        "properties": {"a/b": {"type": "integer"}, "c": {"$ref": "#/properties/a~1b"}},
        "required": ["c"],
        "additionalProperties": False,
    },
    "64-bit bounds": _record(
        {"id": {"type": "integer", "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}}
    ),
}
