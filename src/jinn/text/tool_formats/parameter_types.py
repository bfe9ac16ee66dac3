"""Which JSON types a tool's parameter may have, and a parameter's text as one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinn.text.tool_formats.json_text import parse_json, write_json

_MAX_REFERENCES = 64
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def parameter_types(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """The types that the schema of the arguments allows the parameter; empty where it does not say."""
    properties = schema.get("properties")
    declared = properties.get(name) if isinstance(properties, Mapping) else None
    return frozenset(_types(declared, schema, set()))


def parameter_json(text: str, types: frozenset[str]) -> str:
    """The text as JSON of one of `types`, also where it is spelled as in Python; else as a JSON string."""
    try:
        value = _PYTHON_WORDS[text] if text in _PYTHON_WORDS else parse_json(text)
        return write_json(value if _fits(value, types) else text)
    except (ValueError, RecursionError):
        return write_json(text)


def _types(schema: Any, root: Mapping[str, Any], resolved: set[str]) -> set[str]:
    """Each reference is followed once, lest they multiply, and no more than make sense."""
    if not isinstance(schema, Mapping):
        return set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {name for name in declared if isinstance(name, str)}
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(choices, list):
        return {_type_of(value) for value in choices}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in resolved and len(resolved) < _MAX_REFERENCES:
        resolved.add(reference)
        return _types(_resolve(reference, root), root, resolved)
    types: set[str] = set()
    for keyword in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(keyword)
        for branch in branches if isinstance(branches, list) else ():
            types |= _types(branch, root, resolved)
    return types


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """The schema that `#/$defs/…` points at, or None."""
    node: Any = root
    for key in reference.removeprefix("#/").split("/"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "object")


def _fits(value: Any, types: frozenset[str]) -> bool:
    """Where a string is allowed, only null is anything else: `5` may well be meant as text."""
    kind = _type_of(value)
    if "string" in types:
        return kind == "null" and "null" in types
    return kind in types or (kind == "integer" and "number" in types)
