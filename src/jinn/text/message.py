"""An assistant's message, in the parts that it arrives in, and whole, as the fold of the parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. Its arguments follow, before any other call starts."""

    index: int  # 0, 1, … in order
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments, which together are JSON, unless the model wrote no JSON or was cut."""

    index: int
    fragment: str


Part = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments


@dataclass(slots=True)
class ToolCall:
    """A whole call; `arguments` is text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class AssistantMessage:
    """What a message says so far."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, part: Part) -> None:
        if isinstance(part, ContentDelta):
            self.content += part.text
        elif isinstance(part, ReasoningDelta):
            self.reasoning += part.text
        elif isinstance(part, ToolCallStart):
            self.tool_calls.append(ToolCall(part.id, part.name))
        else:
            self.tool_calls[part.index].arguments += part.fragment


def merge(parts: Iterable[Part]) -> list[Part]:
    """The same parts, with neighbours that continue each other as one."""
    merged: list[Part] = []
    texts: list[str] = []
    for part in parts:
        if isinstance(part, ToolCallStart):
            _close(merged, texts)
            merged.append(part)
            continue
        if not (texts and _continues(merged[-1], part)):
            _close(merged, texts)
            merged.append(part)
        texts.append(part.fragment if isinstance(part, ToolCallArguments) else part.text)
    _close(merged, texts)
    return merged


def _continues(last: Part, part: Part) -> bool:
    if isinstance(last, ToolCallArguments) and isinstance(part, ToolCallArguments):
        return last.index == part.index
    return type(last) is type(part)


def _close(merged: list[Part], texts: list[str]) -> None:
    """Give the last part the whole of its text."""
    if len(texts) > 1:
        last, text = merged[-1], "".join(texts)
        merged[-1] = (
            ToolCallArguments(last.index, text)
            if isinstance(last, ToolCallArguments)
            else (
                type(last)(text)  # type: ignore[call-arg,arg-type]
            )
        )
    texts.clear()
