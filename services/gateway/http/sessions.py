"""Clients in this process: one session per key, which speaks the messages of the client ports without a socket between.

An HTTP request is one or more requests of its key's session, each with a number and a sink: a callable that gets every message of it. Sinks
are called while the router works, so they must neither block nor send. Invariants: a number is never reused; after its last message, or
after `leave`, a sink gets nothing more.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from llmos.errors import LlmosError, ProtocolError, Unauthorized
from llmos.keys.keyfile import Key
from llmos.keys.ring import KeyRing
from llmos.ports.core import Peer
from llmos.ports.endpoint import RunDir
from llmos.protocol.failures import error_message, typed
from llmos.protocol.messages import Accepted, Ack, Cancel, ControlVerb, Error, Message, PromptLogprobs, Tokens
from llmos.services.gateway.audit import AuditLog
from llmos.services.gateway.clients import Client
from llmos.services.gateway.core import TICK_S, GatewayCore
from llmos.services.gateway.owners import Asker

Sink = Callable[[Any], None]
M = TypeVar("M", bound=Message)
_SELF = b"self"  # the gateway's own session


class Session:
    """All that one key has open in this process."""

    def __init__(self, core: HttpCore, peer: Peer) -> None:
        self.peer = peer
        self.id = peer.routing_id
        self.requests: dict[int, int] = {}
        self._core = core
        self._sinks: dict[int, Sink] = {}
        self._numbers = itertools.count(1)

    @property
    def asker(self) -> Asker:
        """Who it is; raises `Unauthorized` if its key was revoked."""
        return self._core.identify(self)

    def deliver(self, message: Any) -> None:
        sink = self._sinks.get(message.req)
        if sink is None:
            return
        if not _goes_on(message):
            del self._sinks[message.req]
        sink(message)

    def send(self, make: Callable[[int], Message], sink: Sink) -> int:
        """Begin a request. What refuses it comes to the sink."""
        req = next(self._numbers)
        self._sinks[req] = sink
        message: Any = make(req)
        now = time.monotonic()
        try:
            if isinstance(message, ControlVerb):
                self._core.relay.ask(self.asker, message, now)
            else:
                self._core.router.on_client(self, message, now)
        except LlmosError as error:
            self.deliver(error_message(error, req))
        return req

    def acknowledge(self, req: int, upto: int) -> None:
        self._core.router.on_client(self, Ack(req, upto), time.monotonic())

    def cancel(self, req: int) -> None:
        """The output is to end; its `Finished` comes to the sink."""
        self._core.router.on_client(self, Cancel(req), time.monotonic())

    def leave(self, req: int) -> None:
        """Nobody waits for this any more. A process that stops lets go of nothing: others go on with it."""
        if self._sinks.pop(req, None) is None or self._core.is_stopping:
            return
        self._core.relay.cancel(self.id, req)
        self._core.router.leave(self, req, time.monotonic())

    async def ask(self, make: Callable[[int], Message], expected: type[M]) -> M:
        """One question, one answer; raises the typed error that comes instead."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        req = self.send(make, lambda message: None if answer.done() else answer.set_result(message))
        try:
            found = await answer
        finally:
            self.leave(req)
        if isinstance(found, Error):
            raise typed(found)
        if not isinstance(found, expected):
            raise ProtocolError(f"expected {expected.__name__}, got {type(found).__name__}")
        return found

    def fail_all(self, error: LlmosError) -> None:
        """It is not to be here any more."""
        for req in list(self._sinks):
            self.deliver(error_message(error, req))


def _goes_on(message: Message) -> bool:
    """Does more come for the same request?"""
    return isinstance(message, (Tokens, Accepted, PromptLogprobs))


class Sessions:
    """Where router and relay find the clients of this process."""

    def __init__(self) -> None:
        self._by_id: dict[bytes, Session] = {}

    def of(self, core: HttpCore, key: Key) -> Session:
        client_id = key.id.encode()
        session = self._by_id.get(client_id)
        if session is None:
            peer = Peer(client_id, 0, "client", f"http {key.id}", 0, None, key.id)
            session = self._by_id[client_id] = Session(core, peer)
        return session

    def own(self, core: HttpCore, uid: int) -> Session:
        """The gateway's own questions, as an administrator."""
        if _SELF not in self._by_id:
            self._by_id[_SELF] = Session(core, Peer(_SELF, 0, "client", "http", 0, uid))
        return self._by_id[_SELF]

    def find(self, client_id: bytes) -> Session | None:
        return self._by_id.get(client_id)

    def send(self, client: Session, message: Message) -> None:
        client.deliver(message)

    def each(self) -> list[Session]:
        return list(self._by_id.values())

    def forget(self, session: Session) -> None:
        self._by_id.pop(session.id, None)


class HttpCore(GatewayCore):
    """The inside of an HTTP worker. `start`, `serve`, `stop`, `close`."""

    def __init__(
        self,
        run_dir: RunDir,
        name: str,
        *,
        max_in_flight: int,
        keys: KeyRing,
        audit: AuditLog | None = None,
    ) -> None:
        super().__init__(run_dir, name, max_in_flight=max_in_flight, keys=keys, audit=audit)
        self.keys = keys
        self.sessions = Sessions()
        self.is_stopping = False
        self.router.clients = self.sessions

    async def start(self) -> None:
        """Reach the services; raises `Unavailable` if they do not answer in time."""
        await self.connect()
        self._run(self._tick())

    def stop(self) -> None:
        """From now on nothing is let go of: the next process finds all as it is."""
        self.is_stopping = True

    def session(self, key: Key) -> Session:
        return self.sessions.of(self, key)

    def find_key(self, secret: str) -> Key:
        """Raises `Unauthorized`."""
        self.keys.refresh(time.monotonic(), at_once=True)
        key = self.keys.by_secret(secret)
        if key is None:
            raise Unauthorized("this key is unknown or was revoked", field="key")
        return key

    async def _tick(self) -> None:
        while True:
            self._look(time.monotonic())
            await asyncio.sleep(TICK_S)

    def _reply_control(self, client_id: bytes, message: Message) -> None:
        session = self.sessions.find(client_id)
        if session is not None:
            session.deliver(message)

    def _everybody(self) -> Iterable[Client]:
        return self.sessions.each()

    def _show_out(self, client: Client, error: LlmosError) -> None:
        assert isinstance(client, Session)
        client.fail_all(error)
        self.sessions.forget(client)
