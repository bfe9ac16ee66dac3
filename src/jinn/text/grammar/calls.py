"""Answers that are tool calls, in the format of a model's family, as llguidance's grammars."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinn.text.grammar.json_schema import SchemaError, escape_pointer
from jinn.text.tool_formats.calls import CallsShape, FreeText, Json, Maybe, Piece, Tool
from jinn.text.tools import TOOL_FORMATS

WriteSchema = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes of a JSON schema the one that goes into a grammar. Raises SchemaError."""


def calls_grammar(value: Mapping[str, Any], write_schema: WriteSchema) -> str:
    """One call, or with `parallel` several, of `tools` (their parameters by name) in a `format`.

    Raises SchemaError, whose pointer begins with the tool's name.
    """
    tools = [Tool(name, {"type": "object", **parameters}) for name, parameters in value["tools"].items()]
    shape = TOOL_FORMATS[value["format"]].shape(tools)
    return _Writer(write_schema).write(shape, is_parallel=value["parallel"])


class _Writer:
    """Writes one grammar: Lark for the frame of the calls, a JSON schema for each value within."""

    def __init__(self, write_schema: WriteSchema) -> None:
        self._write_schema = write_schema
        self._rules: list[str] = []
        self._grammars: list[dict[str, Any]] = []

    def write(self, shape: CallsShape, *, is_parallel: bool) -> str:
        call = self._rule(" | ".join([self._call(name, pieces) for name, pieces in shape.calls.items()]))
        more = f"({_literal(shape.separator)} {call})*" if is_parallel else ""
        start = f"start: {_literal(shape.begin)} {call} {more} {_literal(shape.end)}"
        lark = {"lark_grammar": "\n".join((start, *self._rules))}
        return json.dumps({"grammars": [lark, *self._grammars]})

    def _call(self, name: str, pieces: Sequence[Piece]) -> str:
        try:
            return self._rule(self._sequence(pieces))
        except SchemaError as error:
            raise SchemaError(f"/{escape_pointer(name)}{error.pointer}", error.message) from None

    def _rule(self, body: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _sequence(self, pieces: Sequence[Piece]) -> str:
        written, taken = [], ""  # of the next literal, as the end of a text
        for piece in pieces:
            if isinstance(piece, str):
                written.append(_literal(piece.removeprefix(taken)))
            elif isinstance(piece, Maybe):
                written.append(f"({self._sequence(piece.pieces)})?")
            elif isinstance(piece, FreeText):
                written.append(self._text(piece))
            else:
                written.append(self._value(piece))
            is_text = isinstance(piece, FreeText) and _options(piece.schema) is None
            taken = piece.end if isinstance(piece, FreeText) and is_text else ""
        return " ".join(written)

    def _value(self, piece: Json) -> str:
        name = f"j{len(self._grammars)}"
        self._grammars.append({"name": name, "json_schema": self._write_schema(dict(piece.schema))})
        return f"@{name}"

    def _text(self, piece: FreeText) -> str:
        """Any text up to the first end, and that; or, without it, one of the strings that are listed."""
        if (options := _options(piece.schema)) is not None:
            return f"({' | '.join(map(_literal, options))})"
        name = f"t{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: {name.upper()}\n{name.upper()}: /(?s:.*)/ {_literal(piece.end)}")
        return name


def _options(schema: Mapping[str, Any]) -> list[str] | None:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else None


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
