"""What a server must do, check by check. A check's docstring is what its line in the report says."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Callable
from typing import Any

from jinn.conformance.target import Failure, Reply, Skip, Target, expect

Check = Callable[[Target], None]
CHECKS: dict[str, list[Check]] = {}
"""By group, in the order in which they run."""

_FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter", "function_call"}
_ALPHABET = "List the letters of the alphabet."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
_ASK_WEATHER = "What is the weather in Paris? Use the tool."


def check(group: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS.setdefault(group, []).append(function)
        return function

    return register


def _choice(body: Any, index: int = 0) -> Any:
    choices: Any = body.get("choices") if isinstance(body, dict) else None
    expect(isinstance(choices, list) and len(choices) > index, "there are too few choices")
    return choices[index]


def _text(reply: Reply) -> str:
    content = _choice(reply.ok())["message"].get("content")
    expect(isinstance(content, str), f"content is {content!r}, not a string")
    return str(content)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


@check("models")
def models_list(target: Target) -> None:
    """GET /models lists models with id and object"""
    body = target.get("/models").ok()
    expect(body.get("object") == "list" and body.get("data"), "no list of models")
    for model in body["data"]:
        expect(model.get("object") == "model" and isinstance(model.get("id"), str), f"bad model {model}")


@check("models")
def models_retrieve(target: Target) -> None:
    """GET /models/{id} gives one of them"""
    expect(target.get(f"/models/{target.model}").ok().get("id") == target.model, "another id came back")


@check("models")
def models_unknown(target: Target) -> None:
    """GET /models/{id} of an unknown model is a 404"""
    status = target.get("/models/no-such-model").status
    expect(status == 404, f"status {status}")


@check("chat")
def chat_shape(target: Target) -> None:
    """An answer has every required field"""
    body = target.chat().ok()
    expect(body.get("object") == "chat.completion", f"object is {body.get('object')!r}")
    expect(isinstance(body.get("id"), str) and type(body.get("created")) is int, "id or created is wrong")
    expect(isinstance(body.get("model"), str), "model is not a string")
    choice = _choice(body)
    expect(choice.get("index") == 0 and choice.get("finish_reason") in _FINISH_REASONS, "choice is wrong")
    expect(choice["message"].get("role") == "assistant", "the role is not assistant")
    expect(isinstance(choice["message"].get("content"), str), "content is not a string")


@check("chat")
def chat_nullable_keys(target: Target) -> None:
    """`logprobs` and `refusal` are there, null, when unused"""
    choice = _choice(target.chat().ok())
    missing = [n for n, of in (("logprobs", choice), ("refusal", choice["message"])) if n not in of]
    expect(not missing, f"missing: {', '.join(missing)}")


@check("chat")
def chat_usage(target: Target) -> None:
    """usage counts add up"""
    usage: dict[str, Any] = target.chat().ok().get("usage") or {}
    prompt: Any = usage.get("prompt_tokens")
    completion: Any = usage.get("completion_tokens")
    expect(_is_count(prompt) and prompt > 0 and _is_count(completion), f"usage is {usage}")
    expect(usage.get("total_tokens") == prompt + completion, "total_tokens is not the sum")


@check("chat")
def chat_max_tokens(target: Target) -> None:
    """max_tokens and max_completion_tokens cut, with finish_reason length"""
    for name in ("max_tokens", "max_completion_tokens"):
        body = target.chat_body(_ALPHABET)
        del body["max_tokens"]
        answer = target.post("/chat/completions", {**body, name: 3}).ok()
        expect(_choice(answer)["finish_reason"] == "length", f"{name}: it was not cut")
        expect(answer["usage"]["completion_tokens"] == 3, f"{name}: {answer['usage']['completion_tokens']}")


@check("chat")
def chat_stop(target: Target) -> None:
    """A stop string ends the answer and is not part of it"""
    whole = _text(target.chat(_ALPHABET, max_tokens=24))
    middle = whole[len(whole) // 2 :][:3]
    if not middle.strip():
        raise Skip("the answer is too short to be stopped")
    reply = target.chat(_ALPHABET, max_tokens=24, stop=[middle])
    expect(_text(reply) == whole[: whole.index(middle)], "the text is not what came before the stop string")
    expect(_choice(reply.json())["finish_reason"] == "stop", "finish_reason is not stop")


@check("chat")
def chat_n(target: Target) -> None:
    """n=2 gives two choices, each with its index"""
    body = target.chat(n=2, temperature=1).ok()
    expect(sorted(choice["index"] for choice in body["choices"]) == [0, 1], "indices are not 0 and 1")


@check("chat")
def chat_content_parts(target: Target) -> None:
    """Content as parts means the same as content as text"""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
    expect(_text(target.chat(messages=parts)) == _text(target.chat()), "the answers differ")


@check("chat")
def chat_developer(target: Target) -> None:
    """The role developer is taken, as are several system messages"""
    for roles in (("developer",), ("system", "system")):
        system = [{"role": role, "content": "Be brief."} for role in roles]
        _text(target.chat(messages=[*system, {"role": "user", "content": "Say hello."}]))


@check("chat")
def chat_unknown_role(target: Target) -> None:
    """An unknown role is a 400"""
    _refused(target.chat(messages=[{"role": "robot", "content": "Hi"}]))


@check("chat")
def chat_request_id(target: Target) -> None:
    """Every answer has an x-request-id"""
    expect(target.chat().headers.get("x-request-id"), "there is none")


@check("determinism")
def greedy_is_deterministic(target: Target) -> None:
    """The same request at temperature 0 gives the same text, three times"""
    texts = {_text(target.chat(_ALPHABET, max_tokens=32)) for _ in range(3)}
    expect(len(texts) == 1, f"{len(texts)} different texts")


@check("determinism")
def seed_is_deterministic(target: Target) -> None:
    """The same seed at temperature 1 gives the same text, another seed another"""
    first, again, other = (
        _text(target.chat("Tell me a story.", temperature=1, seed=seed, max_tokens=32)) for seed in (7, 7, 8)
    )
    expect(first == again, "the same seed gave another text")
    expect(first != other, "another seed gave the same text")


@check("stream")
def stream_grammar(target: Target) -> None:
    """Events are `data:` lines of JSON, or comments, and end with [DONE]"""
    events = target.events("/chat/completions", target.chat_body(stream=True))
    expect(events and events[-1] == "data: [DONE]", "the last event is not data: [DONE]")
    for event in events[:-1]:
        if event.startswith(":"):
            continue
        expect(event.startswith("data: "), f"an event begins with {event[:20]!r}")
        expect("\n" not in event, "an event has several lines")
        json.loads(event.removeprefix("data: "))


@check("stream")
def stream_chunks(target: Target) -> None:
    """Chunks share one id and have every required field"""
    chunks = target.chunks()
    expect(len({chunk.get("id") for chunk in chunks}) == 1, "the id changes")
    for chunk in chunks:
        expect(chunk.get("object") == "chat.completion.chunk", f"object is {chunk.get('object')!r}")
        for choice in chunk["choices"]:
            expect(type(choice.get("index")) is int and "delta" in choice, f"choice {choice}")
            expect("finish_reason" in choice, "finish_reason is missing; it must be null until the end")


@check("stream")
def stream_role_first(target: Target) -> None:
    """The first delta has the role, and no other has"""
    roles = [c["choices"][0]["delta"].get("role") for c in target.chunks() if c["choices"]]
    expect(roles and roles[0] == "assistant", "the first delta has no role")
    expect(not any(roles[1:]), "the role is repeated")


@check("stream")
def stream_equals_whole(target: Target) -> None:
    """A greedy stream adds up to the whole answer"""
    chunks = target.chunks()
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    expect(text == _text(target.chat()), "the texts differ")


@check("stream")
def stream_finish(target: Target) -> None:
    """finish_reason comes once, last"""
    reasons = [c["choices"][0]["finish_reason"] for c in target.chunks() if c["choices"]]
    expect(reasons and reasons[-1] in _FINISH_REASONS, f"the last finish_reason is {reasons[-1:]}")
    expect(not any(reasons[:-1]), "an earlier chunk has one too")


@check("stream")
def stream_usage(target: Target) -> None:
    """include_usage: one more chunk without choices, and usage null in all others"""
    chunks = target.chunks(stream_options={"include_usage": True})
    expect(chunks[-1]["choices"] == [] and chunks[-1].get("usage"), "the last chunk is not usage alone")
    whole = target.chat().ok()["usage"]
    expect(chunks[-1]["usage"]["completion_tokens"] == whole["completion_tokens"], "it differs from whole")
    for chunk in chunks[:-1]:
        expect(chunk.get("usage", 0) is None, "another chunk has no usage: null")


@check("stream")
def stream_without_usage(target: Target) -> None:
    """Without include_usage no chunk has empty choices"""
    expect(all(chunk["choices"] for chunk in target.chunks()), "a chunk has no choices")


@check("stream")
def stream_not_buffered(target: Target) -> None:
    """Proxies are told not to hold events back"""
    with target.stream("/chat/completions", target.chat_body(stream=True)) as response:
        headers = response.headers
        told = headers.get("x-accel-buffering") == "no" or "no-transform" in headers.get("cache-control", "")
    expect(told, "neither x-accel-buffering: no nor cache-control: no-transform")


@check("stream")
def stream_cancelled(target: Target) -> None:
    """Clients that leave streams do not keep others from being served"""
    for _ in range(8):
        with target.stream("/chat/completions", target.chat_body(_ALPHABET, stream=True)) as response:
            response.readline()
    _text(target.chat())


@check("logprobs")
def logprobs_shape(target: Target) -> None:
    """logprobs with top_logprobs has tokens, bytes and alternatives that fit together"""
    content = _choice(target.chat(logprobs=True, top_logprobs=3).ok())["logprobs"]["content"]
    expect(content, "there are no tokens")
    for entry in content:
        expect(len(entry["top_logprobs"]) == 3, f"{len(entry['top_logprobs'])} alternatives")
        expect(math.isfinite(entry["logprob"]) and entry["logprob"] <= 0, f"logprob {entry['logprob']}")
        best = max(top["logprob"] for top in entry["top_logprobs"])
        expect(abs(entry["logprob"] - best) < 1e-3, "greedy did not take the likeliest token")
        expect(sum(math.exp(top["logprob"]) for top in entry["top_logprobs"]) < 1.001, "more than 1 in all")


@check("logprobs")
def logprobs_bytes(target: Target) -> None:
    """The bytes of the tokens add up to the text"""
    choice = _choice(target.chat(logprobs=True).ok())
    joined = b"".join(bytes(entry["bytes"] or b"") for entry in choice["logprobs"]["content"])
    expect(joined.decode(errors="replace").strip() == choice["message"]["content"].strip(), "they do not")


@check("logprobs")
def logprobs_without_top(target: Target) -> None:
    """logprobs without top_logprobs works, with empty alternatives"""
    content = _choice(target.chat(logprobs=True).ok())["logprobs"]["content"]
    expect(content and all(entry["top_logprobs"] == [] for entry in content), "alternatives came unasked")


@check("completions")
def completion_shape(target: Target) -> None:
    """A completion has every required field, for one prompt and for several"""
    body = {"model": target.model, "prompt": ["One, two,", "A, B,"], "max_tokens": 4, "temperature": 0}
    answer = target.post("/completions", body).ok()
    expect(answer.get("object") == "text_completion", f"object is {answer.get('object')!r}")
    expect(sorted(choice["index"] for choice in answer["choices"]) == [0, 1], "indices are not 0 and 1")
    expect(all(isinstance(choice.get("text"), str) for choice in answer["choices"]), "text is no string")


@check("completions")
def completion_echo_logprobs(target: Target) -> None:
    """echo with logprobs tells the prompt's log-probabilities, null for its first token"""
    body = {"model": target.model, "prompt": "One, two, three", "max_tokens": 1, "logprobs": 1, "echo": True}
    choice = _choice(target.post("/completions", body).ok())
    expect(choice["text"].startswith("One, two, three"), "the prompt is not repeated")
    logprobs = choice.get("logprobs") or {}
    values = logprobs.get("token_logprobs") or []
    expect(len(values) > 3 and values[0] is None, f"token_logprobs is {values[:4]}")
    expect(all(value <= 0 for value in values[1:]), "a value is missing or above 0")
    names = ("tokens", "top_logprobs", "text_offset")
    expect(all(len(logprobs.get(name) or []) == len(values) for name in names), "the lists differ in length")


