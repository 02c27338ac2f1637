"""The clients of one listening socket: what each has in flight, and what could not be sent to it yet.

A client that does not read fills its socket, then its backlog here; the microkernel's window of unacknowledged tokens
bounds both, and `MAX_BACKLOG` and `MAX_BACKLOG_BYTES` bound a client that cheats, or asks on without reading answers.
ZeroMQ does not say when a client leaves, but a send to it fails: that ends it here, and `probe` sends something
harmless (a Welcome) to all, after a connection was lost and now and then.

Invariants: per client, messages leave in the order in which they were given; none is dropped unless the client is gone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from llmos.ports.aio import AsyncListener
from llmos.ports.core import Peer
from llmos.protocol.codec import encode
from llmos.protocol.messages import Message

log = logging.getLogger(__name__)
MAX_BACKLOG = 100_000  # messages
MAX_BACKLOG_BYTES = 32 * 1024 * 1024  # more than one frame may have
R = TypeVar("R")


class Client(Protocol):
    """What the router needs of a client, by whatever door it came. `id`: no other client of this gateway has it. `requests`: numbers of
    its open requests by its own numbers."""

    peer: Peer
    id: bytes
    requests: dict[int, int]


class Clients(Protocol):
    """Where the router finds them."""

    def find(self, client_id: bytes) -> Client | None: ...

    def send(self, client: Any, message: Message) -> None: ...


class ClientState(Generic[R]):
    """One connected client. `id`: no other client of this gateway has it. `requests` by the client's own numbers."""

    def __init__(self, peer: Peer, table: ClientTable[R]) -> None:
        self.peer = peer
        self.table = table
        self.id = table.prefix + peer.routing_id
        self.requests: dict[int, R] = {}
        self.backlog: deque[Message] = deque()
        self.sizes: deque[int] = deque()  # bytes of each
        self.backlog_bytes = 0

    def wait(self, message: Message, size: int) -> None:
        self.backlog.append(message)
        self.sizes.append(size)
        self.backlog_bytes += size

    def sent(self) -> None:
        """The oldest one is."""
        self.backlog.popleft()
        self.backlog_bytes -= self.sizes.popleft()


class ClientTable(Generic[R]):
    """Clients of one listener. `on_gone` is called once for each client that left, after it was forgotten. `prefix` of its clients' ids:
    routing ids are only different within one listener.
    """

    def __init__(
        self, listener: AsyncListener[Any], on_gone: Callable[[ClientState[R]], None], prefix: bytes = b""
    ) -> None:
        self.listener = listener
        self.prefix = prefix
        self._on_gone = on_gone
        self._clients: dict[bytes, ClientState[R]] = {}

    def of(self, peer: Peer) -> ClientState[R]:
        """The state of a client that just spoke."""
        client = self._clients.get(peer.routing_id)
        if client is not None and (client.peer.uid, client.peer.key_id) != (peer.uid, peer.key_id):
            self._leave(client)  # its routing id is somebody else's now
            client = None
        if client is None:
            client = self._clients[peer.routing_id] = ClientState(peer, self)
        client.peer = peer
        return client

    def find(self, client_id: bytes) -> ClientState[R] | None:
        if not client_id.startswith(self.prefix):
            return None
        return self._clients.get(client_id.removeprefix(self.prefix))

    def each(self) -> list[ClientState[R]]:
        return list(self._clients.values())

    def send(self, client: ClientState[R], message: Message) -> None:
        """Send now, or later if the client does not read."""
        if not client.backlog and self._send(client, message):
            return
        client.wait(message, len(encode(message)))
        if len(client.backlog) > MAX_BACKLOG or client.backlog_bytes > MAX_BACKLOG_BYTES:
            log.warning("client %r (pid %d) does not read: dropped", client.peer.name, client.peer.pid)
            self._forget(client)

    def flush(self) -> None:
        """Try again to send what is waiting."""
        for client in [client for client in self._clients.values() if client.backlog]:
            self._drain(client)

    def probe(self) -> None:
        """Find out who left."""
        core = self.listener.core
        for peer in core.unreachable(self.listener.send):
            client = self._clients.get(peer.routing_id)
            if client is None:
                core.forget(peer)
            else:
                self._forget(client)

    def _drain(self, client: ClientState[R]) -> None:
        while client.backlog and self._send(client, client.backlog[0]):
            if client.backlog:
                client.sent()

    def _send(self, client: ClientState[R], message: Message) -> bool:
        """Is it dealt with: is it on its way, or the client gone?"""
        counters = self.listener.core.counters
        before = counters.unroutable
        if self.listener.send(client.peer, message):
            return True
        if counters.unroutable == before:
            return False
        self._forget(client)
        return True

    def _forget(self, client: ClientState[R]) -> None:
        self.listener.core.forget(client.peer)
        self._leave(client)

    def _leave(self, client: ClientState[R]) -> None:
        client.backlog.clear()
        client.sizes.clear()
        if self._clients.pop(client.peer.routing_id, None) is not None:
            self._on_gone(client)


class ClientTables(Generic[R]):
    """The clients of several listeners."""

    def __init__(self, *tables: ClientTable[R]) -> None:
        self._tables = tables

    def find(self, client_id: bytes) -> ClientState[R] | None:
        return next((found for table in self._tables if (found := table.find(client_id)) is not None), None)

    def send(self, client: ClientState[R], message: Message) -> None:
        client.table.send(client, message)
