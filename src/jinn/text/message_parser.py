"""From a model's output to the parts of its message: thoughts first, then content and calls."""

from __future__ import annotations

from jinn.text.message import ContentDelta, Part
from jinn.text.reasoning import ReasoningParser
from jinn.text.tools import ToolParser


class MessageParser:
    """Reads one output. Without parsers of its parts, all of it is content.

    Attributes:
        num_calls: tool calls that have started.
        is_reasoning: what comes next belongs to the thoughts.
        is_finished: nothing more is read.
        control_texts: control tokens whose text must be in what is pushed.
    """

    def __init__(self, reasoning: ReasoningParser | None = None, tools: ToolParser | None = None) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self.control_texts = (
            *(() if reasoning is None else reasoning.control_texts),
            *(() if tools is None else tools.control_texts),
        )

    @property
    def num_calls(self) -> int:
        return 0 if self._tools is None else self._tools.num_calls

    @property
    def is_reasoning(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_reasoning

    @property
    def is_finished(self) -> bool:
        return self._tools is not None and self._tools.is_finished

    def push(self, text: str) -> list[Part]:
        """What `text` completes."""
        if self._reasoning is None:
            return self._answer([ContentDelta(text)] if text else [])
        return self._answer(self._reasoning.push(text))

    def flush(self) -> list[Part]:
        """What was held back, at the end of the output."""
        parts = self._answer([] if self._reasoning is None else self._reasoning.flush())
        return parts if self._tools is None else [*parts, *self._tools.flush()]

    def _answer(self, parts: list[Part]) -> list[Part]:
        """The parts with their content split into content and calls."""
        if self._tools is None:
            return parts
        split: list[Part] = []
        for part in parts:
            split += self._tools.push(part.text) if isinstance(part, ContentDelta) else (part,)
        return split
