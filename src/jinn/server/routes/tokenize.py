"""POST /tokenize and /detokenize: text to a model's token ids and back."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jinn.server.auth import GuardedRoute
from jinn.server.body import read_json_object
from jinn.server.models import Models
from jinn.server.parameters import ACCEPTED_READING, Columns, take_implemented
from jinn.server.schemas import TokenIdList, check_token_ids, limited, parse_chat, validate
from jinn.server.service import Service
from jinn.server.structured import Strict
from jinn.server.turns import prepare_turn
from jinn.server.wire import token_text


class _Naming(Strict):
    return_token_strs: bool = Field(False, description="Name each token's text.")


class TokenizeRequest(_Naming):
    """A text; or, in its place, `messages` and all that chat completions know."""

    model: str = limited("model", "The served name, the file's name, or 'default'.", "default")
    prompt: str = Field(description="The text.")
    parse_special: bool = Field(True, description="Text of control tokens becomes those tokens.")
    add_special_tokens: bool = Field(True, description="Begin as the model expects.")


class DetokenizeRequest(Strict):
    model: str = limited("model", "The served name, the file's name, or 'default'.", "default")
    tokens: TokenIdList = limited("tokens", "Token ids.", ...)
    skip_special_tokens: bool = Field(False, description="Leave control tokens out.")


_NAMING_COLUMNS = Columns(frozenset(_Naming.model_fields), {}, {})
TOKENIZE_COLUMNS = Columns(frozenset(TokenizeRequest.model_fields), ACCEPTED_READING, {})
DETOKENIZE_COLUMNS = Columns(frozenset(DetokenizeRequest.model_fields), ACCEPTED_READING, {})


async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of a conversation."""
    models: Models = request.app.state.models
    models.admit()
    ignored = models.ignored_fields()
    body = await read_json_object(request)
    if "messages" in body:
        own = {name: body.pop(name) for name in _Naming.model_fields if name in body}
        is_named = validate(_Naming, take_implemented(own, _NAMING_COLUMNS)).return_token_strs
        chat = parse_chat(body, ignored)
        service = await models.acquire(request, chat.model)
        ready = service.admit()
        turn = await prepare_turn(service, chat.turn(), service.sampling_defaults)
        token_ids = list(turn.prompt_ids)
    else:
        text = validate(TokenizeRequest, take_implemented(body, TOKENIZE_COLUMNS, "", ignored))
        service = await models.acquire(request, text.model)
        ready = service.admit()
        token_ids = await _encode(service, text)
        is_named = text.return_token_strs
    token_bytes = service.tokenizer.token_bytes
    fields: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": ready.max_model_len,
        "tokens": token_ids,
        "token_strs": [token_text(token_bytes(i)) for i in token_ids] if is_named else None,
    }
    return JSONResponse(fields)


async def _encode(service: Service, text: TokenizeRequest) -> list[int]:
    return await service.run_text(
        len(text.prompt),
        service.tokenizer.encode,
        text.prompt,
        parse_special=text.parse_special,
        add_bos=None if text.add_special_tokens else False,
    )


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    models: Models = request.app.state.models
    models.admit()
    fields = take_implemented(
        await read_json_object(request), DETOKENIZE_COLUMNS, "", models.ignored_fields()
    )
    body = validate(DetokenizeRequest, fields)
    service = await models.acquire(request, body.model)
    ready = service.admit()
    check_token_ids("tokens", body.tokens, ready.vocab_size)
    text = await service.run_text(
        len(body.tokens), service.tokenizer.decode, body.tokens, skip_special=body.skip_special_tokens
    )
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """The texts of the default model's tokens at the ends of a text; null where it has none."""
    models: Models = request.app.state.models
    models.admit()
    service = await models.acquire(request, "default")
    tokenizer = service.tokenizer
    eos_token_id = next(iter(tokenizer.eos_token_ids), None)
    ids = {"bos_token": tokenizer.bos_token_id, "eos_token": eos_token_id}
    return JSONResponse(
        {name: None if i is None else tokenizer.decode([i], skip_special=False) for name, i in ids.items()}
    )


ROUTES = [
    GuardedRoute("/tokenize", tokenize, methods=["POST"]),
    GuardedRoute("/detokenize", detokenize, methods=["POST"]),
    GuardedRoute("/tokenizer_info", tokenizer_info, methods=["GET"]),
]
