"""One connection of the SDK to one gateway socket: dial, hello, a reader task, and the watch for its death.

States: new -> open (`open`) -> closed (`close`) | lost (the gateway is gone). It never comes back: its link opens another one.
Invariant: when it ends, for whatever reason, every waiter of its core is told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import zmq

from llmos.client._core import ClientCore, ConnectionLost, Reply, W
from llmos.client.place import Place
from llmos.errors import DaemonNotRunning, LlmosError, ProtocolError, Unavailable
from llmos.ports.aio import AsyncDialer
from llmos.protocol.codec import Schema
from llmos.protocol.messages import Cancel, GatewayToClient, Message

_CONNECT_TIMEOUT_S = 5.0
_LINGER_MS = 2000  # for the last words of one who leaves; nobody waits for it
_schema: Schema[Any] = Schema(GatewayToClient)
M = TypeVar("M", bound=Message)


class Connection:
    """A greeted connection. All methods run on the event loop that called `open`. `on_lost` is called when it breaks."""

    def __init__(self, place: Place, name: str, on_lost: Callable[[], None] = lambda: None) -> None:
        self.core = ClientCore()
        self.closed = False
        self._place = place
        self._name = name
        self._on_lost = on_lost
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, role_name: str) -> None:
        """Connect and say hello; raises `DaemonNotRunning` at once if nobody listens, `Unauthorized` if it may not."""
        self._place.check_listening(self._name)
        self._dialer: AsyncDialer[Any] = self._place.dial(self._name, _schema)
        self._monitor = self._place.monitor(self._dialer.socket)
        lost: asyncio.Future[Any] = asyncio.ensure_future(self._monitor.lost())
        try:
            await self._greet(role_name, lost)
        except BaseException:
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)
            self._close_sockets()
            raise
        reader = asyncio.create_task(self._read())
        self._tasks = [reader, asyncio.create_task(self._watch(lost, reader))]

    async def _greet(self, role_name: str, lost: asyncio.Future[Any]) -> None:
        greeting: asyncio.Future[Any] = asyncio.ensure_future(
            self._dialer.greet("client", role_name, _CONNECT_TIMEOUT_S)
        )
        try:
            # ZeroMQ would connect anew in silence, but a hello is not said twice.
            await asyncio.wait({greeting, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            greeting.cancel()
            await asyncio.gather(greeting, return_exceptions=True)
        if greeting.cancelled():
            lost.result()  # the reason, if there is one
            raise Unavailable("the gateway left while it was greeted")
        if isinstance(greeting.exception(), DaemonNotRunning):
            text = f"llmosd on {self._place.shown} does not answer within {_CONNECT_TIMEOUT_S:g} s"
            raise Unavailable(text)
        greeting.result()

    def send(self, message: Message) -> None:
        """Queue a message; raises `ConnectionLost` if the gateway is gone or does not read."""
        if self.closed:
            raise ConnectionLost("the connection to the gateway is closed")
        if not self._dialer.send(message):
            raise ConnectionLost("the gateway does not read its messages")

    def send_if_open(self, message: Message) -> None:
        """Queue a message that does not matter on a dead connection (Ack, Cancel)."""
        with contextlib.suppress(Unavailable):
            self.send(message)

    def submit(self, build: Callable[[int], Message], waiter: Callable[[int], W]) -> tuple[int, W]:
        """Enter a request into the table and send it."""
        req, added = self.core.add(waiter)
        try:
            self.send(build(req))
        except LlmosError:
            self.core.forget(req)
            raise
        return req, added

    async def call(self, build: Callable[[int], Message], expected: type[M], *, cancels: bool = False) -> M:
        """One request, one reply, however long it takes; raises `ConnectionLost` if nobody can tell whether it was done.

        `cancels`: tell the gateway if nobody waits any more.
        """
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        req, _ = self.submit(
            build, lambda _: Reply(expected, lambda item: None if reply.done() else reply.set_result(item))
        )
        try:
            answer = await reply
        finally:
            if self.core.forget(req) and cancels:
                self.send_if_open(Cancel(req))
        if isinstance(answer, LlmosError):
            raise answer
        assert isinstance(answer, expected), answer
        return answer

    def close(self, error: LlmosError) -> None:
        """Fail all waiters with `error` and leave; what ends with its client is ended. Idempotent."""
        if self.closed:
            return
        for req in self.core.owned():
            self.send_if_open(Cancel(req))
        self._end(_LINGER_MS)
        self.core.fail_all(error)

    def _end(self, linger_ms: int) -> None:
        self.closed = True
        for task in self._tasks:
            task.cancel()
        self._close_sockets(linger_ms)

    def _close_sockets(self, linger_ms: int = 0) -> None:
        self._monitor.close()
        self._dialer.socket.close(linger=linger_ms)

    async def _read(self) -> None:
        while not self.closed:
            try:
                message = await self._dialer.receive()
            except ProtocolError as error:
                self.close(error)
                return
            self._route(message)

    async def _watch(self, lost: asyncio.Future[Any], reader: asyncio.Task[None]) -> None:
        await lost
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        # What arrived before the loss still counts: a Finished may be among it.
        with contextlib.suppress(zmq.Again, ProtocolError):
            while not self.closed:
                self._route(_schema.decode(await self._dialer.socket.recv(zmq.NOBLOCK)))
        if not self.closed:
            self._end(0)
            self._on_lost()
            self.core.lose_all()

    def _route(self, message: Any) -> None:
        answer = self.core.receive(message)
        if answer is not None:
            self.send_if_open(answer)
