"""The forms in which a request may say what its answer must be, as llguidance's grammars.

A grammar is text: Lark, or JSON with a JSON schema in it. Imported only once a request has one.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

from jinn.text.grammar.json_schema import SchemaError, normalized
from jinn.text.grammar.pattern import PatternError, whole

MAX_CHOICES = 1_000
MAX_GRAMMAR_LENGTH = 65_536  # characters

# Between the tokens of JSON, once at each place: a space or two, or a new line and its indent. With more room
# small models write empty lines, or spaces, without end.
_WHITESPACE = r"\x20{1,2}|\x09|\x0D?\x0A(\x20{0,32}|\x09{0,16})"
# Every string has one spelling, so that a name cannot come again in another.
_JSON_OPTIONS = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": 'nrbtf\\"'}

# Lark in which a schema would go unchecked, or a setting unheeded.
_REFUSED_LARK = ("%json", "%llguidance", "%lark", "temperature=")


class GrammarKind(StrEnum):
    """What the value of a grammar is."""

    JSON_SCHEMA = "json_schema"  # an object
    JSON_OBJECT = "json_object"  # nothing: any JSON object will do
    REGEX = "regex"  # a pattern in ECMA-262's syntax that the whole answer matches
    CHOICE = "choice"  # a list of texts
    GRAMMAR = "grammar"  # Lark, or GBNF
    CALLS = "calls"  # the fields of `jinn.text.grammar.calls.CallsWanted`


class GrammarError(ValueError):
    """Why a grammar is refused, and the place in its value: a JSON pointer, empty for the value itself."""

    def __init__(self, message: str, pointer: str = "") -> None:
        super().__init__(message)
        self.pointer = pointer


def grammar_text(kind: GrammarKind, value: Any) -> str:
    """The grammar as llguidance reads it. Raises GrammarError."""
    try:
        return _WRITERS[kind](value)
    except SchemaError as error:
        raise GrammarError(error.message, error.pointer) from None
    except PatternError as error:
        raise GrammarError(f"the pattern is not supported: {error}") from None


def _json_schema(schema: Any) -> str:
    return json.dumps({"grammars": [{"json_schema": _with_options(schema)}]})


def _with_options(schema: Any) -> dict[str, Any]:
    return {**normalized(schema), "x-guidance": _JSON_OPTIONS}


def _json_object(_: Any) -> str:
    return _json_schema({"type": "object"})


def _regex(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise GrammarError("a pattern must be a string")
    return f"start: /{whole(pattern)}/"


def _choice(choices: Any) -> str:
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise GrammarError("the choices must be a list of strings")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise GrammarError(f"there must be 1 to {MAX_CHOICES} choices")
    return "start: " + " | ".join(map(_lark_string, choices))


def _lark_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _grammar(text: Any) -> str:
    if not isinstance(text, str):
        raise GrammarError("a grammar must be a string")
    if not 1 <= len(text) <= MAX_GRAMMAR_LENGTH:
        raise GrammarError(f"a grammar must have 1 to {MAX_GRAMMAR_LENGTH} characters")
    for word in _REFUSED_LARK:
        if word in text:
            raise GrammarError(f"{word!r} is not supported in a grammar")
    if "::=" not in text:
        return text
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # the library raises its own
        raise GrammarError(f"the grammar could not be read: {str(error).splitlines()[0]}") from None


def _calls(value: Any) -> str:
    from jinn.text.grammar.calls import CallsWanted, calls_grammar

    return calls_grammar(CallsWanted(**value), _with_options)


_WRITERS = {
    GrammarKind.JSON_SCHEMA: _json_schema,
    GrammarKind.JSON_OBJECT: _json_object,
    GrammarKind.REGEX: _regex,
    GrammarKind.CHOICE: _choice,
    GrammarKind.GRAMMAR: _grammar,
    GrammarKind.CALLS: _calls,
}
