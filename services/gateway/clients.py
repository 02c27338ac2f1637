"""The clients of one listening socket: what each has in flight, and what could not be sent to it yet.

A client that does not read fills its socket, then its backlog here; the microkernel's window of unacknowledged tokens
bounds both, and `MAX_BACKLOG` bounds a client that cheats. ZeroMQ does not say when a client leaves, but a send to it
fails: that ends it here, and `probe` sends something harmless (a Welcome) to all, after a connection was lost and now
and then.

Invariants: per client, messages leave in the order in which they were given; none is dropped unless the client is gone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from llmos.ports.aio import AsyncListener
from llmos.ports.core import Peer
from llmos.protocol import handshake
from llmos.protocol.messages import Message

log = logging.getLogger(__name__)
MAX_BACKLOG = 100_000  # messages
R = TypeVar("R")


class ClientState(Generic[R]):
    """One connected client. `requests` by the client's own numbers."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.requests: dict[int, R] = {}
        self.backlog: deque[Message] = deque()


class ClientTable(Generic[R]):
    """Clients by routing id. `on_gone` is called once for each client that left, after it was forgotten."""

    def __init__(self, listener: AsyncListener[Any], on_gone: Callable[[ClientState[R]], None]) -> None:
        self.listener = listener
        self._on_gone = on_gone
        self._clients: dict[bytes, ClientState[R]] = {}

    def of(self, peer: Peer) -> ClientState[R]:
        """The state of a client that just spoke."""
        client = self._clients.get(peer.routing_id)
        if client is None:
            client = self._clients[peer.routing_id] = ClientState(peer)
        client.peer = peer
        return client

    def find(self, routing_id: bytes) -> ClientState[R] | None:
        return self._clients.get(routing_id)

    def send(self, client: ClientState[R], message: Message) -> None:
        """Send now, or later if the client does not read."""
        client.backlog.append(message)
        if len(client.backlog) == 1:
            self._drain(client)
        elif len(client.backlog) > MAX_BACKLOG:
            log.warning("client %r (pid %d) does not read: dropped", client.peer.name, client.peer.pid)
            self._forget(client)

    def flush(self) -> None:
        """Try again to send what is waiting."""
        for client in [client for client in self._clients.values() if client.backlog]:
            self._drain(client)

    def probe(self) -> None:
        """Find out who left."""
        core = self.listener.core
        for peer in list(core.peers.values()):
            before = core.counters.unroutable
            self.listener.send(peer, handshake.welcome(core.name, core.incarnation))
            if core.counters.unroutable != before:
                client = self._clients.get(peer.routing_id)
                if client is None:
                    core.forget(peer)
                else:
                    self._forget(client)

    def _drain(self, client: ClientState[R]) -> None:
        counters = self.listener.core.counters
        while client.backlog:
            before = counters.unroutable
            if not self.listener.send(client.peer, client.backlog[0]):
                if counters.unroutable != before:
                    self._forget(client)
                return
            client.backlog.popleft()

    def _forget(self, client: ClientState[R]) -> None:
        client.backlog.clear()
        self.listener.core.forget(client.peer)
        if self._clients.pop(client.peer.routing_id, None) is not None:
            self._on_gone(client)
