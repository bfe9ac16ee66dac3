"""POST /v1/rerank and /v1/score: how near texts are, as the cosine of their embeddings."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jinn.server import errors
from jinn.server.auth import GuardedRoute
from jinn.server.body import read_json_object
from jinn.server.models import Models
from jinn.server.parameters import ACCEPTED_READING, Columns, take_implemented
from jinn.server.reading import named, normalised
from jinn.server.routes.embeddings import TextList
from jinn.server.schemas import limited, validate
from jinn.server.structured import Strict
from jinn.server.wire import reading_usage_fields


def _document_text(value: Any) -> Any:
    return value["text"] if isinstance(value, dict) and set(value) == {"text"} else value


Document = Annotated[str, BeforeValidator(_document_text)]


class RerankRequest(Strict):
    model: str = limited("model", "The served name, the file's name, or 'default'.", "default")
    query: str = Field(description="What the documents are compared with.", min_length=1)
    documents: Annotated[list[Document], Field(fail_fast=True)] = limited("documents", "Texts.", ...)
    top_n: int | None = limited("top_n", "Only the best so many.")
    return_documents: bool = Field(False, description="Repeat each document's text.")


class ScoreRequest(Strict):
    model: str = limited("model", "The served name, the file's name, or 'default'.", "default")
    text_1: TextList = limited("input", "A text, or as many as in text_2.", ...)
    text_2: TextList = limited("input", "A text, or several.", ...)


RERANK_COLUMNS = Columns(frozenset(RerankRequest.model_fields), ACCEPTED_READING, {})
SCORE_COLUMNS = Columns(frozenset(ScoreRequest.model_fields), ACCEPTED_READING, {})


async def rerank(request: Request) -> Response:
    """Documents by how near they are to a query, the nearest first."""
    models: Models = request.app.state.models
    models.admit()
    fields = take_implemented(await read_json_object(request), RERANK_COLUMNS, "", models.ignored_fields())
    body = validate(RerankRequest, fields)
    service = await models.acquire(request, body.model)
    vectors, usage = await service.embed(
        request, [*named("documents", body.documents), ("query", body.query)]
    )
    *documents, query = normalised(vectors)
    scores = [float(document @ query) for document in documents]
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    results: list[dict[str, Any]] = []
    for index in order[: body.top_n]:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            result["document"] = {"text": body.documents[index]}
        results.append(result)
    return JSONResponse(
        {
            "id": f"rerank-{secrets.token_hex(12)}",
            "model": service.name_for(request),
            "results": results,
            "usage": reading_usage_fields(usage),
        }
    )


async def score(request: Request) -> Response:
    """How near the texts of two lists are, pair by pair; one text is compared with each of the others."""
    models: Models = request.app.state.models
    models.admit()
    fields = take_implemented(await read_json_object(request), SCORE_COLUMNS, "", models.ignored_fields())
    body = validate(ScoreRequest, fields)
    service = await models.acquire(request, body.model)
    if len(body.text_1) not in (1, len(body.text_2)):
        raise errors.invalid_value("text_1", "'text_1' must be one text, or as many as 'text_2'.")
    vectors, usage = await service.embed(
        request, [*named("text_2", body.text_2), *named("text_1", body.text_1)]
    )
    unit = normalised(vectors)
    scores = (unit[: len(body.text_2)] * unit[len(body.text_2) :]).sum(axis=1)
    return JSONResponse(
        {
            "id": f"score-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": service.name_for(request),
            "data": [
                {"index": index, "object": "score", "score": value}
                for index, value in enumerate(scores.tolist())
            ],
            "usage": reading_usage_fields(usage),
        }
    )


ROUTES = [
    GuardedRoute("/v1/rerank", rerank, methods=["POST"]),
    GuardedRoute("/v1/score", score, methods=["POST"]),
]
