"""Anthropic's Messages API's bodies, and the chat request that each stands for."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from jinn.server import errors
from jinn.server.limits import field_arguments
from jinn.server.parameters import Columns, take_implemented
from jinn.server.schemas import TEXT_OR_LIST, joined_text, limited, validate
from jinn.server.structured import Strict
from jinn.server.wire import tool_call_fields

ChatMessage = dict[str, Any]


class _Block(Strict):
    cache_control: dict[str, Any] | None = None  # prompts are matched by content


class TextBlock(_Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Block):
    type: Literal["redacted_thinking"]
    data: str


TextContent = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextBlock], Field(fail_fast=True, **field_arguments("content")), Tag("<list>")],
    TEXT_OR_LIST,
]


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: TextContent = ""
    is_error: bool = False  # said to the model in words, since chat templates know no such thing


_KINDS = ("tool_use", "tool_result", "thinking", "redacted_thinking")


def _block_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in _KINDS else "<block>"


Block = Annotated[
    Annotated[TextBlock, Tag("<block>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")],
    Discriminator(_block_tag),
]

Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[Block], Field(fail_fast=True, **field_arguments("content")), Tag("<list>")],
    TEXT_OR_LIST,
]


class AnthropicMessage(Strict):
    role: Literal["user", "assistant"]
    content: Content


class AnthropicTool(_Block):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    display: Literal["summarized"] | None = None  # thoughts come whole; "omitted" is not supported


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountTokensRequest(Strict):
    model: str = limited("model", "The served name, the file's name, or 'default'.", "default")
    messages: list[AnthropicMessage] = limited("messages", "The conversation.", ...)
    system: TextContent | None = Field(None, description="The system message.")
    tools: list[AnthropicTool] = Field(default=[], description="What the model may call.")
    tool_choice: ToolChoice = Field(
        default_factory=lambda: ToolChoice(type="auto"), description="Whether it must call."
    )
    thinking: Thinking | None = Field(None, description="Whether it thinks first, and how much.")


class MessagesRequest(CountTokensRequest):
    max_tokens: int = limited("max_tokens", "Most tokens of the answer.", ...)
    stream: bool = Field(False, description="Answer with server-sent events.")
    stop_sequences: list[Annotated[str, Field(**field_arguments("stop.string"))]] = limited(
        "stop", "Texts that end the answer; not part of it.", []
    )
    temperature: float | None = limited("temperature", "0 takes the most likely token.")
    top_p: float | None = limited("top_p", "Smallest set of tokens with this probability.")
    top_k: int | None = limited("top_k", "The k most likely tokens.")
    output_config: OutputConfig | None = Field(
        None, description="`format`: what the text must be; `effort`: how much to think, with `thinking`."
    )


ACCEPTED_MESSAGES = {
    "metadata": "names an end user",
    "service_tier": "there is one tier",
    "cache_control": "prompts are matched by content",
    "inference_geo": "there is one place",
}
REFUSED_MESSAGES: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "context_management": (),
}
COLUMNS = Columns(frozenset(MessagesRequest.model_fields), ACCEPTED_MESSAGES, REFUSED_MESSAGES)
COUNT_COLUMNS = Columns(
    frozenset(CountTokensRequest.model_fields),
    {**ACCEPTED_MESSAGES, "output_config": "counts nothing"},
    REFUSED_MESSAGES,
)

# Where a chat request's error lies in this API's body.
_FIELDS = {
    "stop": "stop_sequences",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "thinking_budget": "thinking",
    "reasoning_effort": "output_config.effort",
}
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def parse_messages(body: dict[str, Any], ignored: list[str] | None) -> MessagesRequest:
    """Raises APIError 400. Unknown parameters are collected in `ignored`, or refused where it is None."""
    request = validate(MessagesRequest, take_implemented(body, COLUMNS, "", ignored))
    _check(request)
    return request


def parse_count(body: dict[str, Any], ignored: list[str] | None) -> CountTokensRequest:
    """As `parse_messages`, of what counts."""
    request = validate(CountTokensRequest, take_implemented(body, COUNT_COLUMNS, "", ignored))
    _check(request)
    return request


def _check(request: CountTokensRequest) -> None:
    if request.tool_choice.type == "tool" and request.tool_choice.name is None:
        raise errors.invalid_value("tool_choice.name", "'tool_choice.name' must name a tool.")
    if request.thinking and request.thinking.type == "enabled" and request.thinking.budget_tokens is None:
        raise errors.invalid_value("thinking.budget_tokens", "'thinking.budget_tokens' is needed.")


def to_chat(request: CountTokensRequest) -> dict[str, Any]:
    """The body of the chat request. A conversation that ends with the assistant's words is continued."""
    messages = [m for message in request.messages for m in _chat_messages(message)]
    if request.system:
        messages.insert(0, {"role": "system", "content": joined_text(request.system)})
    body: dict[str, Any] = {"model": request.model, "messages": messages}
    if messages[-1]["role"] == "assistant" and messages[-1].get("content"):
        body["continue_final_message"] = True
    if request.tools:
        body["tools"] = [_chat_tool(tool) for tool in request.tools]
        body["tool_choice"] = _tool_choice(request.tool_choice)
        body["parallel_tool_calls"] = not request.tool_choice.disable_parallel_tool_use
    if request.thinking is not None:
        body["enable_thinking"] = request.thinking.type != "disabled"
        if request.thinking.budget_tokens is not None:
            body["thinking_budget"] = request.thinking.budget_tokens
    if isinstance(request, MessagesRequest):
        body |= _sampling(request)
    return body