@check("tools")
def tools_required(target: Target) -> None:
    """tool_choice required gives a call: an id, a known name, arguments that fit the schema"""
    reply = _with_tools(target, _ASK_WEATHER, tool_choice="required", max_tokens=128)
    choice = _choice(reply.ok())
    (call, *_) = choice["message"].get("tool_calls") or [{}]
    expect(call.get("type") == "function" and call.get("id"), f"the call is {call}")
    expect(call["function"]["name"] == "get_weather", f"name {call['function']['name']!r}")
    _check_weather(call["function"]["arguments"])
    expect(choice["finish_reason"] == "tool_calls", f"finish_reason is {choice['finish_reason']!r}")


@check("tools")
def tools_named(target: Target) -> None:
    """A named tool_choice calls that function"""
    named = {"type": "function", "function": {"name": "get_weather"}}
    reply = _with_tools(target, "Hi", tool_choice=named, max_tokens=128)
    calls = _choice(reply.ok())["message"].get("tool_calls") or []
    expect([call["function"]["name"] for call in calls[:1]] == ["get_weather"], "it was not called")


@check("tools")
def tools_none(target: Target) -> None:
    """tool_choice none gives no call"""
    message = _choice(_with_tools(target, _ASK_WEATHER, tool_choice="none").ok())["message"]
    expect(not message.get("tool_calls"), "there is a call")


