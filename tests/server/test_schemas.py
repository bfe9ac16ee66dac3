from __future__ import annotations

from typing import Any

import pytest

from jinn.engine.messages import SamplingParams
from jinn.server.errors import APIError
from jinn.server.limits import LIMITS
from jinn.server.parameters import (
    ACCEPTED,
    ACCEPTED_MESSAGE,
    REFUSED_CHAT,
    REFUSED_COMPLETION,
    REFUSED_MESSAGE,
)
from jinn.server.schemas import (
    CHAT_COLUMNS,
    COMPLETION_COLUMNS,
    MESSAGE_COLUMNS,
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
)

# Every parameter in OpenAI's reference, and the column it is in here.
OPENAI_CHAT = {
    "implemented": (
        "messages model frequency_penalty logit_bias logprobs max_completion_tokens max_tokens n "
        "parallel_tool_calls presence_penalty reasoning_effort response_format seed stop stream "
        "stream_options temperature "
        "tool_choice tools top_logprobs top_p"
    ),
    "accepted": (
        "metadata prediction prompt_cache_key prompt_cache_retention safety_identifier "
        "service_tier store user"
    ),
    "refused": ("audio function_call functions modalities verbosity web_search_options"),
}
OPENAI_COMPLETION = {
    "implemented": (
        "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed "
        "stop stream stream_options suffix temperature top_p"
    ),
    "accepted": "user",
}
VLLM = {"top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"}


def chat(ignored: list[str] | None = None, **fields: Any) -> ChatRequest:
    return parse_chat({"messages": [{"role": "user", "content": "Hi"}], **fields}, ignored)


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion({"prompt": "Hi", **fields}, None)


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def refusal(parse: Any, **fields: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.param in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("columns", "known"), [(CHAT_COLUMNS, OPENAI_CHAT), (COMPLETION_COLUMNS, OPENAI_COMPLETION)]
)
def test_every_openai_parameter_is_in_its_column(columns: Any, known: dict[str, str]) -> None:
    for column, names in known.items():
        assert set(names.split()) <= set(getattr(columns, column))
    assert set(columns.implemented) >= VLLM


@pytest.mark.parametrize("columns", [CHAT_COLUMNS, COMPLETION_COLUMNS, MESSAGE_COLUMNS])
def test_no_parameter_is_in_two_columns(columns: Any) -> None:
    names = [*columns.implemented, *columns.accepted, *columns.refused]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", sorted(REFUSED_CHAT))
def test_refused_in_chat(name: str) -> None:
    assert refusal(chat, **{name: {"x": 1}}).code == "unsupported_parameter"
    for harmless in (None, *REFUSED_CHAT[name]):
        assert chat(**{name: harmless}) == chat()


@pytest.mark.parametrize("name", sorted(REFUSED_COMPLETION))
def test_refused_in_completions(name: str) -> None:
    assert refusal(completion, **{name: {"x": 1}}).code == "unsupported_parameter"
    for harmless in (None, *REFUSED_COMPLETION[name]):
        assert completion(**{name: harmless}) == completion()


@pytest.mark.parametrize("name", sorted(REFUSED_MESSAGE))
def test_refused_in_messages(name: str) -> None:
    message = {"role": "assistant", "content": "x", name: [1]}
    assert refusal(chat, messages=[{"role": "user", "content": "x"}, message]).param == f"messages[1].{name}"


def test_true_is_not_one() -> None:
    assert refusal(chat, length_penalty=True).param == "length_penalty"
    assert chat(length_penalty=1.0) == chat()


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_accepted_changes_nothing(name: str) -> None:
    assert chat(**{name: "anything"}) == chat()


def test_unknown_fields() -> None:
    assert refusal(chat, temprature=1).code == "unknown_parameter"
    message = {"role": "user", "content": "x", "colour": 1, **dict.fromkeys(ACCEPTED_MESSAGE, "x")}
    assert refusal(chat, messages=[message]).param == "messages[0].colour"
    ignored: list[str] = []
    assert chat(ignored, temprature=1) == chat()
    assert ignored == ["temprature"]


def test_null_means_absent() -> None:
    assert chat(**dict.fromkeys(set(ChatRequest.model_fields) - {"messages"})) == chat()


NUMBERS = [
    (parse, name)
    for parse, model in ((chat, ChatRequest), (completion, CompletionRequest))
    for name in sorted(model.model_fields)
    if name in LIMITS and LIMITS[name].type in ("integer", "number") and (parse, name) != (chat, "logprobs")
]


