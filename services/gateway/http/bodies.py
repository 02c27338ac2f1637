"""Request bodies: read within their limits, then decoded straight into typed structs. Nothing is ignored in silence.

A field of a body is one of four: known (in the struct), refused by name (`REFUSED`, unless its value asks for nothing), without effect
(`WITHOUT_EFFECT`; the response says so in the header `llmos-no-effect`), or unknown, which is an error too.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from llmos.services.gateway.http.failures import HttpError, unsupported

T = TypeVar("T")
BODY_TIMEOUT_S = 30.0
_WHERE = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_MISSING = re.compile(r"Object missing required field `(.*)`")
_TOP = dict[str, msgspec.Raw]


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a field is refused, and with which values it asks for nothing (JSON)."""

    why: str
    neutral: tuple[Any, ...] = (None,)


async def read_body(request: Request, most: int) -> bytes:
    """The whole body; raises 413 before it is read where its length is told, else when it is too long."""
    length = request.headers.get("content-length")
    if length is not None and (not length.isdigit() or int(length) > most):
        raise _too_large(most)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise HttpError(400, f"content-encoding {encoding!r:.40} is not supported", code="unsupported_encoding")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise _too_large(most)
                chunks.append(chunk)
    except TimeoutError:
        raise HttpError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="timeout") from None
    except ClientDisconnect:
        raise HttpError(400, "the client left while it sent", code="disconnected") from None
    return b"".join(chunks)


def decode(
    body: bytes, kind: type[T], refused: Mapping[str, Refused], without_effect: frozenset[str] = frozenset()
) -> tuple[T, tuple[str, ...]]:
    """The body as `kind`, and the names of what it has that changes nothing. Raises 400."""
    top = _decode(body, _TOP)
    dropped = []
    idle = []
    for name, raw in top.items():
        rule = refused.get(name)
        if rule is not None:
            if not any(_decode_raw(raw) == value for value in rule.neutral if len(raw) < 64):
                raise unsupported(name, rule.why)
            dropped.append(name)
        elif name in without_effect:
            dropped.append(name)
            if bytes(raw) != b"null":
                idle.append(name)
    if dropped:
        body = msgspec.json.encode({name: raw for name, raw in top.items() if name not in dropped})
    return _decode(body, kind), tuple(idle)


def plain(body: bytes, kind: type[T]) -> T:
    """As `decode`, where there is nothing to refuse. An empty body is an empty object."""
    return _decode(body or b"{}", kind)


def _decode_raw(raw: msgspec.Raw) -> Any:
    return _decode(bytes(raw), object)


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply", code="invalid_json") from None


def _invalid(text: str) -> HttpError:
    """msgspec's words, with the field's name taken out of them."""
    where = _WHERE.search(text)
    path = where[1].replace("[...]", "[]") if where else ""
    words = text[: where.start()] if where else text
    code = "invalid_type"
    for pattern, word in ((_UNKNOWN, "unknown_parameter"), (_MISSING, "missing_required_parameter")):
        if (found := pattern.match(words)) is not None:
            path, code = f"{path}.{found[1]}" if path else found[1], word
    named = path.split(".")[0].split("[")[0]
    return HttpError(400, f"{path}: {words}" if path else words, param=path if named else None, code=code)


def _too_large(most: int) -> HttpError:
    error = HttpError(413, f"the body is larger than {most} bytes (http.max_body_mib)", code="request_too_large")
    error.headers["connection"] = "close"
    return error
