"""Answers that are tool calls, in the format of a model's family, as llguidance's grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinn.text.grammar.json_schema import SchemaError, escape_pointer
from jinn.text.tool_formats.calls import CallsShape, FreeText, Json, Maybe, Piece, Tool
from jinn.text.tools import TOOL_FORMATS

WriteSchema = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes of a JSON schema the one that goes into a grammar. Raises SchemaError."""


@dataclass(frozen=True, slots=True)
class CallsWanted:
    """What an answer may call, in a form that JSON holds.

    Attributes:
        format: the name of a `ToolFormat`.
        tools: the JSON schemas of the arguments, by name.
        is_parallel: several calls may come, not one.
        control_texts: the texts of the format that are control tokens of the model.
        content: what may stand in the place of calls: nothing where it is None, any text, before calls too,
            where it is empty, else what this grammar, as text, describes.
    """

    format: str
    tools: Mapping[str, dict[str, Any]]
    is_parallel: bool = True
    control_texts: Sequence[str] = ()
    content: str | None = None


def calls_grammar(wanted: CallsWanted, write_schema: WriteSchema) -> str:
    """The grammar. Raises SchemaError, whose pointer begins with the tool's name."""
    tools = [Tool(name, {"type": "object", **parameters}) for name, parameters in wanted.tools.items()]
    tool_format = TOOL_FORMATS[wanted.format]
    writer = _Writer(write_schema, wanted.control_texts)
    return writer.write(tool_format.shape(tools), tool_format.openings.texts, wanted)


class _Writer:
    """Writes one grammar: Lark for the frame of the calls, a JSON schema for each value within."""

    def __init__(self, write_schema: WriteSchema, control_texts: Sequence[str]) -> None:
        self._write_schema = write_schema
        self._control_texts = control_texts
        self._control_pattern = re.compile(f"({'|'.join(map(re.escape, control_texts))})")
        self._rules: list[str] = []
        self._grammars: list[dict[str, Any]] = []

    def write(self, shape: CallsShape, openings: Sequence[str], wanted: CallsWanted) -> str:
        first, between, cut = shape.begin, shape.separator, ""
        if not first:  # then each call begins with the opening
            first = cut = openings[0]
            between += cut
        call = self._rule(" | ".join([self._call(name, cut, pieces) for name, pieces in shape.calls.items()]))
        more = f"({self._literal(between)} {call})*" if wanted.is_parallel else ""
        calls = f"{call} {more} {self._literal(shape.end)}"
        if wanted.content is None:
            start = f"{self._literal(first)} {calls}"
        elif wanted.content:
            self._grammars.append({"name": "content", **_as_part(wanted.content)})
            start = f"@content | {self._literal(first)} {calls}"
        else:
            start = f"{self._plain_text(openings)} | {self._up_to(first)} {calls}"
        lark = {"lark_grammar": "\n".join((f"start: {start}", *self._rules))}
        return json.dumps({"grammars": [lark, *self._grammars]})

    def _plain_text(self, openings: Sequence[str]) -> str:
        """Text without a call: one of the openings would begin it."""
        spelled = "|".join(re.escape(text) for text in openings if text not in self._control_texts)
        self._rules.append("text: TEXT\nTEXT: /(?s:.*)/" + (f" & ~/(?s:.*({spelled}).*)/" if spelled else ""))
        return "text"

    def _up_to(self, opening: str) -> str:
        """Plain text, and the opening of the first call."""
        if opening in self._control_texts:
            return f"text {self._literal(opening)}"
        self._rules.append(f"head[lazy]: HEAD\nHEAD: TEXT {self._literal(opening)}")
        return "head"

    def _call(self, name: str, cut: str, pieces: Sequence[Piece]) -> str:
        """A call without its first text `cut`."""
        first, *rest = pieces
        try:
            return self._rule(self._sequence([str(first).removeprefix(cut), *rest]))
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
                written.append(self._literal(piece.removeprefix(taken)))
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
            return f"({' | '.join(map(self._literal, options))})"
        name = f"t{len(self._rules)}"
        end = self._literal(piece.end)
        self._rules.append(f"{name}[lazy]: {name.upper()}\n{name.upper()}: /(?s:.*)/ {end}")
        return name

    def _literal(self, text: str) -> str:
        """The text, its control tokens bare: so llguidance takes them for the tokens."""
        pieces = self._control_pattern.split(text) if self._control_texts else [text]
        named = [p if p in self._control_texts else json.dumps(p, ensure_ascii=False) for p in pieces if p]
        return " ".join(named) or '""'


def _options(schema: Mapping[str, Any]) -> list[str] | None:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else None


def _as_part(text: str) -> dict[str, Any]:
    """A grammar's text as one grammar of several."""
    if not text.startswith("{"):
        return {"lark_grammar": text}
    (grammar,) = json.loads(text)["grammars"]
    return dict(grammar)