@pytest.mark.parametrize(("parse", "name"), NUMBERS)
def test_number_limits(parse: Any, name: str) -> None:
    limit = LIMITS[name]
    other = {"logprobs": True} if name == "top_logprobs" else {}
    if name == "min_tokens" and parse is completion:
        other = {"max_tokens": LIMITS["max_tokens"].maximum}
    least = limit.minimum if not limit.is_exclusive else 1e-9
    for value in (least, limit.maximum):
        number = int(value) if limit.type == "integer" else value
        assert getattr(parse(**{name: number, **other}), name) == number
    step = 1 if limit.type == "integer" else 1e-9
    bad = [
        limit.minimum - step,
        limit.maximum + max(step, 1e-6),
        2**63,
        2**64,
        -(2**63),
        1e308,
        "1",
        True,
        [],
        {},
    ]
    if limit.type == "integer":
        bad += [0.5, 1.0]
    if limit.is_exclusive:
        bad.append(limit.minimum)
    for value in bad:
        assert refusal(parse, **{name: value, **other}).param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"tools": [{"type": "browser"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [tool("f", parameters={"type": "array"})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f"), tool("g"), tool("f")]}, "tools[2].function.name"),
        ({"tools": [tool("f")] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a.b": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "x" * 1025}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {f"a{i}": i for i in range(17)}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "messages[0]"),
        (
            {
                "messages": [{"role": "assistant", "content": "x"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "continue_final_message",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": ""}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}]},
            "messages[0].content[1].type",
        ),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"return_progress": True}, "return_progress"),
        ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 257]}, "stop[0]"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"\uff11": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 20: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "5"}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 10, "max_completion_tokens": 4}, "min_tokens"),
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
    ],
)
def test_bad_chat(fields: dict[str, Any], param: str) -> None:
    assert refusal(chat, **fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [1, -2]}, "prompt[0][1]"),
        ({"prompt": [True]}, "prompt[0][0]"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]"),
        ({"prompt": [1.5] * 100_000}, "prompt"),
        ({"prompt": [1] + [1.5] * 100_000}, "prompt[0][1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"max_tokens": 8, "min_tokens": 9}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_bad_completion(fields: dict[str, Any], param: str) -> None:
    assert refusal(completion, **fields).param == param


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([""], [""]),
    ],
)
def test_prompt_forms(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


def test_ids_outside_the_vocabulary() -> None:
    request = completion(prompt=[[1], [2, 300]])
    assert refusal(lambda: request.check_vocabulary(300)).param == "prompt[1]"
    request.check_vocabulary(301)
    for fields in ({"logit_bias": {"300": 1}}, {"stop_token_ids": [5, 300]}):
        request = completion(**fields)
        assert refusal(lambda request=request: request.check_vocabulary(300)).param == next(iter(fields))


def test_sampling_params() -> None:
    defaults = SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    sampling = chat(
        max_tokens=9,
        max_completion_tokens=7,
        top_k=-1,
        logprobs=True,
        stop="x",
        logit_bias={"5": -1},
        seed=11,
        n=2,
    ).sampling_params(defaults)
    assert sampling == SamplingParams(
        n=2,
        max_tokens=7,
        temperature=0.6,
        top_k=0,
        top_p=0.95,
        logit_bias={5: -1.0},
        logprobs=0,
        stop=("x",),
        seed=11,
    )
    assert chat().sampling_params(defaults).max_tokens is None
    assert completion().sampling_params(defaults).max_tokens == 16
    assert completion(logprobs=3).sampling_params(defaults).logprobs == 3
    seeds = {chat().sampling_params(defaults).seed for _ in range(10)}
    assert len(seeds) == 10
    assert all(seed is not None and seed + 127 < 2**53 for seed in seeds)


def test_messages_for_the_template() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "a", "name": None},
            {
                "role": "user",
                "name": "Bo",
                "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}],
            },
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "d",
                "refusal": None,
                "tool_calls": None,
            },
        ]
    )
    assert [message.for_template() for message in request.messages] == [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": "bc", "name": "Bo"},
        {"role": "assistant", "content": "", "reasoning_content": "d"},
    ]


def test_calls_for_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    replayed = {**call, "index": 0, "function": {**call["function"], "parsed_arguments": None}}
    request = chat(
        messages=[
            {"role": "assistant", "tool_calls": [replayed, {"function": {"name": "g"}}], "parsed": None},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ]
    )
    empty = {"id": "", "type": "function", "function": {"name": "g", "arguments": ""}}
    assert [message.for_template() for message in request.messages] == [
        {"role": "assistant", "content": "", "tool_calls": [call, empty]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
    ]


def test_tools_for_the_template() -> None:
    given = tool("f", description="d", parameters={"type": "object"}, strict=False)
    (shown,) = chat(tools=[given], tool_choice="auto").turn().tools
    assert shown == tool("f", description="d", parameters={"type": "object"})
    assert not chat(tools=[given], tool_choice="none").turn().tools
