"""Errors as HTTP says them: a status, the OpenAI or the Anthropic shape, and when to try again.

The table below is the only place that knows which typed error has which status. `param` is the field in the caller's own words, `code` a
word that programs may compare.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response

from llmos.codes import ErrorCode
from llmos.errors import LlmosError

_RETRY_S = {429: 1, 503: 2}  # where the microkernel could not tell
# error code: (HTTP status, OpenAI type, OpenAI code)
STATUS: dict[ErrorCode, tuple[int, str, str]] = {
    ErrorCode.INVALID_REQUEST: (400, "invalid_request_error", "invalid_value"),
    ErrorCode.CONTEXT_TOO_LONG: (400, "invalid_request_error", "context_length_exceeded"),
    ErrorCode.UNAUTHORIZED: (401, "authentication_error", "invalid_api_key"),
    ErrorCode.PERMISSION: (403, "permission_error", "permission_denied"),
    ErrorCode.NOT_FOUND: (404, "not_found_error", "not_found"),
    ErrorCode.WRONG_STATE: (409, "conflict_error", "wrong_state"),
    ErrorCode.PROTOCOL: (400, "invalid_request_error", "invalid_request"),
    ErrorCode.OVERLOADED: (429, "rate_limit_error", "overloaded"),
    ErrorCode.UNAVAILABLE: (503, "service_unavailable_error", "unavailable"),
    ErrorCode.NOT_RUNNING: (503, "service_unavailable_error", "unavailable"),
    ErrorCode.TIMEOUT: (503, "service_unavailable_error", "timeout"),
    ErrorCode.SEQUENCE_FAILED: (500, "server_error", "sequence_failed"),
}
_INTERNAL = (500, "server_error", "internal_error")
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class HttpError(Exception):
    """An error that only HTTP knows (no such route, too large, ...) or that names its own code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s: float | None = None
        self.headers: dict[str, str] = {}


def unsupported(name: str, why: str) -> HttpError:
    """A field that is refused by its name."""
    return HttpError(400, f"{name} is not supported: {why}", param=name, code="unsupported_parameter")


def as_http(error: LlmosError | HttpError, names: dict[str, str] | None = None) -> HttpError:
    """A typed error as HTTP has it. `names`: what the caller calls the fields."""
    if isinstance(error, HttpError):
        return error
    status, kind, code = STATUS.get(error.code, _INTERNAL)
    if error.code == ErrorCode.NOT_FOUND and error.field == "model":
        code = "model_not_found"
    field = error.field
    found = HttpError(status, error.message, kind=kind, param=(names or {}).get(field or "", field), code=code)
    found.retry_after_s = error.retry_after_s
    return found


def openai_body(error: HttpError) -> dict[str, Any]:
    return {
        "error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code or None},
    }


def anthropic_body(error: HttpError) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_response(error: HttpError, *, anthropic: bool = False) -> Response:
    headers = dict(error.headers)
    if error.status in _RETRY_S:
        wait = _RETRY_S[error.status] if error.retry_after_s is None else max(1, math.ceil(error.retry_after_s))
        headers["retry-after"] = str(wait)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = anthropic_body(error) if anthropic else openai_body(error)
    return Response(msgspec.json.encode(body), error.status, headers, "application/json")
