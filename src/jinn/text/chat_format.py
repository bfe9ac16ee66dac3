"""What a model's chats have beyond their template: thoughts, tool calls, and what switches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinn.text.message_parser import MessageParser
from jinn.text.reasoning import ReasoningFormat, ReasoningParser, find_reasoning_format
from jinn.text.template import ChatTemplate
from jinn.text.tokenizer import Tokenizer
from jinn.text.tool_formats.calls import Tool, ToolFormat
from jinn.text.tools import TOOL_FORMATS, ToolParser, find_tool_format

ThinkingIds = tuple[int | None, int | None] | None
"""The ids of the tags around thoughts, the opening one's where the answer may yet begin with it; None where
the answer begins with thoughts that end with no token of their own."""
NO_THINKING: ThinkingIds = (None, None)

_THINKING_SWITCHES = ("enable_thinking", "thinking")  # Qwen's and DeepSeek's


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The conventions of one model.

    Attributes:
        reasoning: None where the model never thinks.
        tools: None where the template shows no calls.
        thinking_switch: the template's variable that turns thoughts on and off; None where it has none.
        variables: all that the template reads besides the conversation.
    """

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    thinking_switch: str | None = None
    variables: frozenset[str] = frozenset()

    @classmethod
    def of(cls, template: ChatTemplate | None, tool_format: str = "auto") -> ChatFormat:
        """What the template shows; `tool_format` names another format, or `none`. Raises ValueError."""
        if tool_format not in ("auto", "none", *TOOL_FORMATS):
            known = ", ".join(("auto", "none", *TOOL_FORMATS))
            raise ValueError(f"tool_format must be one of {known}, not {tool_format!r}")
        if template is None:
            return cls()
        is_auto = tool_format == "auto"
        tools = find_tool_format(template.text) if is_auto else TOOL_FORMATS.get(tool_format)
        switch = next((name for name in _THINKING_SWITCHES if name in template.variables), None)
        return cls(find_reasoning_format(template.text), tools, switch, template.variables)

    def is_thinking(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, is_continued: bool) -> bool:
        """Whether the prompt leaves the model in its thoughts; see `ReasoningFormat.is_open`."""
        if self.reasoning is None:
            return False
        tags = (self.reasoning.start, self.reasoning.end)
        tag_ids = {tokenizer.added_tokens[tag].id for tag in tags if tag in tokenizer.added_tokens}
        start = len(prompt_ids)
        control_ids = tokenizer.special_ids - tag_ids
        while start and prompt_ids[start - 1] not in control_ids:
            start -= 1
        end = tokenizer.decode(prompt_ids[start:], skip_special=False)
        return self.reasoning.is_open(end, is_continued=is_continued)

    def thinking_ids(self, tokenizer: Tokenizer, *, is_thinking: bool, is_wanted: bool | None) -> ThinkingIds:
        """See `ThinkingIds`; `is_wanted` is what was said of thoughts, if anything."""
        if self.reasoning is None or (is_wanted is False and not is_thinking):
            return NO_THINKING
        tag_ids = self.reasoning.tag_ids(tokenizer)
        if tag_ids is None:
            return None if is_thinking else NO_THINKING
        start_id, end_id = tag_ids
        return (None if is_thinking else start_id), end_id

    def parser_factory(
        self, tools: Sequence[Tool], *, is_thinking: bool, parallel: bool = True, come_first: bool = False
    ) -> Callable[[], MessageParser]:
        """Makes what reads an answer; calls are read, as `ToolParser` says, only where there are tools."""

        def make_parser() -> MessageParser:
            return MessageParser(
                ReasoningParser(self.reasoning, is_open=is_thinking) if self.reasoning else None,
                ToolParser(self.tools, tools, parallel=parallel, come_first=come_first)
                if self.tools and tools
                else None,
            )

        return make_parser
