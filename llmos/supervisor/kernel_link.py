"""The supervisor's line to the microkernel: which services exist, and which died; which one to start again. Never waits for it.

States: closed -> opening (`open`, hello not yet answered) -> greeted (Welcome) -> closed (`close`, when the
microkernel dies). What is to be told before the Welcome is kept; of reports only the newest.
"""

from __future__ import annotations

import logging
from typing import Any

import zmq

from llmos.errors import LlmosError
from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Dialer
from llmos.protocol import handshake
from llmos.protocol.codec import Schema
from llmos.protocol.messages import Drain, Error, FromKernel, Message, ServiceDown, ServiceReport

log = logging.getLogger(__name__)
_schema: Schema[Any] = Schema(FromKernel)


class KernelLink:
    """A dialer to `kernel-control` whose handshake is spread over turns of the supervisor's loop, which its answers wake."""

    def __init__(self, run_dir: RunDir, poller: zmq.Poller) -> None:
        self._run_dir = run_dir
        self._poller = poller
        self._said_hello = False
        self._greeted = False
        self._downs: list[ServiceDown] = []
        self._report: ServiceReport | None = None
        self.dialer: Dialer[Any] | None = None

    @property
    def opening(self) -> bool:
        return self.dialer is not None and not self._greeted

    def open(self) -> None:
        """The microkernel is ready: connect."""
        self.close()
        self.dialer = Dialer(self._run_dir, "kernel-control", _schema)
        self._poller.register(self.dialer.socket, zmq.POLLIN)

    def close(self) -> None:
        if self.dialer is not None:
            self._poller.unregister(self.dialer.socket)
            self.dialer.close()
        self.dialer, self._said_hello, self._greeted = None, False, False

    def down(self, message: ServiceDown) -> None:
        """A service died; told before the report that shows it."""
        self._downs.append(message)

    def report(self, message: ServiceReport) -> None:
        self._report = message

    def drain(self) -> None:
        """Ask it to take no new work, if it is there; to be repeated."""
        if self.dialer is not None and self._greeted:
            self.dialer.send(Drain())

    def pump(self) -> list[Message]:
        """Move the handshake on, and say what is to be said. Returns what the microkernel says."""
        heard: list[Message] = []
        if self.dialer is None:
            return heard
        try:
            if not self._said_hello:
                self._said_hello = self.dialer.send(handshake.hello("supervisor", "llmosd"))
            while (message := self.dialer.receive()) is not None:
                if not self._greeted:
                    handshake.check_answer(message, "microkernel")
                    self._greeted = True
                elif isinstance(message, Error):
                    log.error("the microkernel refused what it was told: %s", message.message)
                else:
                    heard.append(message)
        except LlmosError as error:
            log.error("microkernel, on kernel-control: %s", error.message)
            self.close()
            return heard
        if self._greeted:
            self._flush(self.dialer)
        return heard

    def _flush(self, dialer: Dialer[Any]) -> None:
        while self._downs and dialer.send(self._downs[0]):
            self._downs.pop(0)
        if self._report is not None and not self._downs and dialer.send(self._report):
            self._report = None
