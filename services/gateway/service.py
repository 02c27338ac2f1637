"""The ZeroMQ gateway: the clients' door for the SDK and llmosctl. Stateless, replaceable; what happens inside is `core.py`.

Listens on `client` and `client-control`, and on two network ports if configured (door.py). It binds its own sockets only when it knows its
models and reaches both services, so a client never meets half a gateway. States: connecting -> serving (`ready`) -> stopping.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Iterable
from typing import Any

from llmos.config import state_dir
from llmos.errors import InvalidRequest, LlmosError
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
from llmos.protocol.messages import Cancel, ClientToGateway, ControlVerb, Message
from llmos.services.base import ServiceContext
from llmos.services.gateway.audit import AuditLog
from llmos.services.gateway.clients import Client, ClientState, ClientTable, ClientTables
from llmos.services.gateway.core import TICK_S, GatewayCore
from llmos.services.gateway.door import TcpDoor
from llmos.services.gateway.owners import Asker
from llmos.services.gateway.sockets import check_listening
from llmos.tcp_address import parse_address

_PROBE_EVERY_S = 10.0
_MOST_CONNECTIONS = 8192  # per socket, greeted or not; thrown out they would come again at once
_SPARE_DESCRIPTORS = 256

_from_client: Schema[Any] = Schema(ClientToGateway, max_bytes=limits.MAX_CLIENT_MESSAGE_BYTES)
_CLIENT_ROLES = frozenset({"client"})


class Gateway(GatewayCore):
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
        keys = door.keys if door is not None else None
        super().__init__(run_dir, name, max_in_flight=max_in_flight, keys=keys, audit=audit)
        self._run_dir = run_dir
        self._max_clients = max_clients
        self._door = door
        self._monitors: list[CrowdMonitor] = []
        self._tables: list[ClientTable[int]] = []
        self._probe_at = 0.0

    async def start(self) -> None:
        """Reach the services, then open the door; raises `Unavailable` if they do not answer in time."""
        await self.connect()
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

    async def close(self) -> None:
        await super().close()
        for monitor in self._monitors:
            monitor.close()
        for table in self._tables:
            table.listener.close()
        self._monitors, self._tables = [], []
        if self._door is not None:
            self._door.close()

    @property
    def addresses(self) -> list[str]:
        """Where it listens: paths and URLs."""
        local = [str(self._run_dir.socket(name)) for name in ("client", "client-control")]
        return [*local, *(self._door.urls if self._door is not None else ())]

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
        self.relay.on_client_gone(client.id)

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
            self._probe_at = min(self._probe_at, time.monotonic() + TICK_S)

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            self._look(now)
            for table in self._tables:
                table.flush()
            if now >= self._probe_at:
                self._probe_at = now + _PROBE_EVERY_S
                for table in self._tables:
                    table.probe()
            await asyncio.sleep(TICK_S)

    def _everybody(self) -> Iterable[Client]:
        return [client for table in self._tables for client in table.each()]

    def _show_out(self, client: Client, error: LlmosError) -> None:
        assert isinstance(client, ClientState)
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
            self.relay.cancel(client.id, message.req)
            return
        try:
            if not isinstance(message, ControlVerb):
                raise InvalidRequest(f"{type(message).__name__} belongs on the client socket", field="message")
            self.relay.ask(self.identify(client), message, time.monotonic())
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
