"""Who may come in over HTTP. A request says who it is by a key (`Authorization: Bearer` or `x-api-key`), or, in a browser, by a cookie.

A browser gets its cookie with a one-time link: `llmosctl open` leaves a file in the run directory that is named by the SHA-256 of the
link's token; whoever presents the token takes the file away, which works once over all workers. A cookie names a key and when it ends,
under an HMAC; its secret is a file of the state directory, so that every worker, and every next one, can check it. It is worth as much as
its key: revoking that ends it. Invariant: only the daemon's user and root can leave such a file, and they are administrators anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

import msgspec
from starlette.requests import Request

from llmos.errors import LlmosError, Unauthorized
from llmos.http_links import LINK_FOLDER, Link, link_name
from llmos.keys.keyfile import Key
from llmos.keys.private import locked, problem_of, replace_private
from llmos.services.gateway.http.failures import HttpError
from llmos.services.gateway.http.sessions import HttpCore, Session

COOKIE = "llmos_session"
COOKIE_S = 12 * 3600
_SECRET_FILE = "http.secret"
_MAX_BYTES = 4096
_SAFE = ("GET", "HEAD", "OPTIONS")


class Access:
    """Finds the session of a request."""

    def __init__(self, core: HttpCore, run_dir: Path, state_dir: Path) -> None:
        self._core = core
        self._links = run_dir / LINK_FOLDER
        self._state_dir = state_dir
        self._secret = b""

    def session(self, request: Request) -> Session:
        """Raises `Unauthorized`."""
        secret = _bearer(request)
        if secret:
            return self._core.session(self._core.find_key(secret))
        cookie = request.cookies.get(COOKIE)
        if cookie:
            _check_same_origin(request)
            return self._core.session(self._read_cookie(cookie))
        raise Unauthorized("a key is needed: Authorization: Bearer llmos_sk_... (llmosctl env shows it)", field="key")

    def take_link(self, token: str) -> str:
        """The cookie's value for a link that nobody took before; raises `Unauthorized`."""
        path = self._links / link_name(token)
        claimed = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            path.rename(claimed)  # one of any number of takers
            with claimed.open("rb") as file:
                if (problem := problem_of(os.fstat(file.fileno()))) is not None:
                    raise Unauthorized(f"the link: {problem}", field="token")
                link = msgspec.json.decode(file.read(_MAX_BYTES), type=Link)
        except (OSError, msgspec.DecodeError):
            raise Unauthorized(
                "this link is unknown, was used or is too old: llmosctl open makes another", field="token"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                claimed.unlink()
        if not link.until - time.time() >= 0:
            raise Unauthorized("this link is too old: llmosctl open makes another", field="token")
        self._core.keys.refresh(time.monotonic(), at_once=True)
        if self._core.keys.by_id(link.key_id) is None:
            raise Unauthorized("this link's key was revoked", field="token")
        until = int(time.time()) + COOKIE_S
        return f"{link.key_id}.{until}.{self._sign(link.key_id, until)}"

    def _read_cookie(self, text: str) -> Key:
        key_id, _, rest = text.partition(".")
        until, _, given = rest.partition(".")
        if not until.isascii() or not until.isdigit() or len(until) > 12:
            raise Unauthorized("this session is not known", field="key")
        if not hmac.compare_digest(self._sign(key_id, int(until)).encode(), given.encode()):
            raise Unauthorized("this session is not known", field="key")
        self._core.keys.refresh(time.monotonic(), at_once=True)
        key = self._core.keys.by_id(key_id)
        if key is None or int(until) < time.time():
            raise Unauthorized("this session is over: llmosctl open begins another", field="key")
        return key

    def _sign(self, key_id: str, until: int) -> str:
        if not self._secret:
            self._secret = _cookie_secret(self._state_dir)
        return hmac.new(self._secret, f"{key_id}.{until}".encode(), hashlib.sha256).hexdigest()


def _bearer(request: Request) -> str:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    if kind:
        return secret.strip() if kind.lower() == "bearer" else ""
    return request.headers.get("x-api-key", "").strip()


def _check_same_origin(request: Request) -> None:
    """A cookie comes by itself: what it changes must be asked for by our own page."""
    if request.method in _SAFE:
        return
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin", "")
    host = request.headers.get("host", "")
    if site == "same-origin" or (site is None and origin.partition("://")[2] == host and host):
        return
    raise HttpError(
        403, "a session in a browser may only be used by its own page", kind="permission_error", code="origin"
    )


def _cookie_secret(state_dir: Path) -> bytes:
    """Made when it is first needed; all workers have the same."""
    path = state_dir / _SECRET_FILE
    with locked(state_dir, "keys"):
        try:
            with path.open("rb") as file:
                if (problem := problem_of(os.fstat(file.fileno()))) is not None:
                    raise LlmosError(f"{path}: {problem}")
                found = file.read(_MAX_BYTES)
        except FileNotFoundError:
            found = secrets.token_hex(32).encode()
            replace_private(path, found)
    if len(found) < 64:
        raise LlmosError(f"{path} is damaged; delete it, and sessions begin anew")
    return found