@check("tools")
def tools_stream(target: Target) -> None:
    """Streamed calls have an index in every delta, and id and name once"""
    _with_tools(target, "Hi", max_tokens=1)
    chunks = target.chunks(
        messages=[{"role": "user", "content": _ASK_WEATHER}],
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=128,
    )
    deltas = [d for c in chunks if c["choices"] for d in c["choices"][0]["delta"].get("tool_calls") or []]
    expect(deltas, "there is no call")
    expect(all(type(delta.get("index")) is int for delta in deltas), "a delta has no index")
    first = [delta for delta in deltas if delta["index"] == 0]
    expect(first[0].get("id") and first[0]["function"].get("name"), "the first delta has no id or name")
    expect(not any(d.get("id") or d["function"].get("name") for d in first[1:]), "id or name is repeated")
    _check_weather("".join(delta["function"].get("arguments") or "" for delta in first))


@check("tools")
def tools_round_trip(target: Target) -> None:
    """A conversation with a call and its result is continued, also where the arguments are no JSON"""
    for arguments in ('{"city": "Paris"}', "not json"):
        function = {"name": "get_weather", "arguments": arguments}
        messages = [
            {"role": "user", "content": _ASK_WEATHER},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 20 degrees."},
        ]
        _with_tools(target, "", messages=messages).ok()


