"""Blocking ports over ZeroMQ, for the microkernel, executors and other single-loop services.

`Listener` binds a ROUTER and knows its greeted peers; `Dialer` connects a DEALER to one listener; `PortSet` waits for any of them.
Sends never block: a full or vanished peer is counted and reported as False.
"""

from __future__ import annotations

import time
from typing import Any, Generic, TypeVar

import zmq

from llmos.errors import DaemonNotRunning, RequestTimeout
from llmos.ports import options
from llmos.ports.core import ListenerCore, Peer, PortCounters, Reply, peer_uid
from llmos.ports.endpoint import RunDir
from llmos.protocol import handshake
from llmos.protocol.codec import Schema, encode
from llmos.protocol.messages import Message, Welcome

M = TypeVar("M")
_MOST_ANSWERED = 256
_FIND_LOST_EVERY_S = 0.5
HELLO_AGAIN_S = 1.0


class Listener(Generic[M]):
    """The listening end of a port."""

    def __init__(
        self,
        run_dir: RunDir,
        name: str,
        schema: Schema[M],
        roles: frozenset[str],
        *,
        incarnation: int = 0,
        max_peers: int = 64,
    ) -> None:
        self.core: ListenerCore[M] = ListenerCore(name, schema, roles, incarnation, max_peers)
        self.core.find_lost = self._find_lost
        self._find_lost_at = 0.0
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        options.configure(self.socket, max_bytes=schema.max_bytes)
        options.bind(self.socket, run_dir, name)

    def receive(self) -> tuple[Peer, M] | None:
        """The next message that is already here, or None. Handshakes and bad frames are answered on the way.

        None also after `_MOST_ANSWERED` of those: whoever sends nothing else must not keep the caller from everybody else. More may be
        there then, and a poller says so.
        """
        for _ in range(_MOST_ANSWERED):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            if len(frames) != 2:
                self.core.counters.extra_frames += 1
                continue
            accepted = self.core.accept(frames[0].bytes, frames[1].bytes, peer_uid(peer_address(frames[1])))
            if not isinstance(accepted, Reply):
                return accepted
            self._send(accepted.routing_id, accepted.frame)
        return None

    def send(self, peer: Peer, message: Message) -> bool:
        """Queue a message; False (and counted) if the peer is gone or does not read."""
        return self._send(peer.routing_id, encode(message))

    def send_frame(self, peer: Peer, frame: bytes) -> bool:
        """As `send`, for a message that is encoded already."""
        return self._send(peer.routing_id, frame)

    def _send(self, routing_id: bytes, frame: bytes) -> bool:
        try:
            self.socket.send_multipart((routing_id, frame), zmq.NOBLOCK)
        except zmq.Again:
            self.core.counters.high_water += 1
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.core.counters.unroutable += 1
            return False
        return True

    def _find_lost(self) -> None:
        """Not too often. That they left is no failure to be counted."""
        now = time.monotonic()
        if now < self._find_lost_at:
            return
        self._find_lost_at = now + _FIND_LOST_EVERY_S
        unroutable = self.core.counters.unroutable
        left = list(self.core.unreachable(self.send))
        self.core.counters.unroutable = unroutable
        for peer in left:
            self.core.lost(peer)

    def close(self) -> None:
        self.socket.close()


class Dialer(Generic[M]):
    """The connecting end of a port."""

    def __init__(self, run_dir: RunDir, name: str, schema: Schema[M]) -> None:
        self.name = name
        self.schema = schema
        self.counters = PortCounters()
        self._path = run_dir.socket(name)
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        options.configure(self.socket, max_bytes=schema.max_bytes)
        self.socket.connect(run_dir.address(name))

    def greet(self, role: str, name: str, timeout_s: float) -> Welcome:
        """Say hello and wait for the Welcome; raises the typed refusal, or `DaemonNotRunning` if nobody answers in time.

        It is said again now and then: who heard the first may have died of something else. So a second Welcome may come later.
        """
        deadline = time.monotonic() + timeout_s
        if not self.socket.poll(max(0, int(timeout_s * 1000)), zmq.POLLOUT):
            raise DaemonNotRunning(f"nobody listens on {self._path}")
        answer = None
        while answer is None and (left := deadline - time.monotonic()) > 0:
            self.send(handshake.hello(role, name))
            answer = self.wait(min(left, HELLO_AGAIN_S))
        if answer is None:
            raise DaemonNotRunning(f"no answer on {self._path} within {timeout_s:g} s")
        return handshake.check_answer(answer, self.name)  # type: ignore[arg-type]

    def receive(self) -> M | None:
        """The next message that is already here, or None."""
        try:
            frame = self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return self.schema.decode(frame)

    def wait(self, timeout_s: float) -> M | None:
        """The next message, or None after `timeout_s`."""
        if self.socket.poll(max(0, int(timeout_s * 1000)), zmq.POLLIN):
            return self.receive()
        return None

    def expect(self, timeout_s: float) -> M:
        """The next message; raises `RequestTimeout` if none comes in time."""
        message = self.wait(timeout_s)
        if message is None:
            raise RequestTimeout(f"no answer on {self._path} within {timeout_s:g} s")
        return message

    def send(self, message: Message) -> bool:
        """Queue a message; False (and counted) if nobody is connected or the queue is full."""
        try:
            self.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.counters.high_water += 1
            return False
        return True

    def close(self) -> None:
        self.socket.close()


class PortSet:
    """Waits for any of several ports; the order of registration is the order of service (control first)."""

    def __init__(self, *ports: Listener[Any] | Dialer[Any]) -> None:
        self._poller = zmq.Poller()
        self._ports = list(ports)
        for port in ports:
            self._poller.register(port.socket, zmq.POLLIN)

    def wait(self, timeout_s: float) -> list[Listener[Any] | Dialer[Any]]:
        """Ports with something to receive; empty after `timeout_s`."""
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000))))
        return [port for port in self._ports if port.socket in ready]


def peer_address(frame: zmq.Frame) -> str | None:
    """libzmq's Peer-Address metadata of a received frame, if the transport sets it."""
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return None
