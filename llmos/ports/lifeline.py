"""A child's line to the supervisor: hello, ready, heartbeats, the reason of a failure, and the request to stop.

`Lifeline` blocks and is polled from a work loop (microkernel, executor, storage); `AsyncLifeline` beats from its event
loop (tokenizer, gateway). Heartbeats therefore come from the loop that does the work: a hung loop stops beating.
States: new -> connected (`connect`) -> ready (`ready`) -> stopping (Stop message, SIGTERM or SIGINT). An unsupervised
lifeline (`supervised=False`, for tests) sends nothing, still handles signals, and prints `ready NAME` on stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import Any, ClassVar

from llmos.errors import LlmosError, ProtocolError
from llmos.ports.aio import AsyncDialer
from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Dialer
from llmos.protocol.codec import Schema
from llmos.protocol.messages import (
    FromSupervisor,
    Heartbeat,
    KernelRestarted,
    Message,
    ServiceFailed,
    ServiceReady,
    Stop,
)

log = logging.getLogger(__name__)

BEAT_INTERVAL_S = 0.25
_FAILED_ACK_S = (
    1.0  # the supervisor answers ServiceFailed with Stop; without waiting for it the message could die with us
)
_schema: Schema[Any] = Schema(FromSupervisor)


class Lifeline:
    """The blocking line. Put `port` into the loop's `PortSet`; call `poll()` and `beat()` once per turn."""

    def __init__(self, run_dir: RunDir, role: str, name: str, *, supervised: bool = True) -> None:
        self.port: Dialer[Any] = Dialer(run_dir, "supervisor", _schema)
        self.role = role
        self.name = name
        self.supervised = supervised
        self.stopping = False
        self.kernel_restarts = 0  # how often another microkernel took over
        self._next_beat = 0.0
        self._working = False

    def connect(self, timeout_s: float) -> None:
        """Take over SIGTERM and SIGINT and greet the supervisor; raises the typed refusal or `DaemonNotRunning`."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self._stop())
        if self.supervised:
            self.port.greet(self.role, self.name, timeout_s)

    def ready(self, detail: str) -> None:
        """This process can work now; `detail` is one line for people."""
        _announce(self, detail)

    def failed(self, error: LlmosError) -> None:
        """This process can not work; returns when the supervisor knows, or after a second. The caller exits."""
        if not self.supervised or not self.port.send(_failure(self.name, error)):
            return
        deadline = time.monotonic() + _FAILED_ACK_S
        while (left := deadline - time.monotonic()) > 0 and not isinstance(self.port.wait(left), Stop):
            pass

    def beat(self, progress: int, now: float, *, working: bool = False) -> None:
        """Say that the work loop turns; sent at most every `BEAT_INTERVAL_S`, but at once if what comes next may take long (`working`) and
        that is news. `now`: any monotonic clock, seconds."""
        if self.supervised and (now >= self._next_beat or working is not self._working):
            self._next_beat = now + BEAT_INTERVAL_S
            self._working = working
            self.port.send(Heartbeat(self.name, progress, working))

    def poll(self) -> None:
        """Read what the supervisor said; never waits."""
        while self.supervised:
            try:
                message = self.port.receive()
            except ProtocolError as error:
                log.error("supervisor sent a bad message: %s", error)
                continue
            if message is None:
                return
            if isinstance(message, Stop):
                self._stop()
            elif isinstance(message, KernelRestarted):
                self.kernel_restarts += 1

    def close(self) -> None:
        self.port.close()

    def _stop(self) -> None:
        self.stopping = True


class AsyncLifeline:
    """The line on asyncio: `connect` starts a background task that beats and listens; wait for `stop`."""

    _signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, run_dir: RunDir, role: str, name: str, *, supervised: bool = True) -> None:
        self.port: AsyncDialer[Any] = AsyncDialer(run_dir, "supervisor", _schema)
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
        _announce(self, detail)

    async def failed(self, error: LlmosError) -> None:
        """As `Lifeline.failed`."""
        if self.supervised and self._tasks and self.port.send(_failure(self.name, error)):
            self.stop.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), _FAILED_ACK_S)

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


def _announce(line: Lifeline | AsyncLifeline, detail: str) -> None:
    if line.supervised:
        line.port.send(ServiceReady(line.name, os.getpid(), detail))
    else:
        sys.stdout.write(f"ready {line.name}\n")
        sys.stdout.flush()


def _failure(name: str, error: LlmosError) -> Message:
    return ServiceFailed(name, int(error.code), error.message, error.field)