def _with_tools(target: Target, text: str, **fields: Any) -> Reply:
    """Ask with tools. Raises Skip where the model takes none."""
    reply = target.chat(text, tools=[WEATHER], **fields)
    error = reply.json().get("error") if reply.status == 400 else None
    if isinstance(error, dict) and error.get("param") == "tools":
        raise Skip("the model takes no tools")
    return reply


def _check_weather(arguments: Any) -> None:
    expect(isinstance(arguments, str), "arguments is not a string")
    try:
        value = json.loads(arguments)
    except ValueError:
        raise Failure(f"arguments is not JSON: {arguments[:60]!r}") from None
    expect(isinstance(value, dict) and set(value) == {"city"}, f"arguments do not fit: {arguments[:60]!r}")


@check("schema")
def schema_enforced(target: Target) -> None:
    """json_schema gives an answer that validates, whatever the prompt asks for"""
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green"]},
            "count": {"type": "integer", "minimum": 3, "maximum": 5},
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]$"},
        },
        "required": ["colour", "count", "code"],
        "additionalProperties": False,
    }
    value = json.loads(_schema_answer(target, schema))
    expect(set(value) == {"colour", "count", "code"}, f"keys {sorted(value)}")
    expect(value["colour"] in ("red", "green"), f"colour {value['colour']!r}")
    expect(type(value["count"]) is int and 3 <= value["count"] <= 5, f"count {value['count']!r}")
    expect(re.fullmatch("[A-Z]{2}[0-9]", value["code"]), f"code {value['code']!r} does not match its pattern")


@check("schema")
def schema_unanchored_pattern(target: Target) -> None:
    """A pattern without anchors is searched for, as JSON Schema says, or refused"""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": "x7", "maxLength": 12}},
        "required": ["a"],
        "additionalProperties": False,
    }
    reply = _ask_schema(target, schema)
    if reply.status != 400:
        value = json.loads(_text(reply))
        expect("x7" in value["a"], f"{value['a']!r} does not hold it")


@check("schema")
def schema_never_ignored(target: Target) -> None:
    """A keyword is honoured or refused, never ignored"""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 60}},
        "required": ["a"],
        "additionalProperties": False,
    }
    reply = _ask_schema(target, schema)
    if reply.status != 400:
        value = json.loads(_text(reply))["a"]
        expect(value % 7 == 0 and 1 <= value <= 60, f"{value} breaks multipleOf, minimum or maximum")


@check("schema")
def schema_bad(target: Target) -> None:
    """A schema that is none is a 400"""
    _refused(_ask_schema(target, {"type": "objekt"}))


@check("schema")
def json_object(target: Target) -> None:
    """json_object gives a JSON object"""
    reply = target.chat("Describe Paris as JSON.", response_format={"type": "json_object"}, max_tokens=256)
    if _choice(reply.ok())["finish_reason"] == "length":
        raise Skip("the answer did not end within 256 tokens")
    expect(isinstance(json.loads(_text(reply)), dict), "it is no object")


def _ask_schema(target: Target, schema: dict[str, Any]) -> Reply:
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return target.chat("Write a poem.", response_format=response_format, max_tokens=128)


