r"""DeepSeek's calls, written with control tokens.

V3, R1: `BEGIN_ALL BEGIN function SEP NAME\n```json\nARGUMENTS\n``` END … END_ALL`, a line for each call.
V3.1: `BEGIN_ALL BEGIN NAME SEP ARGUMENTS END … END_ALL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinn.text.cursor import Steps, Tags, Wait, each
from jinn.text.message import ContentDelta
from jinn.text.tool_formats.calls import CallReader, CallsShape, Json, Tool


def _token(name: str) -> str:
    return f"<\uff5ctool▁{name}\uff5c>"


_CALLS, _CALLS_END = _token("calls▁begin"), _token("calls▁end")
_CALL, _CALL_END = _token("call▁begin"), _token("call▁end")
_SEP = _token("sep")
_FENCE, _FENCE_END = "\n```json\n", "\n```"


@dataclass(frozen=True, slots=True)
class DeepSeekFormat:
    """Arguments go out as they come, up to the token that ends them."""

    name: str
    has_fence: bool
    openings = Tags(_CALLS)
    control_texts = (_CALLS, _CALLS_END, _CALL, _CALL_END, _SEP)

    def is_shown_in(self, template: str) -> bool:
        return _CALLS in template and ("```json" in template) == self.has_fence

    def read(self, calls: CallReader, opening: str) -> Steps[None]:
        num_before = calls.num_started
        while (name := (yield from self._header(calls))) is not None:
            yield calls.start(name)
            tag = yield from each(calls.arguments, calls.cursor.until(_ENDS[self.has_fence]))
            calls.end()
            if not tag:
                return
        if calls.num_started == num_before:
            yield ContentDelta(opening)
        else:
            yield from calls.cursor.space()
            yield from calls.cursor.literal(_CALLS_END)

    def shape(self, tools: Sequence[Tool]) -> CallsShape:
        calls = {}
        for tool in tools:
            head = f"function{_SEP}{tool.name}{_FENCE}" if self.has_fence else f"{tool.name}{_SEP}"
            tail = _FENCE_END if self.has_fence else ""
            calls[tool.name] = (f"{_CALL}{head}", Json(tool.parameters), f"{tail}{_CALL_END}")
        return CallsShape(_CALLS, calls, "\n" if self.has_fence else "", _CALLS_END)

    def _header(self, calls: CallReader) -> Wait[str | None]:
        """Step up to the arguments, and return the name; where no call comes, stay, and return None."""
        calls.cursor.mark()
        yield from calls.cursor.space()
        name = yield from self._name(calls)
        if name is None:
            calls.cursor.rewind()
        calls.cursor.unmark()
        return name

    def _name(self, calls: CallReader) -> Wait[str | None]:
        before, after = (f"{_CALL}function{_SEP}", _FENCE) if self.has_fence else (_CALL, _SEP)
        if not (yield from calls.cursor.literal(before)):
            return None
        chars: list[str] = []
        while not calls.cursor.is_far:
            if (yield from calls.cursor.peek()) in ("", after[0]):
                is_complete = yield from calls.cursor.literal(after)
                return "".join(chars) if chars and is_complete else None
            chars.append((yield from calls.cursor.take()))
        return None


_ENDS = (Tags(_CALL_END), Tags(_CALL_END, f"{_FENCE_END}{_CALL_END}"))
