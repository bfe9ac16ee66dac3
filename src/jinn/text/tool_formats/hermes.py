r"""`<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`: Qwen2.5, Qwen3, Qwen3-Next, Hermes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinn.text.cursor import Steps, Tags, Wait, collect, each
from jinn.text.message import ContentDelta
from jinn.text.tool_formats.calls import CallReader, CallsShape, Json, Tool
from jinn.text.tool_formats.json_text import parse_json, write_json

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_ARGUMENT_KEYS = ("arguments", "parameters")

_EITHER = Tags(_OPEN, _CLOSE)
_CLOSING = Tags(_CLOSE)
_OUTSIDE_STRINGS = Tags("{", "}", "[", "]", '"', _CLOSE)
_INSIDE_STRINGS = Tags('"', "\\", f"\n{_CLOSE}")  # JSON has no bare line break inside a string


class HermesFormat:
    """Arguments go out as they come. Their end is found by brackets, so a string may hold any tag.

    A call whose name does not come first, or whose arguments are no object, is read once it is whole.
    """

    name = "hermes"
    openings = Tags(_OPEN)
    control_texts = ()

    def is_shown_in(self, template: str) -> bool:
        return _OPEN in template and "<function=" not in template

    def read(self, calls: CallReader, opening: str) -> Steps[None]:
        while opening == _OPEN:
            calls.cursor.mark()
            name = yield from self._header(calls)
            if name is None:
                calls.cursor.rewind()
                yield from self._read_whole(calls)
                return
            calls.cursor.unmark()
            yield calls.start(name)
            is_whole = yield from self._arguments(calls)
            calls.end()
            if not is_whole:
                return
            yield from calls.cursor.space()
            yield from calls.cursor.literal("}")
            yield from calls.cursor.space()
            opening = yield from each(ContentDelta, calls.cursor.until(_EITHER))

    def shape(self, tools: Sequence[Tool]) -> CallsShape:
        calls = {
            tool.name: (
                f'{_OPEN}\n{{"name": {write_json(tool.name)}, "arguments": ',
                Json(tool.parameters),
                f"}}\n{_CLOSE}",
            )
            for tool in tools
        }
        return CallsShape("", calls, "\n", "")

    def _header(self, calls: CallReader) -> Wait[str | None]:
        """Step up to the brace of the arguments, and return the name; None for anything unusual."""
        cursor = calls.cursor
        for text in ("{", '"name"', ":"):
            yield from cursor.space()
            if not (yield from cursor.literal(text)):
                return None
        yield from cursor.space()
        name = yield from self._string(calls)
        yield from cursor.space()
        if not name or not (yield from cursor.literal(",")):
            return None
        yield from cursor.space()
        if (yield from self._string(calls)) not in _ARGUMENT_KEYS:
            return None
        yield from cursor.space()
        if not (yield from cursor.literal(":")):
            return None
        yield from cursor.space()
        is_usual = (yield from cursor.peek()) == "{" and not cursor.is_far
        return name if is_usual else None

    def _string(self, calls: CallReader) -> Wait[str | None]:
        """Step over a JSON string, and return its value; None where there is none."""
        if not (yield from calls.cursor.literal('"')):
            return None
        raw = ['"']
        while not calls.cursor.is_far:
            char = yield from calls.cursor.take()
            raw.append(char)
            if char == "\\":
                raw.append((yield from calls.cursor.take()))
            elif char in ('"', ""):
                break
        try:
            return str(parse_json("".join(raw)))
        except ValueError:
            return None

    def _arguments(self, calls: CallReader) -> Steps[bool]:
        """Read an object. Returns whether it was whole when the call, or the text, ended."""
        depth = 0
        tags = _OUTSIDE_STRINGS
        while True:
            tag = yield from each(calls.arguments, calls.cursor.until(tags))
            if tag.endswith(_CLOSE) or not tag:
                return False
            yield calls.arguments(tag)
            if tag == "\\":
                yield calls.arguments((yield from calls.cursor.take()))
            elif tag == '"':
                tags = _OUTSIDE_STRINGS if tags is _INSIDE_STRINGS else _INSIDE_STRINGS
            else:
                depth += 1 if tag in "{[" else -1
                if not depth:
                    return True

    def _read_whole(self, calls: CallReader) -> Steps[None]:
        body, tag = yield from collect(calls.cursor.until(_CLOSING))
        call = _call(body)
        if call is None:
            yield ContentDelta(_OPEN + body + tag)
            return
        name, arguments = call
        yield calls.start(name)
        yield calls.arguments(arguments)
        calls.end()


def _call(body: str) -> tuple[str, str] | None:
    """The name, and the arguments as JSON, of a whole call; None where it is none."""
    try:
        call = parse_json(body)
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or not name:
            return None
        arguments: Any = next((call[key] for key in _ARGUMENT_KEYS if key in call), {})
        if isinstance(arguments, str):  # JSON within JSON
            return name, arguments
        return (name, write_json(arguments)) if isinstance(arguments, dict) else None
    except (ValueError, RecursionError):
        return None
