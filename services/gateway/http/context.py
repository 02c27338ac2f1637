"""What an endpoint is given beside the request: the process it is in, and who asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from llmos.services.gateway.http.access import Access
from llmos.services.gateway.http.request_metrics import HttpMetrics
from llmos.services.gateway.http.sessions import HttpCore, Session
from llmos.services.gateway.http.token_texts import TokenTexts


@dataclass(slots=True)
class Site:
    """One worker. `max_body`: bytes. `started`: seconds since 1970."""

    core: HttpCore
    access: Access
    max_body: int
    started: int
    is_tls: bool = False
    metrics: HttpMetrics = field(default_factory=HttpMetrics)
    texts: TokenTexts = field(default_factory=TokenTexts)


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `session`: of its key; of open routes the gateway's own."""

    request: Request
    session: Session
    site: Site


Endpoint = Callable[[Call], Awaitable[ASGIApp]]


def json_response(value: object, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")
