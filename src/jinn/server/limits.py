"""One table of what a request may ask for. Validation, the OpenAPI document and the docs all read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinn.engine.messages import MAX_SEED


@dataclass(frozen=True, slots=True)
class Limit:
    """The range of a field: of its value if it is a number, of its length if a string, list or object.

    `default` is what an absent field means; None where the model's own settings or the context decide.
    Every number must be finite, in every field.
    """

    field: str
    type: str  # integer | number | string | list | object
    minimum: float
    maximum: float
    default: float | str | bool | None = None
    is_exclusive: bool = False  # the minimum itself is refused


MAX_COUNT = 2**31 - 1

LIMITS: dict[str, Limit] = {
    limit.field: limit
    for limit in (
        Limit("model", "string", 1, 256, "default"),
        Limit("messages", "list", 1, 10_000),
        Limit("name", "string", 1, 256),
        Limit("content", "list", 1, 1_000),
        Limit("tools", "list", 0, 128),
        Limit("tools.description", "string", 0, 65_536),
        Limit("tool_calls", "list", 0, 128),
        Limit("tool_call_id", "string", 0, 256),
        Limit("thinking_budget", "integer", 0, MAX_COUNT),
        Limit("chat_template_kwargs", "object", 0, 16),
        Limit("chat_template_kwargs.value", "string", 0, 1_024),
        Limit("prompt", "list", 1, 128),
        Limit("suffix", "string", 0, 1_000_000, ""),
        Limit("n", "integer", 1, 128, 1),
        Limit("max_tokens", "integer", 1, MAX_COUNT),
        Limit("max_completion_tokens", "integer", 1, MAX_COUNT),
        Limit("min_tokens", "integer", 0, MAX_COUNT, 0),
        Limit("temperature", "number", 0, 2),
        Limit("top_p", "number", 0, 1, is_exclusive=True),
        Limit("top_k", "integer", -1, MAX_COUNT),
        Limit("min_p", "number", 0, 1),
        Limit("repetition_penalty", "number", 0.01, 100),
        Limit("presence_penalty", "number", -2, 2, 0),
        Limit("frequency_penalty", "number", -2, 2, 0),
        Limit("logit_bias", "object", 0, 1_024),
        Limit("logit_bias.value", "number", -100, 100),
        Limit("top_logprobs", "integer", 0, 20, 0),
        Limit("logprobs", "integer", 0, 20),
        Limit("seed", "integer", 0, MAX_SEED),
        Limit("stop", "list", 0, 16),
        Limit("stop.string", "string", 1, 256),
        Limit("stop_token_ids", "list", 0, 64),
        Limit("guided_choice", "list", 1, 1_000),
        Limit("guided_regex", "string", 1, 4_096),
        Limit("guided_grammar", "string", 1, 65_536),
        Limit("grammar", "string", 0, 65_536),
        Limit("token_id", "integer", 0, MAX_COUNT),
        Limit("tokens", "list", 0, 1_000_000),
        Limit("input", "list", 1, 2_048),
        Limit("dimensions", "integer", 1, MAX_COUNT),
        Limit("documents", "list", 1, 2_048),
        Limit("top_n", "integer", 1, MAX_COUNT),
    )
}

MAX_BODY_BYTES = 4 * 2**20
MAX_JSON_DEPTH = 32
MAX_CHOICES = 128  # prompts * n
MAX_HEAD_BYTES = 32 * 2**10
HEAD_SECONDS = 10.0  # the head of a request must have arrived by then
BODY_SECONDS = 30.0  # a body must have arrived by then
WRITE_SECONDS = 60.0  # a client that reads nothing for so long is dropped
MAX_ARRIVING_BYTES = 32 * 2**20  # of all bodies on their way; beyond, the time of the first begun is up
MAX_UNREAD_BYTES = 32 * 2**20  # of all answers; beyond, who has kept one waiting longest is dropped
UNCOUNTED_BYTES = 16 * 2**10  # that an answer may be ahead of its client without being counted


def field_arguments(field: str) -> dict[str, Any]:
    """The keyword arguments of `pydantic.Field` that hold `field` to its limit."""
    limit = LIMITS[field]
    if limit.type in ("integer", "number"):
        lower = "gt" if limit.is_exclusive else "ge"
        return {lower: limit.minimum, "le": limit.maximum}
    return {"min_length": int(limit.minimum), "max_length": int(limit.maximum)}
