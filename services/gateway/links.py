"""A gateway's connection to a service that may come and go.

States: down -> up (hello answered) -> down (the connection was lost, or the service spoke nonsense) -> up ...
`on_up` and `on_down` alternate, starting with `on_up`; messages only arrive between them. Sends while down are
refused, not kept. Sends while up arrive, in order, or the connection is lost: what the socket can not take waits here, and when too
much does, the connection is given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from llmos.errors import LlmosError, ProtocolError
from llmos.ports.aio import AsyncDialer
from llmos.ports.endpoint import RunDir
from llmos.ports.monitor import LossMonitor
from llmos.protocol.codec import Schema
from llmos.protocol.messages import Message, Welcome

log = logging.getLogger(__name__)
_GREET_TIMEOUT_S = 5.0
_RETRY_S = 0.1
_MAX_BACKLOG = 100_000  # messages


class Link:
    """Run `run()` as a task; the callbacks are synchronous."""

    def __init__(
        self,
        run_dir: RunDir,
        socket: str,
        schema: Schema[Any],
        *,
        name: str,
        on_message: Callable[[Any], None],
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[], None] = lambda: None,
    ) -> None:
        self.socket = socket
        self._run_dir = run_dir
        self._schema = schema
        self._name = name
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._dialer: AsyncDialer[Any] | None = None
        self._is_up = asyncio.Event()
        self._backlog: deque[Message] = deque()
        self._is_stuck = asyncio.Event()

    @property
    def is_up(self) -> bool:
        return self._is_up.is_set()

    async def wait_up(self) -> None:
        await self._is_up.wait()

    def send(self, message: Message) -> bool:
        """False if the service is not there."""
        if not self.is_up or self._dialer is None:
            return False
        if self._backlog or not self._dialer.send(message):
            self._backlog.append(message)
            if len(self._backlog) > _MAX_BACKLOG:
                self._is_stuck.set()
        return True

    def flush(self) -> None:
        """Try again to send what is waiting."""
        while self._backlog and self._dialer is not None and self._dialer.send(self._backlog[0]):
            self._backlog.popleft()

    async def run(self) -> None:
        """Connect, serve, and connect again; ends by cancellation, or by a refusal that time will not mend."""
        while True:
            self._dialer = AsyncDialer(self._run_dir, self.socket, self._schema)
            monitor = LossMonitor(self._dialer.socket)
            try:
                if await self._greet(self._dialer, monitor):
                    await self._serve(self._dialer, monitor)
            finally:
                monitor.close()
                self._dialer.close()
            await asyncio.sleep(_RETRY_S)

    async def _greet(self, dialer: AsyncDialer[Any], monitor: LossMonitor) -> bool:
        greeting = asyncio.create_task(dialer.greet("gateway", self._name, _GREET_TIMEOUT_S))
        lost = asyncio.create_task(monitor.lost())
        try:
            await asyncio.wait((greeting, lost), return_when=asyncio.FIRST_COMPLETED)
            if lost.done():  # whoever answers next has not heard our hello
                log.info("%s: it left while it was greeted", self.socket)
                return False
            greeting.result()
        except ProtocolError:
            raise  # mixed versions: a bug of the installation
        except LlmosError as error:
            log.info("%s: %s", self.socket, error.message)
            return False
        finally:
            greeting.cancel()
            lost.cancel()
            await asyncio.gather(greeting, lost, return_exceptions=True)
        return True

    async def _serve(self, dialer: AsyncDialer[Any], monitor: LossMonitor) -> None:
        self._is_stuck.clear()
        reader = asyncio.create_task(self._read(dialer))
        tasks = (reader, asyncio.create_task(monitor.lost()), asyncio.create_task(self._is_stuck.wait()))
        self._is_up.set()
        self._on_up()
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
            log.warning("%s: %s", self.socket, "it does not read" if self._is_stuck.is_set() else "connection lost")
        finally:
            for task in tasks:
                task.cancel()
            self._is_up.clear()
            self._backlog.clear()
            self._on_down()  # at once: nothing may be sent into the void meanwhile
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, dialer: AsyncDialer[Any]) -> None:
        """Hand on what arrives; returns if the service can not be understood."""
        while True:
            try:
                message = await dialer.receive()
            except ProtocolError as error:
                log.error("%s: %s", self.socket, error.message)
                return
            if not isinstance(message, Welcome):
                self._on_message(message)
