"""What every port shares, without I/O: decode, handshake, counters.

`ListenerCore` turns (routing id, frame) into (Peer, message) or an answer to send back. States of a routing id: unknown -> greeted
(after a good Hello) -> unknown (forget). Before Hello every message is answered with an Error whose field is "hello".
`PortCounters` must stay zero in a healthy system; they are exported by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llmos.errors import LlmosError, Overloaded, ProtocolError
from llmos.protocol import handshake
from llmos.protocol.codec import Schema, encode, request_id
from llmos.protocol.failures import error_message
from llmos.protocol.messages import Hello, Message

M = TypeVar("M")


@dataclass(slots=True)
class PortCounters:
    """Things that went wrong on a port."""

    undecodable: int = 0
    refused_hello: int = 0
    before_hello: int = 0
    extra_frames: int = 0
    unroutable: int = 0
    high_water: int = 0


@dataclass(frozen=True, slots=True)
class Peer:
    """A greeted connection. `serial` is never reused in this process; `uid` is the peer's unix user and `key_id` its key, where the
    transport tells.
    """

    routing_id: bytes
    serial: int
    role: str
    name: str
    pid: int
    uid: int | None
    key_id: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A frame to send back to a routing id; no message reaches the owner."""

    routing_id: bytes
    frame: bytes


@dataclass(slots=True)
class ListenerCore(Generic[M]):
    """Handshake and decoding of one listening port."""

    name: str
    schema: Schema[M]
    roles: frozenset[str]
    incarnation: int
    max_peers: int
    on_greet: Callable[[Peer], None] | None = None  # told of each peer that was welcomed
    on_lost: Callable[[Peer], None] | None = None  # told of each that greeted anew, or that `lost` named
    find_lost: Callable[[], None] | None = None  # called before a peer is refused because there are too many
    counters: PortCounters = field(default_factory=PortCounters)
    peers: dict[bytes, Peer] = field(default_factory=dict)
    _serials: Any = field(default_factory=lambda: itertools.count(1))

    def accept(
        self, routing_id: bytes, frame: bytes, uid: int | None = None, key_id: str = ""
    ) -> tuple[Peer, M] | Reply:
        """Decode one frame of a peer; what the owner need not see (handshakes, bad frames) becomes a `Reply` to send."""
        try:
            message = self.schema.decode(frame)
        except ProtocolError as error:
            self.counters.undecodable += 1
            return Reply(routing_id, encode(error_message(error, request_id(frame))))
        if isinstance(message, Hello):
            return self._greet(routing_id, message, uid, key_id)
        peer = self.peers.get(routing_id)
        # A routing id is the peer's to choose: somebody else may come with that of one who has just left.
        if peer is None or (peer.uid, peer.key_id) != (uid, key_id):
            self.counters.before_hello += 1
            return Reply(
                routing_id, encode(error_message(ProtocolError("say hello first", field="hello"), request_id(frame)))
            )
        return peer, message

    def _greet(self, routing_id: bytes, hello: Hello, uid: int | None, key_id: str) -> Reply:
        try:
            handshake.check_hello(hello, self.roles)
            if self._is_full(routing_id) and self.find_lost is not None:
                self.find_lost()
            if self._is_full(routing_id):
                raise Overloaded(f"{self.name}: {self.max_peers} peers are connected, the limit")
        except LlmosError as error:
            self.counters.refused_hello += 1
            return Reply(routing_id, encode(error_message(error, 0)))
        if (older := self.peers.get(routing_id)) is not None:
            self.lost(older)
        peer = Peer(routing_id, next(self._serials), hello.role, hello.name, hello.pid, uid, key_id)
        self.peers[routing_id] = peer
        if self.on_greet is not None:
            self.on_greet(peer)
        return Reply(routing_id, encode(handshake.welcome(self.name, self.incarnation)))

    def _is_full(self, routing_id: bytes) -> bool:
        return routing_id not in self.peers and len(self.peers) >= self.max_peers

    def lost(self, peer: Peer) -> None:
        """As `forget`, for whoever finds it out before the owner does."""
        self.forget(peer)
        if self.on_lost is not None:
            self.on_lost(peer)

    def unreachable(self, send: Callable[[Peer, Message], object]) -> Iterator[Peer]:
        """Those that left: ZeroMQ does not say who did, but can not send to them. The others hear a Welcome. `send`: the listener's."""
        welcome = handshake.welcome(self.name, self.incarnation)
        for peer in list(self.peers.values()):
            before = self.counters.unroutable
            send(peer, welcome)
            if self.counters.unroutable != before:
                yield peer

    def forget(self, peer: Peer) -> None:
        """The peer is gone; its routing id must greet again."""
        if self.peers.get(peer.routing_id) is peer:
            del self.peers[peer.routing_id]


def peer_uid(address: str | None) -> int | None:
    """The unix uid in libzmq's Peer-Address metadata of an ipc connection ("localhost:uid:gid:pid")."""
    parts = (address or "").split(":")
    return int(parts[1]) if len(parts) == 4 and parts[1].isdigit() else None
