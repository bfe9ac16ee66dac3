"""The Responses API's bodies, and the chat request that each stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from jinn.server import errors
from jinn.server.limits import field_arguments
from jinn.server.parameters import ACCEPTED, Columns, take_implemented
from jinn.server.schemas import TEXT_OR_LIST, joined_text, limited, validate
from jinn.server.structured import Strict
from jinn.server.wire import tool_call_fields

ChatMessage = dict[str, Any]


class TextContent(Strict):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


ItemContent = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextContent], Field(fail_fast=True, **field_arguments("content")), Tag("<list>")],
    TEXT_OR_LIST,
]


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemContent
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionCallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: ItemContent
    id: str | None = None
    status: str | None = None


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    summary: list[TextContent] | None = None
    content: list[TextContent] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


def _item_tag(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    return f"<{kind}>" if kind in ("function_call", "function_call_output", "reasoning") else "<message>"


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(_item_tag),
]

Input = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[Item], Field(fail_fast=True, **field_arguments("messages")), Tag("<list>")],
    TEXT_OR_LIST,
]


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat = Field(default_factory=lambda: TextFormat(type="text"))
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class NamedTool(Strict):
    type: Literal["function"]
    name: str


class ResponsesRequest(Strict):
    model: str = limited("model", "The served name, the file's name, or 'default'.", "default")
    input: Input = Field(description="A text, or items: messages, calls, their outputs and thoughts.")
    instructions: str | None = Field(None, description="Put before the input as a system message.")
    previous_response_id: str | None = Field(None, description="Go on after this response's output.")
    store: bool = Field(True, description="Keep the response, for previous_response_id and to retrieve it.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    max_output_tokens: int | None = limited("max_tokens", "Most tokens of the answer, thoughts included.")
    temperature: float | None = limited("temperature", "0 takes the most likely token.")
    top_p: float | None = limited("top_p", "Smallest set of tokens with this probability.")
    tools: list[FunctionTool] = Field(default=[], description="Functions that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool = Field(
        "auto", description="Whether, or which, function must be called."
    )
    parallel_tool_calls: bool = Field(True, description="Allow more than one call.")
    text: TextOptions = Field(default_factory=TextOptions, description="`format`: what the text must be.")
    reasoning: ReasoningOptions = Field(default_factory=ReasoningOptions, description="`effort`.")
    metadata: dict[str, str] = Field(default={}, description="Repeated in the response.")
    user: str | None = Field(None, description="Repeated in the response.")


ACCEPTED_RESPONSES = {
    **{name: ACCEPTED[name] for name in ("safety_identifier", "service_tier", "prompt_cache_key")},
    "prompt_cache_retention": ACCEPTED["prompt_cache_retention"],
    "include": "what could be included always is, or does not exist here",
    "stream_options": "events hold no padding",
}
REFUSED_RESPONSES: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "max_tool_calls": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "context_management": (),
}
COLUMNS = Columns(frozenset(ResponsesRequest.model_fields), ACCEPTED_RESPONSES, REFUSED_RESPONSES)

# Where a chat request's error lies in this API's body.
_FIELDS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def parse_responses(body: dict[str, Any], ignored: list[str] | None) -> ResponsesRequest:
    """Raises APIError 400. Unknown parameters are collected in `ignored`, or refused where it is None."""
    return validate(ResponsesRequest, take_implemented(body, COLUMNS, "", ignored))


def input_items(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The input as items, each with what a client may leave out."""
    if isinstance(request.input, str):
        return [MessageItem(role="user", content=request.input).model_dump(exclude_none=True)]
    return [item.model_dump(exclude_none=True) for item in request.input]


def to_chat(request: ResponsesRequest, history: list[ChatMessage]) -> dict[str, Any]:
    """The body of the chat request; `history` is what came before the input."""
    messages = [*history, *_messages(request)]
    if request.instructions is not None:
        messages.insert(0, {"role": "system", "content": request.instructions})
    body: dict[str, Any] = {"model": request.model, "messages": messages, "stream": request.stream}
    given = {
        "max_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "reasoning_effort": request.reasoning.effort,
        "response_format": _response_format(request.text.format),
    }
    body.update({name: value for name, value in given.items() if value is not None})
    if request.tools:
        body["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in request.tools
        ]
        body["tool_choice"] = _tool_choice(request.tool_choice)
        body["parallel_tool_calls"] = request.parallel_tool_calls
    return body


def own_error(error: errors.APIError) -> errors.APIError:
    """An error of the chat request, with its field under this API's name."""
    return errors.renamed(error, _FIELDS)


def _response_format(text: TextFormat) -> dict[str, Any] | None:
    if text.type == "text":
        return None
    if text.type == "json_object":
        return {"type": "json_object"}
    schema = {"name": text.name or "answer", "schema": text.schema_, "strict": text.strict}
    return {"type": "json_schema", "json_schema": {k: v for k, v in schema.items() if v is not None}}


def _tool_choice(choice: str | NamedTool) -> Any:
    if isinstance(choice, str):
        return choice
    return {"type": "function", "function": {"name": choice.name}}


def _messages(request: ResponsesRequest) -> list[ChatMessage]:
    """The input's items as messages: thoughts, text and calls of one turn are one message."""
    if isinstance(request.input, str):
        return [{"role": "user", "content": request.input}]
    messages: list[ChatMessage] = []
    for item in request.input:
        if isinstance(item, FunctionCallOutputItem):
            result = {"role": "tool", "tool_call_id": item.call_id, "content": joined_text(item.output)}
            messages.append(result)
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": joined_text(item.content)})
        else:
            _add_to_turn(messages, item)
    return messages


def _add_to_turn(messages: list[ChatMessage], item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    """Put the item into the assistant's message that is being collected, or into a new one."""
    if not messages or messages[-1]["role"] != "assistant" or _begins_turn(messages[-1], item):
        messages.append({"role": "assistant", "content": ""})
    message = messages[-1]
    if isinstance(item, FunctionCallItem):
        call = tool_call_fields(item.call_id, item.name, item.arguments)
        message.setdefault("tool_calls", []).append(call)
    elif isinstance(item, ReasoningItem):
        message["reasoning_content"] = joined_text(item.content or item.summary or [])
    else:
        message["content"] = joined_text(item.content)


def _begins_turn(message: ChatMessage, item: MessageItem | FunctionCallItem | ReasoningItem) -> bool:
    if isinstance(item, ReasoningItem):
        return True
    return isinstance(item, MessageItem) and bool(message["content"] or "tool_calls" in message)