def _sampling(request: MessagesRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {"max_tokens": request.max_tokens, "stream": request.stream}
    for name in ("temperature", "top_p", "top_k"):
        if getattr(request, name) is not None:
            fields[name] = getattr(request, name)
    if request.stop_sequences:
        fields["stop"] = request.stop_sequences
    if effort := _effort(request):
        fields["reasoning_effort"] = effort
    if request.output_config and request.output_config.format:
        schema = {"name": "answer", "schema": request.output_config.format.schema_, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _effort(request: MessagesRequest) -> str | None:
    """How much to think, where the model may think; an answer without thoughts has no effort to choose."""
    effort = request.output_config.effort if request.output_config else None
    if effort is None or (request.thinking and request.thinking.type != "disabled"):
        return _EFFORTS.get(effort or "")
    if effort != "high":  # which is the API's own default
        param = "output_config.effort"
        raise errors.unsupported_parameter(param, f"'{param}' is only supported together with 'thinking'.")
    return None


def own_error(error: errors.APIError) -> errors.APIError:
    """An error of the chat request, with its field under this API's name."""
    return errors.renamed(error, _FIELDS)


def _chat_tool(tool: AnthropicTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    for name in ("description", "strict"):
        if getattr(tool, name) is not None:
            function[name] = getattr(tool, name)
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return _TOOL_CHOICES[choice.type]


def _chat_messages(message: AnthropicMessage) -> list[ChatMessage]:
    """Results of tools are messages of their own there, before what the user says beside them."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "assistant":
        return [_assistant_message(message.content)]
    results: list[ChatMessage] = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result_text(block)}
        for block in message.content
        if isinstance(block, ToolResultBlock)
    ]
    texts = [block.text for block in message.content if isinstance(block, TextBlock)]
    return [*results, {"role": "user", "content": "".join(texts)}] if texts or not results else results


def _result_text(block: ToolResultBlock) -> str:
    text = joined_text(block.content)
    return f"Error: {text}" if block.is_error else text


def _assistant_message(blocks: list[Any]) -> ChatMessage:
    """Thoughts that were redacted cannot be read, and are left out."""
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    fields: ChatMessage = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        fields["reasoning_content"] = "".join(thoughts)
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    if calls:
        fields["tool_calls"] = [
            tool_call_fields(call.id, call.name, json.dumps(call.input, ensure_ascii=False)) for call in calls
        ]
    return fields