def _schema_answer(target: Target, schema: dict[str, Any]) -> str:
    reply = _ask_schema(target, schema)
    if _choice(reply.ok())["finish_reason"] == "length":
        raise Skip("the answer did not end within 128 tokens")
    return _text(reply)


def _refused(reply: Reply, status: int = 400) -> dict[str, Any]:
    """The error of an answer that refuses, in OpenAI's form."""
    expect(reply.status == status, f"status {reply.status}, not {status}: {reply.body[:120]!r}")
    body = reply.json()
    error: Any = body.get("error") if isinstance(body, dict) else None
    expect(isinstance(error, dict), "there is no object `error`")
    expect(isinstance(error.get("message"), str) and isinstance(error.get("type"), str), f"error {error}")
    code = error.get("code")
    expect(code is None or isinstance(code, str), f"code {code!r} is neither a string nor null")
    return dict(error)


@check("errors")
def error_bad_json(target: Target) -> None:
    """A body that is no JSON is a 400"""
    _refused(target.post("/chat/completions", b'{"messages": '))


@check("errors")
def error_unknown_model(target: Target) -> None:
    """An unknown model is a 404 with the code model_not_found"""
    error = _refused(target.chat(model="no-such-model"), 404)
    expect(error.get("code") == "model_not_found", f"code {error.get('code')!r}")


@check("errors")
def error_missing_messages(target: Target) -> None:
    """A request without messages, or with none, is a 400"""
    _refused(target.post("/chat/completions", {"model": target.model}))
    _refused(target.chat(messages=[]))


@check("errors")
def error_types(target: Target) -> None:
    """Values of the wrong type are a 400"""
    for fields in ({"temperature": "hot"}, {"max_tokens": "many"}, {"messages": "Hi"}, {"stream": "yes"}):
        _refused(target.chat(**fields))


@check("errors")
def error_ranges(target: Target) -> None:
    """Values out of range are a 400"""
    for fields in (
        {"temperature": -1},
        {"top_p": 2},
        {"n": 0},
        {"n": 10**9},
        {"max_tokens": -1},
        {"logprobs": True, "top_logprobs": 10**6},
        {"logit_bias": {"2147483647": 1}},
    ):
        try:
            _refused(target.chat(**fields))
        except Failure as failure:
            raise Failure(f"{json.dumps(fields)}: {failure}") from None


@check("errors")
def error_nan(target: Target) -> None:
    """NaN is not JSON, and is refused"""
    body = json.dumps(target.chat_body(temperature=float("nan"))).encode()
    _refused(target.post("/chat/completions", body))


@check("errors")
def error_context(target: Target) -> None:
    """A prompt beyond the context is a 400 with the code context_length_exceeded"""
    error = _refused(target.chat("word " * 400_000))
    expect(error.get("code") == "context_length_exceeded", f"code {error.get('code')!r}")


@check("errors")
def error_key(target: Target) -> None:
    """A wrong key is a 401"""
    if target.api_key is None:
        raise Skip("no key was given")
    _refused(target.post("/chat/completions", target.chat_body(), authorization="Bearer wrong"), 401)


@check("errors")
def error_not_found(target: Target) -> None:
    """An unknown route is a 404 in the same form"""
    _refused(target.get("/no-such-route"), 404)


@check("security")
def cors_not_reflected(target: Target) -> None:
    """A foreign page's origin is not allowed with credentials"""
    headers = target.get("/models", origin="https://evil.example").headers
    allowed = headers.get("access-control-allow-origin")
    with_credentials = headers.get("access-control-allow-credentials") == "true"
    expect(not (allowed in ("*", "https://evil.example") and with_credentials), f"{allowed} is allowed")


@check("embeddings")
def embeddings_shape(target: Target) -> None:
    """Embeddings come in order, and base64 holds the same numbers"""
    body = {"model": target.model, "input": ["red", "green"], "encoding_format": "float"}
    reply = target.post("/embeddings", body)
    if reply.status in (404, 405, 501):
        raise Skip("there are no embeddings")
    answer = reply.ok()
    expect([entry["index"] for entry in answer["data"]] == [0, 1], "indices are not 0 and 1")
    vector = answer["data"][0]["embedding"]
    packed = target.post("/embeddings", {**body, "encoding_format": "base64"}).ok()["data"][0]["embedding"]
    expect(isinstance(packed, str), "base64 gave no string")
    raw = base64.b64decode(packed)
    unpacked = struct.unpack(f"<{len(raw) // 4}f", raw)
    near = all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(vector, unpacked, strict=True))
    expect(near, "the numbers differ")
