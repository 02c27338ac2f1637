"""GET /open: a one-time link becomes a session of the browser. The page itself is elsewhere."""

from __future__ import annotations

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp

from llmos.services.gateway.http.access import COOKIE, COOKIE_S
from llmos.services.gateway.http.context import Call


async def open_session(call: Call) -> ASGIApp:
    value = call.site.access.take_link(call.request.query_params.get("token", ""))
    response = RedirectResponse("/", 303, {"cache-control": "no-store", "referrer-policy": "no-referrer"})
    response.set_cookie(
        COOKIE, value, max_age=COOKIE_S, httponly=True, samesite="strict", secure=call.site.is_tls, path="/"
    )
    return response
