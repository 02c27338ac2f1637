"""The gateway process: the clients' only door. Stateless, replaceable; knows sockets and time, `router.py` knows
requests.

Listens on `client` and `client-control`, and on two network ports if configured (door.py); dials the tokenizer (`text`) and the
microkernel (`kernel`, `kernel-control`).
It binds its own sockets only when it knows its models and reaches both services, so a client never meets half a
gateway. States: connecting -> serving (`ready`) -> stopping. A service that goes away while it serves is a pause for its clients.
Nothing in it waits for a peer: one task per socket, sends never block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any

from llmos.config import state_dir
from llmos.errors import InvalidRequest, LlmosError, Unauthorized, Unavailable
from llmos.keys.ring import KeyRing
from llmos.keys.roles import Role
from llmos.killpoints import ARMED, reach
from llmos.ports.aio import AsyncListener
from llmos.ports.async_lifeline import AsyncLifeline
from llmos.ports.endpoint import RunDir
from llmos.ports.monitor import CrowdMonitor
from llmos.protocol import limits
from llmos.protocol.codec import Schema
from llmos.protocol.failures import error_message
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
from llmos.services.gateway.audit import AuditLog
from llmos.services.gateway.clients import ClientState, ClientTable, ClientTables
from llmos.services.gateway.control import ControlRelay
from llmos.services.gateway.door import TcpDoor
from llmos.services.gateway.links import Link
from llmos.services.gateway.owners import Asker, identify
from llmos.services.gateway.router import Router
from llmos.services.gateway.sockets import check_listening
from llmos.tcp_address import parse_address

log = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
_TICK_S = 0.1
_PROBE_EVERY_S = 10.0
_MOST_CONNECTIONS = (
    8192  # per socket, greeted or not: thrown out they would come again at once, so they are let be for long
)
_SPARE_DESCRIPTORS = 256

_from_client: Schema[Any] = Schema(ClientToGateway, max_bytes=limits.MAX_CLIENT_MESSAGE_BYTES)
_from_kernel: Schema[Any] = Schema(FromKernel)
_from_tokenizer: Schema[Any] = Schema(TokenizerToGateway)
_CLIENT_ROLES = frozenset({"client"})


class Gateway:
    """`start`, then `serve` until the event is set, then `close`."""

    def __init__(
        self,
        run_dir: RunDir,
        name: str,
        *,
        max_clients: int,
        max_in_flight: int,
        door: TcpDoor | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._max_clients = max_clients
        self._door = door
        self._keys_version = door.keys.version if door is not None else 0
        self._tasks: list[asyncio.Task[None]] = []
        self._monitors: list[CrowdMonitor] = []
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
        key_prefix = f"{limits.MADE_UP_REQUEST_ID}gw-{secrets.token_hex(8)}-"
        self.router = Router(self._text.send, self._kernel.send, max_in_flight, key_prefix, self._identify)
        self._note = audit.note if audit is not None else lambda asker, verb, answer: None
        self._relay = ControlRelay(self._control.send, self._reply_control, max_in_flight, self._note)
        self._has_models = asyncio.Event()

    async def start(self) -> None:
        """Reach the services, then open the door; raises `Unavailable` if they do not answer in time."""
        self._run(*(link.run() for link in (self._text, self._kernel, self._control)))
        waits = (self._has_models.wait(), self._kernel.wait_up(), self._control.wait_up())
        await self._unless_broken(asyncio.gather(*waits))
        if ARMED:
            reach("gateway.start.connected")
        incarnation = time.time_ns() // 1_000_000
        self._clients, self._control_clients = self._listen_local(incarnation)
        data, control = [self._clients], [self._control_clients]
        if self._door is not None:
            self._run(self._door.authenticator.run())
            remote = self._listen_remote(self._door, incarnation)
            await self._unless_broken(asyncio.ensure_future(self._door.check()))
            data.append(remote[0])
            control.append(remote[1])
        self.router.clients = ClientTables(*data)
        self._controls = ClientTables(*control)
        self._run(
            *(self._receive(table, self._on_control) for table in control),
            *(self._receive(table, self._on_client) for table in data),
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
        """Leave without a word, as if it had died: clients ask the next gateway what they were not answered, and the microkernel keeps
        their streams until then. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for monitor in self._monitors:
            monitor.close()
        for table in self._tables:
            table.listener.close()
        self._tasks, self._monitors, self._tables = [], [], []
        if self._door is not None:
            self._door.close()

    @property
    def addresses(self) -> list[str]:
        """Where it listens: paths and URLs."""
        local = [str(self._run_dir.socket(name)) for name in ("client", "client-control")]
        return [*local, *(self._door.urls if self._door is not None else ())]

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

    def _listen_local(self, incarnation: int) -> tuple[ClientTable[int], ClientTable[int]]:
        options: dict[str, Any] = {"incarnation": incarnation, "max_peers": self._max_clients}
        data, control = (
            AsyncListener(self._run_dir, name, _from_client, _CLIENT_ROLES, **options)
            for name in ("client", "client-control")
        )
        return self._table(data, self._data_left, b"u"), self._table(control, self._control_left, b"u")

    def _listen_remote(self, door: TcpDoor, incarnation: int) -> tuple[ClientTable[int], ClientTable[int]]:
        data, control = (
            door.listen(url, name, _from_client, incarnation, self._max_clients)
            for url, name in zip(door.urls, ("client", "client-control"))
        )
        return self._table(data, self._data_left, b"t"), self._table(control, self._control_left, b"t")

    def _table(self, listener: AsyncListener[Any], on_gone: Callable[[Any], None], prefix: bytes) -> ClientTable[int]:
        table: ClientTable[int] = ClientTable(listener, on_gone, prefix)
        self._tables.append(table)
        self._monitors.append(CrowdMonitor(listener, self._most_connections()))
        return table

    def _most_connections(self) -> int:
        """Of one socket, so that all together never take the last descriptor, of which libzmq would die."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        sockets = 2 if self._door is None else 4
        return max(self._max_clients, min(_MOST_CONNECTIONS, (descriptors - _SPARE_DESCRIPTORS) // sockets))

    def _data_left(self, client: ClientState[int]) -> None:
        self.router.on_client_gone(client, time.monotonic())

    def _control_left(self, client: ClientState[int]) -> None:
        self._relay.on_client_gone(client.id)

    async def _receive(self, table: ClientTable[int], handle: Callable[[ClientState[int], Any], None]) -> None:
        while True:
            peer, message = await table.listener.receive()
            handle(table.of(peer), message)

    async def _watch(self, monitor: CrowdMonitor) -> None:
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
            self._look_at_keys(now)
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

    def _identify(self, client: ClientState[int]) -> Asker:
        """Raises `Unauthorized` if its key is not live any more."""
        return identify(client.id, client.peer, self._door.keys if self._door is not None else None)

    def _look_at_keys(self, now: float) -> None:
        """Show those out whose key was revoked."""
        if self._door is None:
            return
        self._door.keys.refresh(now)
        if self._door.keys.version == self._keys_version:
            return
        self._keys_version = self._door.keys.version
        for client in [client for table in self._tables for client in table.each()]:
            try:
                self._identify(client)
            except Unauthorized as error:
                log.warning("client %r: %s", client.peer.name, error.message)
                self.router.dismiss(client, error, now)
                self._relay.dismiss(client.id, error)
                client.table.send(client, error_message(error, 0))

    def _on_client(self, client: ClientState[int], message: Any) -> None:
        if ARMED:
            reach("gateway.client.received")
        self.router.on_client(client, message, time.monotonic())
        if ARMED:
            reach("gateway.client.handled")

    def _on_control(self, client: ClientState[int], message: Any) -> None:
        if ARMED:
            reach("gateway.control.received")
        if isinstance(message, Cancel):
            self._relay.cancel(client.id, message.req)
            return
        try:
            if not isinstance(message, ControlVerb):
                raise InvalidRequest(f"{type(message).__name__} belongs on the client socket", field="message")
            self._relay.ask(self._identify(client), message, time.monotonic())
        except LlmosError as error:
            answer = error_message(error, message.req)
            self._note(Asker(client.id, "", Role.SUBMIT, f"key:{client.peer.key_id}"), message, answer)
            client.table.send(client, answer)

    def _reply_control(self, client_id: bytes, message: Message) -> None:
        client = self._controls.find(client_id)
        if client is not None:
            client.table.send(client, message)


async def run(context: ServiceContext, lifeline: AsyncLifeline) -> None:
    """Serve until llmosd says stop."""
    config = context.config.gateway
    folder = state_dir(context.config.storage)
    address = parse_address(config.tcp)
    audit = AuditLog(folder) if config.audit_log else None
    gateway = Gateway(
        context.run_dir,
        context.name,
        max_clients=config.max_clients,
        max_in_flight=config.max_in_flight_per_client,
        door=TcpDoor(address, folder, KeyRing(folder)) if address is not None else None,
        audit=audit,
    )
    try:
        await gateway.start()
        check_listening(gateway.addresses)
        if ARMED:
            reach("gateway.start.listening")
        lifeline.ready(f"serves {', '.join(gateway.router.models)} on {', '.join(gateway.addresses)}")
        await gateway.serve(lifeline.stop)
    finally:
        await gateway.close()
        if audit is not None:
            audit.close()
