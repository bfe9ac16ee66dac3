"""Every known request parameter stands in one of three columns, so that none is silently ignored.

Implemented: a field of the API's model in schemas.py. Accepted: here, because it cannot change the answer.
Refused: here, answered with a 400 that names it, unless the value asks for nothing. `null` means absent.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from jinn.server import errors


@dataclass(frozen=True, slots=True)
class Columns:
    """The parameters of one API. `refused` maps a name to the values that ask for nothing, and so pass."""

    implemented: Collection[str]
    accepted: Collection[str]
    refused: dict[str, tuple[Any, ...]]


ACCEPTED: dict[str, str] = {
    "user": "names an end user",
    "safety_identifier": "names an end user",
    "metadata": "labels for a stored answer",
    "store": "nothing is ever stored",
    "service_tier": "there is one tier",
    "prompt_cache_key": "prompts are matched by content",
    "prompt_cache_retention": "prompts are kept while there is room",
    "prediction": "could only make the answer come sooner",
}

ACCEPTED_READING = {"user": ACCEPTED["user"]}  # by APIs that generate nothing

_REFUSED_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "typical_p": (1,),
    "mirostat": (0,),
    "cache_salt": (),
    "priority": (0,),
}

REFUSED_CHAT: dict[str, tuple[Any, ...]] = {
    **_REFUSED_EVERYWHERE,
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "reasoning": (),
    "verbosity": ("medium",),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
}

REFUSED_COMPLETION: dict[str, tuple[Any, ...]] = {**_REFUSED_EVERYWHERE}

REFUSED_MESSAGE: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "audio": (),
    "refusal": ("",),
}

ACCEPTED_MESSAGE: dict[str, str] = {
    "annotations": "citations of an earlier answer",
    "parsed": "what a client read from the content",
}


def take_implemented(
    body: dict[str, Any], columns: Columns, path: str = "", ignored: list[str] | None = None
) -> dict[str, Any]:
    """The implemented parameters of `body` that are not null.

    Raises APIError 400 for a refused parameter, and for an unknown one unless `ignored` collects it.
    """
    taken = {}
    for name, value in body.items():
        param = f"{path}.{name}" if path else name
        if name in columns.implemented:
            if value is not None:
                taken[name] = value
        elif name in columns.refused:
            if value is not None and not any(_is_same(value, harmless) for harmless in columns.refused[name]):
                raise errors.unsupported_parameter(param, f"'{param}' is not supported by this server.")
        elif name not in columns.accepted:
            if ignored is None:
                raise errors.unknown_parameter(param)
            ignored.append(param)
    return taken


def _is_same(value: Any, harmless: Any) -> bool:
    """Equal in JSON's sense, where `true` is not 1."""
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
