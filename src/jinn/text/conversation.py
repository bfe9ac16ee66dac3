"""Conversations as chat templates expect them.

Templates know the roles system, user, assistant and tool, content as one text, and results in the order of
their calls. What clients send is brought to that form here, without a word lost.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def plain_messages(messages: Messages) -> list[dict[str, Any]]:
    """Messages in the form that templates expect.

    Content is one string; a message that only calls has none. No field is null, thoughts are in
    `reasoning_content`, `developer` is `system`, and tool results stand in the order of their calls.

    Raises ValueError naming the field.
    """
    if not messages:
        raise ValueError("messages is empty")
    plain = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}] is not an object with a role")
        fields = {name: value for name, value in message.items() if value is not None}
        if "content" in fields:
            fields["content"] = _content_text(fields["content"], f"messages[{index}].content")
        if "reasoning" in fields:
            fields.setdefault("reasoning_content", fields["reasoning"])
        if fields["role"] == "developer":
            fields["role"] = "system"
        if calls := fields.get("tool_calls"):
            _check_calls(calls, f"messages[{index}].tool_calls")
            if not fields.get("content"):
                fields.pop("content", None)
        plain.append(fields)
    return _with_ordered_results(plain)


def _content_text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{field} must be a string or a list of parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise ValueError(f"{field}[{index}].type {kind!r} is not supported; supported: 'text'")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{field}[{index}].text must be a string")
        texts.append(part["text"])
    return "".join(texts)


def _check_calls(calls: Any, field: str) -> None:
    is_list = isinstance(calls, Sequence) and all(isinstance(call, Mapping) for call in calls)
    if not is_list or not all(isinstance(call.get("function", call), Mapping) for call in calls):
        raise ValueError(f"{field} must be a list of objects, each with a function")


def with_content(messages: Messages, content: str | None) -> Messages:
    """The messages, with this content where they have none."""
    return [{"content": content, **message} for message in messages]


def with_one_system_message(messages: Messages) -> Messages | None:
    """The messages with all system messages as one at the start; None where that changes nothing."""
    system = [message for message in messages if message["role"] == "system"]
    if not system or (len(system) == 1 and messages[0] is system[0]):
        return None
    content = "\n\n".join(message.get("content", "") for message in system)
    others = (message for message in messages if message["role"] != "system")
    return [{**system[0], "content": content}, *others]


def with_parsed_arguments(messages: Messages) -> list[dict[str, Any]]:
    """The messages with the arguments of calls as objects; other text goes under the key `arguments`."""
    return [
        {**message, "tool_calls": [_with_parsed_arguments(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def _with_parsed_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)  # some write the function alone
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        parsed = None
    function = {**function, "arguments": parsed if isinstance(parsed, dict) else {"arguments": arguments}}
    return {**call, "function": function} if "function" in call else function


def _with_ordered_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run of tool messages in the order of the calls before it; those that answer no call go last."""
    ordered: list[dict[str, Any]] = []
    ranks: dict[str, int] = {}
    for is_result, run in itertools.groupby(messages, lambda message: message["role"] == "tool"):
        if is_result:
            ordered += sorted(run, key=lambda result: ranks.get(str(result.get("tool_call_id")), len(ranks)))
            continue
        ordered += run
        calls = ordered[-1].get("tool_calls") or ()
        ranks = {str(call["id"]): rank for rank, call in enumerate(calls) if "id" in call}
    return ordered
