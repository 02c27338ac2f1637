"""A child's line to the supervisor on asyncio: as lifeline.py, which has the states."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from typing import Any, ClassVar

from llmos.errors import LlmosError, ProtocolError
from llmos.ports.aio import AsyncDialer
from llmos.ports.endpoint import RunDir
from llmos.ports.lifeline import BEAT_INTERVAL_S, FAILED_ACK_S, FROM_SUPERVISOR, announce, failure
from llmos.protocol.messages import Heartbeat, Stop

log = logging.getLogger(__name__)


class AsyncLifeline:
    """The line on asyncio: `connect` starts a background task that beats and listens; wait for `stop`."""

    _signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, run_dir: RunDir, role: str, name: str, *, supervised: bool = True) -> None:
        self.port: AsyncDialer[Any] = AsyncDialer(run_dir, "supervisor", FROM_SUPERVISOR)
        self.role = role
        self.name = name
        self.supervised = supervised
        self.stop = asyncio.Event()
        self.progress = 0  # the owner may count its work here; each beat counts one by itself
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def stopping(self) -> bool:
        return self.stop.is_set()

    async def connect(self, timeout_s: float) -> None:
        """As `Lifeline.connect`."""
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                asyncio.get_running_loop().add_signal_handler(number, self.stop.set)
        if self.supervised:
            await self.port.greet(self.role, self.name, timeout_s)
            self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._listen())]

    def ready(self, detail: str) -> None:
        """As `Lifeline.ready`."""
        announce(self, detail)

    async def failed(self, error: LlmosError) -> None:
        """As `Lifeline.failed`."""
        if self.supervised and self._tasks and self.port.send(failure(self.name, error)):
            self.stop.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), FAILED_ACK_S)

    async def close(self) -> None:
        """End the background tasks and the port."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.port.close()

    async def _beat(self) -> None:
        while True:
            self.progress += 1
            self.port.send(Heartbeat(self.name, self.progress))
            await asyncio.sleep(BEAT_INTERVAL_S)

    async def _listen(self) -> None:
        while True:
            try:
                if isinstance(await self.port.receive(), Stop):
                    self.stop.set()
            except ProtocolError as error:
                log.error("supervisor sent a bad message: %s", error)
