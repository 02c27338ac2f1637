"""A child's line to the supervisor: hello, ready, heartbeats, the reason of a failure, and the request to stop.

`Lifeline` blocks and is polled from a work loop (microkernel, executor, storage); `AsyncLifeline` (async_lifeline.py, so that those who do
not use it need not load asyncio at each start) beats from its event loop (tokenizer, gateway). Heartbeats therefore come from the loop that
does the work: a hung loop stops beating.
States: new -> connected (`connect`) -> ready (`ready`) -> stopping (Stop message, SIGTERM or SIGINT). An unsupervised
lifeline (`supervised=False`, for tests) sends nothing, still handles signals, and prints `ready NAME` on stdout.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import Any, Protocol

from llmos.errors import LlmosError, ProtocolError
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
FAILED_ACK_S = (
    1.0  # the supervisor answers ServiceFailed with Stop; without waiting for it the message could die with us
)
FROM_SUPERVISOR: Schema[Any] = Schema(FromSupervisor)


class Port(Protocol):
    def send(self, message: Message) -> bool: ...


class Announcing(Protocol):
    """What both kinds of line have."""

    name: str
    supervised: bool

    @property
    def port(self) -> Port: ...


class Lifeline:
    """The blocking line. Put `port` into the loop's `PortSet`; call `poll()` and `beat()` once per turn."""

    def __init__(self, run_dir: RunDir, role: str, name: str, *, supervised: bool = True) -> None:
        self.port: Dialer[Any] = Dialer(run_dir, "supervisor", FROM_SUPERVISOR)
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
        announce(self, detail)

    def failed(self, error: LlmosError) -> None:
        """This process can not work; returns when the supervisor knows, or after a second. The caller exits."""
        if not self.supervised or not self.port.send(failure(self.name, error)):
            return
        deadline = time.monotonic() + FAILED_ACK_S
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


def announce(line: Announcing, detail: str) -> None:
    if line.supervised:
        line.port.send(ServiceReady(line.name, os.getpid(), detail))
    else:
        sys.stdout.write(f"ready {line.name}\n")
        sys.stdout.flush()


def failure(name: str, error: LlmosError) -> Message:
    return ServiceFailed(name, int(error.code), error.message, error.field)
