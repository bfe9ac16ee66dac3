"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from jinn.server import errors
from jinn.server.auth import GuardedRoute
from jinn.server.body import read_json_object
from jinn.server.models import Models
from jinn.server.parameters import ACCEPTED_READING, Columns, take_implemented
from jinn.server.reading import named, normalised
from jinn.server.schemas import limited, listed, validate
from jinn.server.structured import Strict
from jinn.server.wire import reading_usage_fields, to_json

TextList = Annotated[
    list[str], Field(fail_fast=True), BeforeValidator(listed, json_schema_input_type=str | list[str])
]


class EmbeddingRequest(Strict):
    model: str = limited("model", "The served name, the file's name, or 'default'.", "default")
    input: TextList = limited("input", "A text, or several.", ...)
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: the bytes of little-endian float32 numbers."
    )
    dimensions: int | None = limited("dimensions", "Only the first so many, scaled to length 1 again.")


COLUMNS = Columns(frozenset(EmbeddingRequest.model_fields), ACCEPTED_READING, {})


async def create_embeddings(request: Request) -> Response:
    """A vector of length 1 for each text."""
    models: Models = request.app.state.models
    models.admit()
    fields = take_implemented(await read_json_object(request), COLUMNS, "", models.ignored_fields())
    _refuse_token_ids(fields.get("input"))
    body = validate(EmbeddingRequest, fields)
    service = await models.acquire(request, body.model)
    vectors, usage = await service.embed(request, named("input", body.input))
    if body.dimensions is not None and body.dimensions > vectors.shape[1]:
        raise errors.invalid_value(
            "dimensions", f"'dimensions': this model's embeddings have {vectors.shape[1]}."
        )
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(row, body.encoding_format)}
            for index, row in enumerate(normalised(vectors, body.dimensions))
        ],
        "model": service.name_for(request),
        "usage": reading_usage_fields(usage),
    }
    return Response(to_json(answer), media_type="application/json")


def _refuse_token_ids(texts: Any) -> None:
    """Clients that send ids took them from another model's tokenizer, and would get nonsense."""
    if isinstance(texts, list) and texts and isinstance(texts[0], int | list):
        raise errors.invalid_value(
            "input",
            "'input' must be text: token ids of another model's tokenizer mean nothing to this one. "
            "LangChain sends text with check_embedding_ctx_length=False.",
        )


def _encoded(row: Any, encoding_format: str) -> list[float] | str:
    if encoding_format == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    values: list[float] = row.tolist()
    return values


ROUTES = [GuardedRoute("/v1/embeddings", create_embeddings, methods=["POST"])]
