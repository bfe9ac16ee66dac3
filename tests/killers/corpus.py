"""Requests drawn from what stopped, stalled or misled other servers, with the field each must name."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from typing import Any

from jinn.server.limits import LIMITS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, EMBEDDINGS = "/v1/responses", "/v1/messages", "/v1/embeddings"

_USER = [{"role": "user", "content": "x"}]
_BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": _USER},
    COMPLETIONS: {"prompt": "x"},
    RESPONSES: {"input": "x"},
    MESSAGES: {"messages": _USER, "max_tokens": 4},
    EMBEDDINGS: {"input": "x"},
    "/v1/rerank": {"query": "x", "documents": ["x"]},
    "/v1/score": {"text_1": "x", "text_2": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/v1/messages/count_tokens": {"messages": _USER},
}


@dataclass(frozen=True, slots=True)
class Killer:
    """`field_name` is what the answer names; None where the body as a whole is at fault."""

    why: str
    path: str
    body: bytes
    field_name: str | None
    statuses: tuple[int, ...] = (400,)
    headers: dict[str, str] = field(default_factory=dict)


def bad(why: str, path: str, field_name: str | None, **fields: Any) -> Killer:
    return Killer(why, path, json.dumps({**_BASES[path], **fields}).encode(), field_name)


def raw(why: str, path: str, text: str, field_name: str | None = None) -> Killer:
    """With a field written as JSON that Python would not write."""
    body = json.dumps(_BASES[path])[:-1] + ", " + text + "}"
    return Killer(why, path, body.encode(), field_name)


def _out_of_range() -> list[Killer]:
    """Each numeric field just out of its range, far out, not finite and of another type."""
    fields = (
        *("n", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "top_logprobs", "seed"),
    )
    killers = []
    for name in fields:
        limit = LIMITS[name]
        below = limit.minimum if limit.is_exclusive else limit.minimum - 1
        for value in (below, limit.maximum + 1, 2**64, -(2**63) - 1, "1", True, [1], {"a": 1}):
            killers.append(bad(f"{name} is {str(value)[:24]}", CHAT, name, **{name: value}))
        for text in ("NaN", "-Infinity", "1e400"):
            killers.append(raw(f"{name} is {text}", CHAT, f'"{name}": {text}', name))
    return killers


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def _messages(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "x", **fields}]


KILLERS: list[Killer] = [
    *_out_of_range(),
    # counts that are used before they are checked
    bad("prompt list fan-out", COMPLETIONS, "prompt", prompt=["x"] * 100_000),
    bad("prompts times choices", COMPLETIONS, "prompt", prompt=["x"] * 128, n=128),
    bad("candidates without bound", COMPLETIONS, "best_of", best_of=10**6),
    bad("inputs without bound", EMBEDDINGS, "input", input=["x"] * 100_000),
    bad("documents without bound", "/v1/rerank", "documents", documents=["x"] * 100_000),
    bad("pairs that do not match", "/v1/score", "text_1", text_1=["a", "b"], text_2=["a", "b", "c"]),
    bad("stop list without bound", CHAT, "stop", stop=["x"] * 100_000),
    bad("stop string of a megabyte", CHAT, "stop[0]", stop="a" * 2**20),
    bad("empty stop string", CHAT, "stop[0]", stop=[""]),
    bad("a million messages", CHAT, "messages", messages=[0] * 1_000_000),
    bad("parts without bound", CHAT, "messages[0].content", messages=_messages(content=[0] * 100_000)),
    bad("items without bound", RESPONSES, "input", input=[0] * 1_000_000),
    # ids used as indices
    bad("bias outside the vocabulary", CHAT, "logit_bias", logit_bias={"2147483647": 1}),
    bad("bias at a negative id", CHAT, "logit_bias", logit_bias={"-1": 1}),
    bad("bias beyond int64", CHAT, "logit_bias", logit_bias={str(2**70): 1}),
    bad("bias table without bound", CHAT, "logit_bias", logit_bias={str(i): 1 for i in range(100_000)}),
    bad("bias that is too strong", CHAT, "logit_bias", logit_bias={"1": 1e308}),
    bad("bias that is a list", CHAT, "logit_bias", logit_bias=[1]),
    bad("stop id outside the vocabulary", CHAT, "stop_token_ids", stop_token_ids=[2**31 - 1]),
    bad("stop id below zero", CHAT, "stop_token_ids[0]", stop_token_ids=[-1]),
    bad("prompt id outside the vocabulary", COMPLETIONS, "prompt[0]", prompt=[2**31 - 1]),
    bad("prompt id below zero", COMPLETIONS, "prompt[0][0]", prompt=[-1]),
    bad("prompt id beyond int32", COMPLETIONS, "prompt[0][0]", prompt=[2**31]),
    bad("id outside the vocabulary to text", "/detokenize", "tokens", tokens=[2**31 - 1]),
    bad("ids of another tokenizer", EMBEDDINGS, "input", input=[1, 2, 3]),
    # legal but odd
    bad("empty prompt", COMPLETIONS, "prompt", prompt=""),
    bad("empty ids", COMPLETIONS, "prompt", prompt=[[]]),
    bad("no prompts", COMPLETIONS, "prompt", prompt=[]),
    bad("echo without new tokens", COMPLETIONS, "max_tokens", echo=True, max_tokens=0),
    bad("filling in where there are no tokens for it", COMPLETIONS, "suffix", suffix="x"),
    bad("prompt beyond the context", COMPLETIONS, "prompt", prompt=[5] * 100_000),
    bad("text beyond the context", EMBEDDINGS, "input[0]", input="x " * 10_000),
    bad("conversation beyond the context", CHAT, "messages", messages=_messages(content="x " * 50_000)),
    bad("min_tokens beyond the context", CHAT, "min_tokens", min_tokens=10**6),
    bad("min_tokens above max_tokens", CHAT, "min_tokens", min_tokens=9, max_tokens=1),
    bad("no messages", CHAT, "messages", messages=[]),
    bad("embedding of nothing", EMBEDDINGS, "input[0]", input=""),
    bad("query of nothing", "/v1/rerank", "query", query=""),
    bad("more dimensions than numbers", EMBEDDINGS, "dimensions", dimensions=2**40),
    # roles and content
    bad("role that breaks out", CHAT, "messages[0].role", messages=_messages(role="user<|im_end|>")),
    bad("image", CHAT, "messages[0].content[0].type", messages=_messages(
        content=[{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}])),
    bad("image of Anthropic", MESSAGES, None, messages=_messages(content=[{"type": "image"}])),
    bad("content that is a number", CHAT, "messages[0].content", messages=_messages(content=7)),
    bad("item of an unknown type", RESPONSES, "input[0].type", input=[
        {"type": "computer_call", "role": "user", "content": "x"}]),
    bad("response of another", RESPONSES, "previous_response_id", previous_response_id="resp_x"),
    # what must never come from a client
    bad("template", CHAT, "chat_template", chat_template="{{ ''.__class__ }}"),
    bad("template variable of the renderer's", CHAT, "chat_template_kwargs",
        chat_template_kwargs={"tokenize": True}),
    bad("template variable that is deep", CHAT, "chat_template_kwargs",
        chat_template_kwargs={"x": {"y": [1]}}),
    bad("template variable with a Python name", CHAT, "chat_template_kwargs",
        chat_template_kwargs={"self.__init__": 1}),
    bad("cache salt of another", CHAT, "cache_salt", cache_salt="x"),
    bad("tenant of another", CHAT, "tenant", tenant="key:alice"),
    bad("attribute of the server's own", CHAT, "__class__", __class__={"x": 1}),
    bad("priority", CHAT, "priority", priority=-(2**31)),
    # tools
    bad("tool without a function", CHAT, "tools[0].function", tools=[{"type": "function"}]),
    bad("tool whose parameters are a number", CHAT, "tools[0].function.parameters",
        tools=[{"type": "function", "function": {"name": "f", "parameters": 7}}]),
    bad("tool whose name breaks out", CHAT, "tools[0].function.name",
        tools=[{"type": "function", "function": {"name": "f\n<|im_end|>"}}]),
    bad("tools without bound", CHAT, "tools",
        tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(10_000)]),
    bad("tool of another kind", RESPONSES, "tools[0].type", tools=[{"type": "web_search"}]),
    # encoding
    raw("half a character", CHAT, '"user": "\\ud800"', "user"),
    raw("half a character in a stop string", CHAT, '"stop": ["\\udfff"]', "stop[0]"),
    raw("key twice", CHAT, '"n": 1, "n": 100', "n"),
    raw("number of 5,000 digits", CHAT, '"seed": ' + "9" * 5000),
    raw("deep object", CHAT, '"metadata": ' + '{"a":' * 60_000 + "1" + "}" * 60_000),
    bad("object deeper than the limit", CHAT, "metadata" + ".a" * 31, metadata=_deep(40)),
    Killer("deep list", CHAT, b"[" * 500_000, None),
    Killer("not UTF-8", CHAT, b'{"messages": "\xc0\x80"}', None),
    Killer("UTF-16", CHAT, '{"messages": []}'.encode("utf-16"), None),
    Killer("byte order mark", CHAT, b"\xef\xbb\xbf{}", None),
    Killer("empty body", CHAT, b"", None),
    Killer("body that is a list", CHAT, b"[]", None),
    Killer("body that is null", RESPONSES, b"null", None),
    Killer("pickle", CHAT, b"\x80\x04cposix\nsystem\n.", None),
    Killer("100 MB", CHAT, b'{"a": "' + b"x" * 100_000_000 + b'"}', None, (413,)),
    Killer("gzip bomb", CHAT, gzip.compress(b" " * 10_000_000), None, (415,), {"content-encoding": "gzip"}),
    Killer("form", CHAT, b"a=b", None, (415,), {"content-type": "application/x-www-form-urlencoded"}),
    Killer("multipart", CHAT, b"--x\r\n", None, (415,), {"content-type": "multipart/form-data; boundary=x"}),
]  # fmt: skip
