"""The gateway process: the clients' only door. Stateless, replaceable; knows sockets and time, `router.py` knows
requests.

Listens on `client` and `client-control`; dials the tokenizer (`text`) and the microkernel (`kernel`, `kernel-control`).
It binds its own sockets only when it knows its models and reaches both services, so a client never meets half a
gateway. States: connecting -> serving (`ready`) -> stopping. A service that goes away while it serves is a pause for its clients.
Nothing in it waits for a peer: one task per socket, sends never block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any

from llmos.errors import InvalidRequest, Unavailable
from llmos.killpoints import ARMED, reach
from llmos.ports.aio import AsyncListener
from llmos.ports.core import Peer, error_message
from llmos.ports.endpoint import RunDir
from llmos.ports.lifeline import AsyncLifeline
from llmos.ports.monitor import LossMonitor
from llmos.protocol import limits
from llmos.protocol.codec import Schema
from llmos.protocol.messages import (
    Cancel,
    ClientToGateway,
    ControlVerb,
    FromKernel,
    Message,
    ModelInfoGet,
    TokenizerToGateway,
)
from llmos.services.base import ServiceContext
from llmos.services.gateway.clients import ClientTable
from llmos.services.gateway.control import ControlRelay
from llmos.services.gateway.intake import MADE_UP
from llmos.services.gateway.links import Link
from llmos.services.gateway.owners import Asker, is_administrator, owner_name
from llmos.services.gateway.router import Router

log = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
_TICK_S = 0.1
_PROBE_EVERY_S = 10.0
_FAREWELL_S = 0.05  # after the last messages, before the sockets close: libzmq's I/O thread writes them meanwhile
_FAIR_SHARE = 64  # messages of clients handled before other tasks get a turn

_from_client: Schema[Any] = Schema(ClientToGateway, max_bytes=limits.MAX_CLIENT_MESSAGE_BYTES)
_from_kernel: Schema[Any] = Schema(FromKernel)
_from_tokenizer: Schema[Any] = Schema(TokenizerToGateway)
_CLIENT_ROLES = frozenset({"client"})


class Gateway:
    """`start`, then `serve` until the event is set, then `close`."""

    def __init__(self, run_dir: RunDir, name: str, *, max_clients: int, max_in_flight: int) -> None:
        self._run_dir = run_dir
        self._max_clients = max_clients
        self._tasks: list[asyncio.Task[None]] = []
        self._monitors: list[LossMonitor] = []
        self._tables: list[ClientTable[int]] = []
        self._probe_at = 0.0
        self._text = Link(
            run_dir,
            "text",
            _from_tokenizer,
            name=name,
            on_message=self._on_text,
            on_up=self._on_text_up,
            on_down=lambda: self.router.on_text_down(time.monotonic()),
        )
        self._kernel = Link(
            run_dir,
            "kernel",
            _from_kernel,
            name=name,
            on_message=self._on_kernel,
            on_up=lambda: self.router.on_kernel_up(time.monotonic()),
            on_down=lambda: self.router.on_kernel_down(time.monotonic()),
        )
        self._control = Link(
            run_dir,
            "kernel-control",
            _from_kernel,
            name=name,
            on_message=lambda message: self._relay.answer(message),
            on_up=lambda: self._relay.on_kernel_up(time.monotonic()),
            on_down=lambda: self._relay.on_kernel_down(time.monotonic()),
        )
        self.router = Router(self._text.send, self._kernel.send, max_in_flight, f"{MADE_UP}gw-{secrets.token_hex(8)}-")
        self._relay = ControlRelay(self._control.send, self._reply_control, max_in_flight)
        self._has_models = asyncio.Event()

    async def start(self) -> None:
        """Reach the services, then open the door; raises `Unavailable` if they do not answer in time."""
        self._run(*(link.run() for link in (self._text, self._kernel, self._control)))
        waits = (self._has_models.wait(), self._kernel.wait_up(), self._control.wait_up())
        await self._unless_broken(asyncio.gather(*waits))
        if ARMED:
            reach("gateway.start.connected")
        incarnation = time.time_ns() // 1_000_000
        self._clients = self._listen(
            "client", lambda client: self.router.on_client_gone(client, time.monotonic()), incarnation
        )
        self._control_clients = self._listen(
            "client-control", lambda client: self._relay.on_client_gone(client.peer.routing_id), incarnation
        )
        self.router.clients = self._clients
        self._run(
            self._receive(self._control_clients, self._on_control),
            self._receive(self._clients, self._on_client),
            *(self._watch(monitor) for monitor in self._monitors),
            self._tick(),
        )

    async def serve(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set; raises what broke a task."""
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({stopping, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        self._raise_broken()

    async def close(self) -> None:
        """Leave. Idempotent. Streams are not ended: the microkernel keeps them until their clients have found the next gateway."""
        self._relay.fail_all(Unavailable("llmosd is stopping"))
        if self._tables:
            await asyncio.sleep(_FAREWELL_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for monitor in self._monitors:
            monitor.close()
        for table in self._tables:
            table.listener.close()
        self._tasks, self._monitors, self._tables = [], [], []

    def _run(self, *coroutines: Coroutine[Any, Any, None]) -> None:
        self._tasks.extend(asyncio.create_task(coroutine) for coroutine in coroutines)

    def _raise_broken(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def _unless_broken(self, waits: asyncio.Future[Any]) -> None:
        try:
            done, _ = await asyncio.wait(
                {waits, *self._tasks}, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            self._raise_broken()
            if not done:
                down = [link.socket for link in (self._text, self._kernel, self._control) if not link.is_up]
                raise Unavailable(f"no answer within {_START_TIMEOUT_S:g} s from: {', '.join(down) or 'text'}")
        finally:
            waits.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waits

    def _listen(self, name: str, on_gone: Callable[[Any], None], incarnation: int) -> ClientTable[int]:
        listener: AsyncListener[Any] = AsyncListener(
            self._run_dir, name, _from_client, _CLIENT_ROLES, incarnation=incarnation, max_peers=self._max_clients
        )
        table: ClientTable[int] = ClientTable(listener, on_gone)
        self._tables.append(table)
        self._monitors.append(LossMonitor(listener.socket))
        return table

    async def _receive(self, table: ClientTable[int], handle: Callable[[Peer, Any], None]) -> None:
        num_read = 0
        while True:
            peer, message = await table.listener.receive()
            handle(peer, message)
            num_read += 1
            if num_read % _FAIR_SHARE == 0:
                await asyncio.sleep(0)

    async def _watch(self, monitor: LossMonitor) -> None:
        """Somebody left; who it was, the next probe tells (not this instant: libzmq needs a moment to notice
        itself).
        """
        while True:
            await monitor.lost()
            self._probe_at = min(self._probe_at, time.monotonic() + _TICK_S)

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            self.router.tick(now)
            self._relay.expire(now)
            for link in (self._text, self._kernel, self._control):
                link.flush()
            for table in self._tables:
                table.flush()
            if now >= self._probe_at:
                self._probe_at = now + _PROBE_EVERY_S
                for table in self._tables:
                    table.probe()
            await asyncio.sleep(_TICK_S)

    def _on_text_up(self) -> None:
        self._text.send(ModelInfoGet(self.router.next_number()))
        self.router.on_text_up(time.monotonic())

    def _on_kernel(self, message: Any) -> None:
        if ARMED:
            reach("gateway.kernel.received")
        self.router.on_kernel(message, time.monotonic())
        if ARMED:
            reach("gateway.kernel.handled")

    def _on_text(self, message: Any) -> None:
        if ARMED:
            reach("gateway.text.received")
        self.router.on_text(message, time.monotonic())
        if ARMED:
            reach("gateway.text.handled")
        if self.router.models:
            self._has_models.set()

    def _on_client(self, peer: Peer, message: Any) -> None:
        if ARMED:
            reach("gateway.client.received")
        self.router.on_client(self._clients.of(peer), message, time.monotonic())
        if ARMED:
            reach("gateway.client.handled")

    def _on_control(self, peer: Peer, message: Any) -> None:
        if ARMED:
            reach("gateway.control.received")
        client = self._control_clients.of(peer)
        if isinstance(message, Cancel):
            self._relay.cancel(peer.routing_id, message.req)
            return
        if not isinstance(message, ControlVerb):
            error = InvalidRequest(f"{type(message).__name__} belongs on the client socket", field="message")
            self._control_clients.send(client, error_message(error, message.req))
            return
        asker = Asker(peer.routing_id, owner_name(peer.uid), is_administrator(peer.uid))
        self._relay.ask(asker, message, time.monotonic())

    def _reply_control(self, routing_id: bytes, message: Message) -> None:
        client = self._control_clients.find(routing_id)
        if client is not None:
            self._control_clients.send(client, message)


async def run(context: ServiceContext, lifeline: AsyncLifeline) -> None:
    """Serve until llmosd says stop."""
    config = context.config.gateway
    gateway = Gateway(
        context.run_dir,
        context.name,
        max_clients=config.max_clients,
        max_in_flight=config.max_in_flight_per_client,
    )
    try:
        await gateway.start()
        if ARMED:
            reach("gateway.start.listening")
        lifeline.ready(f"serves {', '.join(gateway.router.models)} on {context.run_dir.socket('client')}")
        await gateway.serve(lifeline.stop)
    finally:
        await gateway.close()
