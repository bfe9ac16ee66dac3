"""Errors a client may see, and their one wire form: `{"error": {"message", "type", "param", "code"}}`.

A message is always written by hand; the text of an internal exception never reaches a client.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

ErrorBody = dict[str, dict[str, str | None]]

_MAX_TEXT = 1024


class APIError(Exception):
    """An answer other than 2xx. `param` is the field's path in the body, such as `messages[0].content`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002  the wire's own word
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:_MAX_TEXT]  # both may quote the client's own words
        self.type = type
        self.param = param and param[:_MAX_TEXT]
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> ErrorBody:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        return json.dumps(self.body(), ensure_ascii=False).encode()


def renamed(error: APIError, paths: Mapping[str, str]) -> APIError:
    """The error with its field, and what the message quotes of it, under another API's name.

    `paths` maps beginnings of paths, the longer ones first.
    """
    for path, own in paths.items():
        if error.param and (error.param == path or error.param.startswith((f"{path}.", f"{path}["))):
            param = own + error.param.removeprefix(path)
            message = error.message.replace(f"'{error.param}'", f"'{param}'")
            return APIError(
                error.status, message, type=error.type, param=param, code=error.code, headers=error.headers
            )
    return error


def invalid_value(param: str | None, message: str) -> APIError:
    return APIError(400, message, param=param, code="invalid_value")


def invalid_grammar(param: str, pointer: str, message: str) -> APIError:
    """`pointer` is a JSON pointer (RFC 6901) in the value of `param`, empty for the value itself."""
    where = f" (at '{pointer}')" if pointer else ""
    place = f"{param}#{pointer}" if pointer else param
    return APIError(400, f"'{param}': {message}{where}.", param=place, code="invalid_grammar")


def grammar_failed() -> APIError:
    return APIError(
        400,
        "The answer could not be held to its grammar any further, and was given up. A simpler one may do.",
        code="grammar_failed",
    )


def invalid_json(message: str, param: str | None = None) -> APIError:
    return APIError(400, message, param=param, code="invalid_json")


def unsupported_parameter(param: str, message: str) -> APIError:
    return APIError(400, message, param=param, code="unsupported_parameter")


def unknown_parameter(param: str) -> APIError:
    return APIError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")


def context_length_exceeded(num_tokens: int, max_model_len: int, param: str) -> APIError:
    return APIError(
        400,
        f"This model's maximum context length is {max_model_len} tokens, and an answer needs at least one of "
        f"them, but the prompt has {num_tokens} tokens.",
        param=param,
        code="context_length_exceeded",
    )


def model_not_found(model: str) -> APIError:
    return APIError(404, f"The model '{model}' does not exist.", param="model", code="model_not_found")


def invalid_api_key(message: str) -> APIError:
    return APIError(
        401,
        message,
        type="authentication_error",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def invalid_host() -> APIError:
    return APIError(400, "This server does not answer to this Host.", param="host", code="invalid_host")


def queue_full(retry_after: int) -> APIError:
    return APIError(
        429,
        "Too many requests are waiting.",
        type="rate_limit_error",
        code="queue_full",
        headers={"retry-after": str(retry_after)},
    )


def body_too_large(max_bytes: int) -> APIError:
    return APIError(
        413,
        f"The body is larger than {max_bytes} bytes.",
        code="request_too_large",
        headers={"connection": "close"},
    )


def unavailable(message: str, retry_after: int) -> APIError:
    """503 for a server that is starting, draining or broken; `retry_after` is in seconds."""
    return APIError(
        503,
        message,
        type="server_error",
        code="service_unavailable",
        headers={"retry-after": str(retry_after)},
    )


def engine_down() -> APIError:
    return unavailable("The engine has stopped, and is being started again.", 5)


def internal_error() -> APIError:
    return APIError(
        500,
        "The server failed on this request. Its log has the details under this x-request-id.",
        type="server_error",
        code="internal_error",
    )


def from_status(status: int, headers: Mapping[str, str] | None = None) -> APIError:
    """The error for a bare HTTP status, such as the router's own 404 and 405."""
    messages = {
        404: ("There is no such route.", "not_found"),
        405: ("This route does not take this method.", "method_not_allowed"),
    }
    message, code = messages.get(status, (HTTPStatus(status).phrase, None))
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return APIError(status, message, type=kind, code=code, headers=headers)
