"""The assistant's next turn of a conversation, whatever the API: the prompt, and how to read the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinn.engine.messages import SamplingParams, ThinkingBudget
from jinn.server import errors
from jinn.server.service import Service
from jinn.text.chat_format import NO_THINKING, ThinkingIds
from jinn.text.message_parser import MessageParser
from jinn.text.reasoning import ReasoningFormat
from jinn.text.tool_formats.calls import Tool

# Variables of chat templates that the renderer sets.
OWN_VARIABLES = frozenset(
    (
        *("messages", "tools", "documents", "bos_token", "eos_token", "self"),
        *("add_generation_prompt", "continue_final_message", "tokenize"),
        *("tokenizer", "template", "chat_template"),
    )
)
THINKING_VARIABLES = ("enable_thinking", "thinking")

# Tokens to think at most; None: as the model likes.
EFFORT_BUDGETS = {"minimal": 256, "low": 1024, "medium": 4096, "high": None}
NO_EFFORT = "none"


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """What the APIs for conversations have in common.

    Attributes:
        messages: as `jinn.text.conversation` takes them.
        tools: in OpenAI's form; none where the model may not call any.
        parallel_tool_calls: without it the turn ends with its first call.
        calls_come_first: an answer that does not begin with a call has none.
        template_kwargs: further variables of the chat template; scalars.
        enable_thinking: None where the model decides.
        reasoning_effort: a key of EFFORT_BUDGETS, `none`, or None.
        thinking_budget: the most tokens of thought; goes before the effort's.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: tuple[Mapping[str, Any], ...] = ()
    parallel_tool_calls: bool = True
    calls_come_first: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that is ready to be generated.

    Attributes:
        sampling: with the budget of thoughts.
        make_parser: makes what reads a choice.
        is_thinking: the prompt leaves the model in its thoughts.
        thinking_ids: see `ThinkingIds`.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    make_parser: Callable[[], MessageParser]
    is_thinking: bool
    thinking_ids: ThinkingIds = NO_THINKING


async def prepare_turn(service: Service, request: TurnRequest, sampling: SamplingParams) -> Turn:
    """Render the conversation, and settle how the model may think.

    Raises APIError 400, naming the field of the chat completions API, where the model or its template cannot
    do what is asked for, or does not take the conversation.
    """
    chat_format = service.chat_format
    _check_tools(service, request)
    _check_variables(service, request)
    is_wanted = _is_thinking_wanted(request)
    _check_thinking(service, request, is_wanted=is_wanted)
    try:
        prompt_ids = tuple(
            await service.run_text(
                _num_characters(request),
                service.encode_chat,
                request.messages,
                tools=list(request.tools) or None,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **_template_variables(service, request, is_wanted=is_wanted),
            )
        )
    except ValueError as error:
        raise errors.invalid_value("messages", f"'messages': {error}") from None
    is_thinking = chat_format.is_thinking(
        service.tokenizer, prompt_ids, is_continued=request.continue_final_message
    )
    max_tokens = _max_thinking_tokens(service, request, is_wanted=is_wanted)
    if chat_format.reasoning is not None and max_tokens is not None:
        budget = _thinking_budget(service, chat_format.reasoning, max_tokens, is_thinking=is_thinking)
        sampling = replace(sampling, thinking_budget=budget)
    make_parser = chat_format.parser_factory(
        [Tool.from_definition(tool) for tool in request.tools],
        is_thinking=is_thinking,
        parallel=request.parallel_tool_calls,
        come_first=request.calls_come_first,
    )
    thinking_ids = chat_format.thinking_ids(service.tokenizer, is_thinking=is_thinking, is_wanted=is_wanted)
    return Turn(prompt_ids, sampling, make_parser, is_thinking, thinking_ids)


def _check_tools(service: Service, request: TurnRequest) -> None:
    chat_format = service.chat_format
    if request.tools and (chat_format.tools is None or "tools" not in chat_format.variables):
        raise errors.invalid_value("tools", "'tools': this model's chat template does not take any.")


def _is_thinking_wanted(request: TurnRequest) -> bool | None:
    """What the request says in one or several ways, which must agree."""
    wishes = {"enable_thinking": request.enable_thinking}
    for name in THINKING_VARIABLES:
        wishes[f"chat_template_kwargs.{name}"] = request.template_kwargs.get(name)
    if request.reasoning_effort is not None:
        wishes["reasoning_effort"] = request.reasoning_effort != NO_EFFORT
    said = {param: wish for param, wish in wishes.items() if wish is not None}
    for param, wish in said.items():
        if not isinstance(wish, bool):
            raise errors.invalid_value(param, f"'{param}' must be true or false.")
    if not said:
        return None
    first, wanted = next(iter(said.items()))
    for param, wish in said.items():
        if wish != wanted:
            raise errors.invalid_value(param, f"'{param}' contradicts '{first}'.")
    return bool(wanted)


def _check_variables(service: Service, request: TurnRequest) -> None:
    variables = service.chat_format.variables
    for name in request.template_kwargs:
        param = f"chat_template_kwargs.{name}"
        if name in OWN_VARIABLES:
            raise errors.invalid_value(param, f"'{param}' is set by the server.")
        if name not in variables and name not in THINKING_VARIABLES:
            raise errors.invalid_value(param, f"'{param}': this model's chat template does not read it.")


def _check_thinking(service: Service, request: TurnRequest, *, is_wanted: bool | None) -> None:
    if service.chat_format.reasoning is None and (is_wanted or request.thinking_budget is not None):
        asked = next(
            (name for name in ("reasoning_effort", "thinking_budget") if getattr(request, name) is not None),
            "enable_thinking",
        )
        raise errors.invalid_value(asked, f"'{asked}': this model does not think before it answers.")


def _template_variables(service: Service, request: TurnRequest, *, is_wanted: bool | None) -> dict[str, Any]:
    chat_format = service.chat_format
    variables = {k: v for k, v in request.template_kwargs.items() if k not in THINKING_VARIABLES}
    if chat_format.thinking_switch is not None and is_wanted is not None:
        variables[chat_format.thinking_switch] = is_wanted
    if "reasoning_effort" in chat_format.variables and request.reasoning_effort not in (None, NO_EFFORT):
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    return variables


def _max_thinking_tokens(service: Service, request: TurnRequest, *, is_wanted: bool | None) -> int | None:
    """None: as many as it likes. 0: it is not to think, and its template cannot say so."""
    if is_wanted is False:
        return None if service.chat_format.thinking_switch else 0
    if request.thinking_budget is not None:
        return request.thinking_budget
    return EFFORT_BUDGETS.get(request.reasoning_effort or "")


def _thinking_budget(
    service: Service, reasoning: ReasoningFormat, max_tokens: int, *, is_thinking: bool
) -> ThinkingBudget:
    tag_ids = reasoning.tag_ids(service.tokenizer)
    if tag_ids is None:
        raise errors.invalid_value(
            "thinking_budget",
            "'thinking_budget': this model's thoughts do not end with a token of their own.",
        )
    start_id, end_id = tag_ids
    closing_ids = tuple(service.tokenizer.encode(reasoning.closing, add_bos=False))
    return ThinkingBudget(max_tokens, None if is_thinking else start_id, end_id, closing_ids)


def _num_characters(request: TurnRequest) -> int:
    """About how long the prompt will be."""
    texts = (text for message in request.messages for text in message.values() if isinstance(text, str))
    return sum(map(len, texts)) + len(str(request.tools))
