r"""The calls of Qwen3-Coder and Qwen3.5.

`<tool_call>\n<function=NAME>\n<parameter=P>\nVALUE\n</parameter>\n</function>\n</tool_call>`. A value is bare
text between its line breaks. Whether it is a string or JSON, the tool's schema says.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinn.text.cursor import Steps, Tags, Wait, collect, each
from jinn.text.message import ContentDelta
from jinn.text.tool_formats.calls import (
    CallReader,
    CallsShape,
    FreeText,
    Json,
    Maybe,
    Piece,
    Tool,
)
from jinn.text.tool_formats.json_text import write_json
from jinn.text.tool_formats.parameter_types import parameter_json, parameter_types

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"

_BETWEEN = Tags(_PARAMETER, _FUNCTION_END, _CLOSE)
_VALUE_END = Tags(_PARAMETER_END, f"\n{_PARAMETER_END}")
_STRING = frozenset(("string",))


class QwenXmlFormat:
    """Strings go out as they come, other values once they are whole.

    These models at times leave `<tool_call>` out, so the function tag begins a call too if it names a tool.
    """

    name = "qwen_xml"
    openings = Tags(_OPEN, _FUNCTION)
    control_texts = ()

    def is_shown_in(self, template: str) -> bool:
        return _FUNCTION in template

    def read(self, calls: CallReader, opening: str) -> Steps[None]:
        while opening:
            calls.cursor.mark()
            name = yield from self._name(calls, opening)
            if name is None:
                calls.cursor.rewind()
                yield ContentDelta(opening)
                return
            calls.cursor.unmark()
            yield calls.start(name)
            yield from self._arguments(calls, name)
            calls.end()
            yield from calls.cursor.space()
            opening = _FUNCTION if (yield from calls.cursor.literal(_FUNCTION)) else ""
        yield from calls.cursor.literal(_CLOSE)

    def shape(self, tools: Sequence[Tool]) -> CallsShape:
        return CallsShape("", {tool.name: tuple(self._pieces(tool)) for tool in tools}, "\n", "")

    def _pieces(self, tool: Tool) -> list[Piece]:
        properties = tool.parameters.get("properties") or {}
        pieces: list[Piece] = [f"{_OPEN}\n{_FUNCTION}{tool.name}>\n"]
        for name, schema in properties.items():
            end = f"\n{_PARAMETER_END}\n"
            types = parameter_types(tool.parameters, name)
            value: Piece = Json(schema) if types and "string" not in types else FreeText(end, schema)
            parameter = (f"{_PARAMETER}{name}>\n", value, end)
            is_required = name in (tool.parameters.get("required") or ())
            pieces += parameter if is_required else [Maybe(parameter)]
        return [*pieces, f"{_FUNCTION_END}\n{_CLOSE}"]

    def _name(self, calls: CallReader, opening: str) -> Wait[str | None]:
        if opening == _OPEN:
            yield from calls.cursor.space()
            if not (yield from calls.cursor.literal(_FUNCTION)):
                return None
        name = yield from _attribute(calls)
        return name if opening == _OPEN or name in calls.tools else None

    def _arguments(self, calls: CallReader, name: str) -> Steps[None]:
        """Read the parameters as a JSON object, which stays open where the text ends before the call."""
        separator = "{"
        while True:
            tag = yield from each(ContentDelta, calls.cursor.until(_BETWEEN))
            if tag != _PARAMETER:
                break
            calls.cursor.mark()
            parameter = yield from _attribute(calls)
            if parameter is None:
                calls.cursor.rewind()
                yield ContentDelta(_PARAMETER)
                continue
            calls.cursor.unmark()
            yield calls.arguments(f"{separator}{write_json(parameter)}: ")
            if not (yield from self._value(calls, calls.parameter_types(name, parameter))):
                return
            separator = ", "
        if tag:
            yield calls.arguments("{}" if separator == "{" else "}")

    def _value(self, calls: CallReader, types: frozenset[str]) -> Steps[bool]:
        """Read a value. Returns whether its end was reached."""
        yield from calls.cursor.literal("\n")
        texts = calls.cursor.until(_VALUE_END)
        if types and types != _STRING:
            text, tag = yield from collect(texts)
            yield calls.arguments(parameter_json(text, types))
            return bool(tag)
        yield calls.arguments('"')
        tag = yield from each(lambda text: calls.arguments(_escaped(text)), texts)
        if tag:
            yield calls.arguments('"')
        return bool(tag)


def _attribute(calls: CallReader) -> Wait[str | None]:
    """Step over `NAME>`, and return the name; None where it is none."""
    chars: list[str] = []
    while not calls.cursor.is_far:
        char = yield from calls.cursor.take()
        if char == ">":
            return "".join(chars).strip() or None
        if char in ("", "\n", "<"):
            return None
        chars.append(char)
    return None


def _escaped(text: str) -> str:
    return write_json(text)[1:-1]
