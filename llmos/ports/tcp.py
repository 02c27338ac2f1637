"""The client port over TCP: CURVE on both ends, and on the listening one the authenticator that says whose key it is.

libzmq lets every key in where nobody authenticates, unless ZAP_ENFORCE_DOMAIN is set and the domain is not empty; here both always are
(`tcp_check.py` tests it on the live port). Invariants: a message that a `TcpListener` hands on comes from a key that the authenticator
accepted, and carries its id, whatever its Hello says; while no authenticator answers, nobody gets in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from llmos.errors import DaemonNotRunning, InvalidRequest, Unauthorized, Unavailable
from llmos.ports.aio import AsyncDialer, AsyncListener
from llmos.ports.monitor import LossMonitor
from llmos.protocol.codec import Schema

DOMAIN = b"llmos"
HANDSHAKE_S = 5.0
_HEARTBEAT_MS, _DEAD_AFTER_MS = 10_000, 30_000  # a peer whose machine is gone; a hung process answers these, too
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_MAX_FAILURES = 3  # handshakes that end without a word: the first may be the end of a gateway
M = TypeVar("M")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client needs: the server's public key, and its own two halves. All Z85."""

    server: bytes
    public: bytes
    secret: bytes = field(repr=False)


class TcpListener(AsyncListener[M]):
    """The listening end. `context` must be one in which an `Authenticator` runs."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        url: str,
        secret: bytes,
        name: str,
        schema: Schema[M],
        roles: frozenset[str],
        *,
        incarnation: int = 0,
        max_peers: int = 64,
    ) -> None:
        self._open(context, name, schema, roles, incarnation, max_peers)
        _configure(self.socket, url)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
        try:
            self.socket.bind(url)
        except zmq.ZMQError as error:
            self.socket.close()
            raise Unavailable(f"can not listen on {url}: {error.strerror}", field="gateway.tcp") from None

    def _identity(self, frame: zmq.Frame) -> tuple[int | None, str]:
        key_id = frame.get("User-Id")  # libzmq's own: the client can not set it
        assert isinstance(key_id, str)
        assert key_id, "a message without a key"
        return None, key_id


class TcpDialer(AsyncDialer[M]):
    """The connecting end."""

    def __init__(self, url: str, credentials: Credentials, name: str, schema: Schema[M]) -> None:
        self._open(name, url, schema)
        _configure(self.socket, url)
        self.socket.setsockopt(zmq.CURVE_SERVERKEY, credentials.server)
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, credentials.public)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, credentials.secret)
        try:
            self.socket.connect(url)
        except zmq.ZMQError as error:
            self.socket.close()
            raise InvalidRequest(f"url: {url!r}: {error.strerror}", field="url") from None


class Authenticator:
    """Answers libzmq's question (ZAP) about every connection to the TCP listeners of a context. `judge` maps a public key in Z85 to the
    id of a key, or None: refused.

    If `judge` raises, the connection is refused and so is every later one: `run` raises, and its owner must end.
    """

    def __init__(self, context: zmq.asyncio.Context, judge: Callable[[str], str | None]) -> None:
        self._judge = judge
        self._socket: zmq.asyncio.Socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ENDPOINT)
        self.accepted = 0
        self.refused = 0
        self.quiet = False  # while we knock ourselves

    async def run(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            key_id = None
            try:
                key_id = self._decide(frames)
            finally:
                status = (b"200", b"OK", key_id.encode()) if key_id else (b"400", b"unknown key", b"")
                # The frames up to the request number go back as they came; then version, number, status, text, user id, no metadata.
                await self._socket.send_multipart([frames[0], b"", b"1.0", frames[3], *status, b""])

    def _decide(self, frames: list[bytes]) -> str | None:
        # peer, empty, version, number, domain, address, routing id, mechanism, credentials
        key_id = None
        if len(frames) == 9 and frames[4] == DOMAIN and frames[7] == b"CURVE" and len(frames[8]) == 32:
            key_id = self._judge(z85.encode(frames[8]).decode())
        if key_id:
            self.accepted += 1
        else:
            self.refused += 1
            # A flood must not fill the log: the first ones, then powers of two.
            if self.refused & (self.refused - 1) == 0 and not self.quiet:
                address = frames[5].decode(errors="replace") if len(frames) > 5 else "?"
                log.warning(
                    "refused a client at %s: unknown or revoked key; %d refused until now", address, self.refused
                )
        return key_id

    def close(self) -> None:
        self._socket.close()


class HandshakeMonitor(LossMonitor):
    """Also tells why a connection does not come about."""

    _EVENTS = (
        zmq.EVENT_DISCONNECTED
        | zmq.EVENT_CLOSED
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    )

    def __init__(self, socket: zmq.asyncio.Socket, where: str) -> None:
        super().__init__(socket)
        self._where = where

    async def lost(self) -> None:
        """As there; raises `DaemonNotRunning` if nobody listens, `Unauthorized` if the server or the client refuses the other."""
        failures, failed = 0, False
        while True:
            event = parse_monitor_message(await self._events.recv_multipart())
            kind, value = event["event"], event["value"]
            if kind == zmq.EVENT_CLOSED:
                raise DaemonNotRunning(f"nobody listens on {self._where}", field="url")
            if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                if value == 400:
                    raise Unauthorized(f"{self._where} refuses this key: it is unknown or revoked", field="key")
                raise Unavailable(f"{self._where} can not check keys now")
            if kind == zmq.EVENT_DISCONNECTED:
                if not failed:
                    return
                failed = False  # libzmq tries again
                continue
            failures, failed = failures + 1, True
            if failures >= _MAX_FAILURES or kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                text = f"{self._where} does not complete the handshake: its key is not the server_key given, or it is no llmosd"
                raise Unauthorized(text, field="server_key")


def _configure(socket: zmq.Socket[Any], url: str) -> None:
    socket.setsockopt(zmq.IPV6, int("[" in url))  # set, "localhost" might only be tried as ::1
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _DEAD_AFTER_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, int(HANDSHAKE_S * 1000))
