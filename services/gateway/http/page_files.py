"""GET / and /page/NAME: the page for browsers. Its files are fixed, hold no secret and are for everybody; what it shows needs a key.

A content security policy lets it load and ask nothing but this gateway. Files are read once.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp

from llmos.services.gateway.http.context import Call
from llmos.services.gateway.http.failures import HttpError

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; object-src 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
}


@cache
def _files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _TYPES}


async def page(call: Call) -> ASGIApp:
    return _answer("index.html")


async def page_file(call: Call) -> ASGIApp:
    return _answer(call.request.path_params["name"])


def _answer(name: str) -> Response:
    content = _files().get(name)
    if content is None:
        raise HttpError(404, f"the page has no file {name[:100]!r}", kind="not_found_error", code="no_such_route")
    return Response(content, 200, _HEADERS, _TYPES[Path(name).suffix])
