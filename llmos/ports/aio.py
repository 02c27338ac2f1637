"""The ports of `sync.py` on asyncio, for gateways, tokenizers and the async SDK. Same surface, `await` on receive.

Sends stay synchronous: they never block, so there is nothing to wait for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Generic, TypeVar

import zmq
import zmq.asyncio

from llmos.errors import DaemonNotRunning
from llmos.ports import options
from llmos.ports.core import ListenerCore, Peer, PortCounters, Reply, peer_uid
from llmos.ports.endpoint import RunDir
from llmos.ports.sync import HELLO_AGAIN_S, peer_address
from llmos.protocol import handshake
from llmos.protocol.codec import Schema, encode
from llmos.protocol.messages import Message, Welcome

M = TypeVar("M")
_FAIR_SHARE = 64


class _Turns:
    """However much there is to read, every `_FAIR_SHARE` frames the other tasks get a turn: a receive that need not wait never yields.

    To be taken before a frame is read, so that nobody who is cancelled has one in hand.
    """

    def __init__(self) -> None:
        self._taken = 0

    async def take(self) -> None:
        self._taken += 1
        if not self._taken % _FAIR_SHARE:
            await asyncio.sleep(0)


class AsyncListener(Generic[M]):
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
        self._open(zmq.asyncio.Context.instance(), name, schema, roles, incarnation, max_peers)
        options.bind(self.socket, run_dir, name)

    def _open(
        self,
        context: zmq.asyncio.Context,
        name: str,
        schema: Schema[M],
        roles: frozenset[str],
        incarnation: int,
        max_peers: int,
    ) -> None:
        self.core: ListenerCore[M] = ListenerCore(name, schema, roles, incarnation, max_peers)
        self._turns = _Turns()
        self.greeted: dict[int, bytes] = {}  # descriptor of a connection -> the peer that said hello over it
        self.socket: zmq.asyncio.Socket = context.socket(zmq.ROUTER)
        options.configure(self.socket, max_bytes=schema.max_bytes)

    async def receive(self) -> tuple[Peer, M]:
        """The next message. Handshakes and bad frames are answered on the way."""
        while True:
            await self._turns.take()
            frames = await self.socket.recv_multipart(copy=False)
            if len(frames) != 2:
                self.core.counters.extra_frames += 1
                continue
            uid, key_id = self._identity(frames[1])
            accepted = self.core.accept(frames[0].bytes, frames[1].bytes, uid, key_id)
            if not isinstance(accepted, Reply):
                return accepted
            if accepted.routing_id in self.core.peers:
                self.greeted[frames[1].get(zmq.SRCFD)] = accepted.routing_id
            self._send(accepted.routing_id, accepted.frame)

    def send(self, peer: Peer, message: Message) -> bool:
        """Queue a message; False (and counted) if the peer is gone or does not read."""
        return self._send(peer.routing_id, encode(message))

    def _identity(self, frame: zmq.Frame) -> tuple[int | None, str]:
        """Who sent it, by uid or by key, as libzmq knows; nothing that the peer says itself."""
        return peer_uid(peer_address(frame)), ""

    def _send(self, routing_id: bytes, frame: bytes) -> bool:
        error = _failure(self.socket.send_multipart((routing_id, frame), zmq.NOBLOCK))
        if error is None:
            return True
        if isinstance(error, zmq.Again):
            self.core.counters.high_water += 1
        elif isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH:
            self.core.counters.unroutable += 1
        else:
            raise error
        return False

    def close(self) -> None:
        self.socket.close()


class AsyncDialer(Generic[M]):
    """The connecting end of a port."""

    def __init__(self, run_dir: RunDir, name: str, schema: Schema[M]) -> None:
        self._open(name, str(run_dir.socket(name)), schema)
        self.socket.connect(run_dir.address(name))

    def _open(self, name: str, where: str, schema: Schema[M]) -> None:
        self.name = name
        self.schema = schema
        self.counters = PortCounters()
        self._where = where
        self._turns = _Turns()
        self.socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        options.configure(self.socket, max_bytes=schema.max_bytes)

    async def greet(self, role: str, name: str, timeout_s: float) -> Welcome:
        """Say hello and wait for the Welcome; raises the typed refusal, or `DaemonNotRunning` if nobody answers in time.

        As in `sync.Dialer`, it is said again now and then.
        """
        try:
            async with asyncio.timeout(timeout_s):
                answer = None
                while answer is None:
                    await self.socket.poll(None, zmq.POLLOUT)  # type: ignore[call-arg]  # the stub lacks `flags`
                    self.send(handshake.hello(role, name))
                    if await self.socket.poll(int(HELLO_AGAIN_S * 1000)):
                        answer = await self.receive()
        except TimeoutError:
            raise DaemonNotRunning(f"nobody answers on {self._where} within {timeout_s:g} s") from None
        return handshake.check_answer(answer, self.name)  # type: ignore[arg-type]

    async def receive(self) -> M:
        """The next message."""
        await self._turns.take()
        return self.schema.decode(await self.socket.recv())

    def send(self, message: Message) -> bool:
        """Queue a message; False (and counted) if nobody is connected or the queue is full."""
        error = _failure(self.socket.send(encode(message), zmq.NOBLOCK))
        if error is None:
            return True
        if not isinstance(error, zmq.Again):
            raise error
        self.counters.high_water += 1
        return False

    def close(self) -> None:
        self.socket.close()


def _failure(sent: Awaitable[Any]) -> BaseException | None:
    """With NOBLOCK pyzmq sends at once and returns a future that is already done.

    Not so while a cancelled poll of the socket is still registered: then it would send later. Here that is a refusal.
    """
    assert isinstance(sent, asyncio.Future)
    if not sent.done():
        sent.cancel()
        return zmq.Again()
    return sent.exception()
