"""One connection of the SDK to one gateway socket: dial, hello, a reader task, and the watch for its death.

States: new -> open (`open`) -> closed (`close`, or the gateway is gone); it never comes back, the client opens
another one. Invariant: when it closes, for whatever reason, every waiter of its core gets an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket as unix
from collections.abc import Callable
from typing import Any, TypeVar

import zmq

from llmos.client._core import ClientCore, Drain, Generation, Reply, W
from llmos.errors import DaemonNotRunning, LlmosError, PermissionRefused, ProtocolError, RequestTimeout, Unavailable
from llmos.ports.aio import AsyncDialer
from llmos.ports.endpoint import RunDir
from llmos.ports.monitor import LossMonitor
from llmos.protocol.codec import Schema
from llmos.protocol.messages import Ack, Cancel, GatewayToClient, Message

log = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S = 5.0
_FAIR_SHARE = 64  # messages routed before other tasks get a turn: a receive that need not wait never yields
_schema: Schema[Any] = Schema(GatewayToClient)
M = TypeVar("M", bound=Message)


class Connection:
    """A greeted connection. All methods run on the event loop that called `open`."""

    def __init__(self, run_dir: RunDir, name: str) -> None:
        self.core = ClientCore()
        self.closed = False
        self._run_dir = run_dir
        self._name = name
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, role_name: str) -> None:
        """Connect and say hello; raises `DaemonNotRunning` at once if nobody listens."""
        check_listening(self._run_dir, self._name)
        self._dialer: AsyncDialer[Any] = AsyncDialer(self._run_dir, self._name, _schema)
        self._monitor = LossMonitor(self._dialer.socket)
        try:
            await self._dialer.greet("client", role_name, _CONNECT_TIMEOUT_S)
        except DaemonNotRunning:
            self._close_sockets()
            raise Unavailable(
                f"llmosd on {self._run_dir.path} does not answer within {_CONNECT_TIMEOUT_S:g} s"
            ) from None
        except BaseException:
            self._close_sockets()
            raise
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    def send(self, message: Message) -> None:
        """Queue a message; raises `Unavailable` if the gateway is gone or does not read."""
        if self.closed:
            raise Unavailable("the connection to the gateway is closed")
        if not self._dialer.send(message):
            raise Unavailable("the gateway does not read its messages")

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

    async def call(
        self, build: Callable[[int], Message], expected: type[M], timeout_s: float | None, *, cancels: bool = False
    ) -> M:
        """One request, one reply; `timeout_s` None: however long it takes. `cancels`: tell the gateway if nobody waits any more."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        req, _ = self.submit(
            build, lambda _: Reply(expected, lambda item: None if reply.done() else reply.set_result(item))
        )
        try:
            async with asyncio.timeout(timeout_s):
                answer = await reply
        except TimeoutError:
            raise RequestTimeout(f"no answer from the gateway within {timeout_s:g} s") from None
        finally:
            if self.core.forget(req) and cancels:
                self.send_if_open(Cancel(req))
        if isinstance(answer, LlmosError):
            raise answer
        assert isinstance(answer, expected), answer
        return answer

    def close(self, error: LlmosError) -> None:
        """Fail all waiters with `error` and leave. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for task in self._tasks:
            task.cancel()
        self._close_sockets()
        self.core.fail_all(error)

    def _close_sockets(self) -> None:
        self._monitor.close()
        self._dialer.close()

    async def _read(self) -> None:
        num_read = 0
        while not self.closed:
            try:
                message = await self._dialer.receive()
            except ProtocolError as error:
                self.close(error)
                return
            self._route(message)
            num_read += 1
            if num_read % _FAIR_SHARE == 0:
                await asyncio.sleep(0)

    async def _watch(self) -> None:
        await self._monitor.lost()
        self._tasks[0].cancel()
        await asyncio.gather(self._tasks[0], return_exceptions=True)
        # What arrived before the loss still counts: a Finished may be among it.
        with contextlib.suppress(zmq.Again, ProtocolError):
            while not self.closed:
                self._route(_schema.decode(await self._dialer.socket.recv(zmq.NOBLOCK)))
        self.close(Unavailable("the connection to the gateway was lost"))

    def _route(self, message: Any) -> None:
        answer = self.core.receive(message)
        if answer is not None:
            self.send_if_open(answer)


class Submission:
    """A generation that was sent. Its owner acknowledges what it read and leaves when it does not read on."""

    def __init__(
        self, connection: Connection, build: Callable[[int], Message], generation: Callable[[int], Generation]
    ) -> None:
        self._connection = connection
        self._req, self._generation = connection.submit(build, generation)

    @property
    def rid(self) -> int | None:
        """The sequence's number, once it is accepted."""
        return self._generation.rid

    def acknowledge(self, upto: int) -> None:
        self._connection.send_if_open(Ack(self._req, upto))

    def leave(self) -> None:
        """Read no further; without effect after the end."""
        core = self._connection.core
        if self._generation.detaches:
            if core.replace(self._req, self._generation, Drain(self._generation)):
                self.acknowledge(self._generation.upto)
        elif core.forget(self._req):
            self._connection.send_if_open(Cancel(self._req))


def check_listening(run_dir: RunDir, name: str) -> None:
    """Raise `DaemonNotRunning` if nobody accepts connections on the socket. ZeroMQ would retry in silence instead."""
    path = str(run_dir.socket(name))
    with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return  # its backlog is full: it lives
        except PermissionError:
            raise PermissionRefused(f"no permission to connect to llmosd on {run_dir.path}", field="run_dir") from None
        except OSError:
            raise DaemonNotRunning(
                f"llmosd is not running on {run_dir.path}; start it with: llmosd (or: make run)", field="run_dir"
            ) from None
