"""In-memory ports with the surface of `sync.py`, for simulation and tests: every message still passes encode and decode.

`MemoryListener.connect()` gives a `MemoryDialer`; both ends run in one thread, and nothing ever waits.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any, Generic, TypeVar

from llmos.ports.core import ListenerCore, Peer, PortCounters, Reply
from llmos.protocol import handshake
from llmos.protocol.codec import Schema, encode
from llmos.protocol.messages import Message, Welcome

M = TypeVar("M")


class MemoryListener(Generic[M]):
    """The listening end: frames from all dialers arrive in one queue, in order."""

    def __init__(
        self, name: str, schema: Schema[M], roles: frozenset[str], *, incarnation: int = 0, max_peers: int = 64
    ) -> None:
        self.core: ListenerCore[M] = ListenerCore(name, schema, roles, incarnation, max_peers)
        self.inbox: deque[tuple[bytes, bytes]] = deque()
        self.dialers: dict[bytes, MemoryDialer[Any]] = {}
        self._ids = itertools.count(1)

    def connect(self, schema: Schema[Any]) -> MemoryDialer[Any]:
        """A new dialer whose messages are decoded with `schema`."""
        dialer = MemoryDialer(self, b"peer-%d" % next(self._ids), schema)
        self.dialers[dialer.routing_id] = dialer
        return dialer

    def receive(self) -> tuple[Peer, M] | None:
        while self.inbox:
            accepted = self.core.accept(*self.inbox.popleft())
            if not isinstance(accepted, Reply):
                return accepted
            self._send(accepted.routing_id, accepted.frame)
        return None

    def send(self, peer: Peer, message: Message) -> bool:
        return self._send(peer.routing_id, encode(message))

    def _send(self, routing_id: bytes, frame: bytes) -> bool:
        dialer = self.dialers.get(routing_id)
        if dialer is None:
            self.core.counters.unroutable += 1
            return False
        dialer.inbox.append(frame)
        return True

    def close(self) -> None:
        self.dialers.clear()


class MemoryDialer(Generic[M]):
    """The connecting end."""

    def __init__(self, listener: MemoryListener[Any], routing_id: bytes, schema: Schema[M]) -> None:
        self.routing_id = routing_id
        self.schema = schema
        self.counters = PortCounters()
        self.inbox: deque[bytes] = deque()
        self._listener = listener

    def greet(self, role: str, name: str, timeout_s: float = 0.0) -> Welcome:
        """Say hello; the listener's owner need not run for the answer."""
        self.send(handshake.hello(role, name))
        waiting = self._listener.receive()
        assert waiting is None, "greet before the listener has other messages to serve"
        answer = self.receive()
        assert answer is not None
        return handshake.check_answer(answer, self._listener.core.name)  # type: ignore[arg-type]

    def receive(self) -> M | None:
        return self.schema.decode(self.inbox.popleft()) if self.inbox else None

    def send(self, message: Message) -> bool:
        if self.routing_id not in self._listener.dialers:
            self.counters.unroutable += 1
            return False
        self._listener.inbox.append((self.routing_id, encode(message)))
        return True

    def close(self) -> None:
        """Leave as a dying process does: the listener is not told."""
        self._listener.dialers.pop(self.routing_id, None)
