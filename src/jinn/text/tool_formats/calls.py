"""What the formats of tool calls share: the tools, the calls that are read, and the shape of a call."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jinn.text.cursor import Cursor, Steps, Tags
from jinn.text.message import ToolCallArguments, ToolCallStart
from jinn.text.tool_formats.parameter_types import parameter_types


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_definition(cls, definition: Mapping[str, Any]) -> Tool:
        """From OpenAI's form, `{"type": "function", "function": {…}}`."""
        function = definition["function"]
        return cls(function["name"], function.get("parameters") or {})


class ToolFormat(Protocol):
    """A family's way to write calls.

    Attributes:
        name: in settings.
        openings: texts that may begin a call.
        control_texts: the control tokens that calls are written with, whose text the reader needs.
    """

    @property
    def name(self) -> str: ...

    @property
    def openings(self) -> Tags: ...

    @property
    def control_texts(self) -> tuple[str, ...]: ...

    def is_shown_in(self, template: str) -> bool:
        """Whether a chat template writes calls in this format."""
        ...

    def read(self, calls: CallReader, opening: str) -> Steps[None]:
        """Read on after an opening, until its calls are over. What is no call is content, tags and all."""
        ...

    def shape(self, tools: Sequence[Tool]) -> CallsShape:
        """What well-formed calls of these tools look like."""
        ...


class CallReader:
    """The text of calls, and what they have in common: numbers, ids and the tools that there are."""

    def __init__(self, cursor: Cursor, tools: Sequence[Tool], make_id: Callable[[], str]) -> None:
        self.cursor = cursor
        self.tools = {tool.name: tool for tool in tools}
        self.num_started = 0
        self.num_ended = 0
        self._make_id = make_id
        self._types: dict[tuple[str, str], frozenset[str]] = {}

    def start(self, name: str) -> ToolCallStart:
        self.num_started += 1
        return ToolCallStart(self.num_started - 1, self._make_id(), name)

    def parameter_types(self, tool_name: str, parameter: str) -> frozenset[str]:
        """See parameter_types.py; empty where there is no such tool."""
        key = (tool_name, parameter)
        if key not in self._types:
            tool = self.tools.get(tool_name)
            self._types[key] = parameter_types(tool.parameters, parameter) if tool else frozenset()
        return self._types[key]

    def arguments(self, fragment: str) -> ToolCallArguments:
        """More arguments of the call that was started last."""
        return ToolCallArguments(self.num_started - 1, fragment)

    def end(self) -> None:
        """No more arguments come for the call that was started last."""
        self.num_ended += 1


def make_call_id() -> str:
    """An id that no other call of any conversation has."""
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Json:
    """A JSON value that the schema describes."""

    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FreeText:
    """A string, written bare: any text up to `end`, which follows it. The schema may narrow it."""

    end: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Maybe:
    """What may be left out."""

    pieces: tuple[Piece, ...]


Piece = str | Json | FreeText | Maybe


@dataclass(frozen=True, slots=True)
class CallsShape:
    """One or more calls: `begin`, calls with `separator` between them, `end`.

    Attributes:
        calls: of each tool by name, the pieces of a call, one after the other.
    """

    begin: str
    calls: Mapping[str, tuple[Piece, ...]]
    separator: str
    end: str
