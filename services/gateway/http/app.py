"""The ASGI application: first who it is, then where to; errors get their shape here and nowhere else.

Order of every request: key (401), route (404, 405), body (413, 400), rights and values (the gateway's own checks). A stranger does not
learn which routes there are.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from llmos.errors import LlmosError
from llmos.services.gateway.http.context import Call, Site
from llmos.services.gateway.http.failures import HttpError, as_http, error_response
from llmos.services.gateway.http.routes import ROUTES, Route
from llmos.services.gateway.http.sessions import Session

log = logging.getLogger(__name__)
NO_ROUTE = "(none)"
_HEADERS = ((b"x-content-type-options", b"nosniff"),)


class App:
    """One worker's application."""

    def __init__(self, site: Site, routes: Iterable[Route] = ROUTES) -> None:
        self._site = site
        self._routes = [(route, *compile_path(route.path)[::2]) for route in routes]
        self._own: Session = site.core.sessions.own(site.core, os.geteuid())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        counted = self._site.metrics
        started = time.monotonic()

        async def sending(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]  # type: ignore[misc]
                route = request.scope.get("llmos.route", NO_ROUTE)
                counted.answered(route, int(message["status"]), time.monotonic() - started)  # type: ignore[call-overload]
            await send(message)

        with counted.open.track_inprogress():
            response = await self._answer(request)
            await response(scope, receive, sending)  # type: ignore[arg-type]

    async def _answer(self, request: Request) -> ASGIApp:
        is_anthropic = request.url.path.startswith("/v1/messages")
        try:
            route = self._find(request)
            session = self._own if route is not None and route.is_open else self._site.access.session(request)
            if route is None:
                raise self._no_route(request)
            return await route.endpoint(Call(request, session, self._site))
        except (LlmosError, HttpError) as error:
            return self._failed(request, as_http(error), is_anthropic)
        except Exception as error:
            log.error("%s %s: a bug", request.method, request.url.path, exc_info=error)
            bug = HttpError(500, "internal error", kind="server_error", code="internal_error")
            return self._failed(request, bug, is_anthropic)

    def _failed(self, request: Request, error: HttpError, is_anthropic: bool) -> Response:
        return error_response(error, anthropic=is_anthropic)

    def _find(self, request: Request) -> Route | None:
        for route, pattern, converters in self._routes:
            if route.method != request.method and not (route.method == "GET" and request.method == "HEAD"):
                continue
            found = pattern.match(request.url.path)
            if found is not None:
                request.scope["llmos.route"] = route.path
                request.scope["path_params"] = {
                    name: converters[name].convert(value) for name, value in found.groupdict().items()
                }
                return route
        return None

    def _no_route(self, request: Request) -> HttpError:
        path = re.sub(r"[^\x20-\x7e]", "?", request.url.path[:200])
        methods = sorted({route.method for route, pattern, _ in self._routes if pattern.match(request.url.path)})
        if methods:
            error = HttpError(405, f"{request.method} {path}: only {', '.join(methods)}", code="method_not_allowed")
            error.headers["allow"] = ", ".join(methods)
            return error
        return HttpError(404, f"no route {request.method} {path}", kind="not_found_error", code="no_such_route")
