"""Typed exceptions as the wire's `Error`, and back."""

from __future__ import annotations

from llmos.errors import LlmosError, from_code
from llmos.protocol.messages import Error


def error_message(error: LlmosError, req: int) -> Error:
    """A typed exception as the answer to request `req`."""
    retry_after_ms = None if error.retry_after_s is None else error.retry_after_s * 1e3
    return Error(req, int(error.code), error.message, error.field, error.rid, retry_after_ms)


def typed(message: Error) -> LlmosError:
    """The exception that a wire error stands for."""
    retry_after_s = None if message.retry_after_ms is None else message.retry_after_ms / 1e3
    return from_code(message.code, message.message, field=message.field, rid=message.rid, retry_after_s=retry_after_s)
