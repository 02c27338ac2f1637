"""What llmosd tells the service manager that started it (systemd, Type=notify): ready, a line of status, signs of life, stopping.

One datagram each to the unix socket that $NOTIFY_SOCKET names, a path or, behind an "@", an abstract name. Without it nothing happens.
The variables are taken out of the environment: what they promise is between the manager and llmosd, not its children.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterable, MutableMapping

from llmos.codes import ServiceState
from llmos.protocol.messages import ServiceStatus

_SEND_TIMEOUT_S = 1.0  # the manager reads at once, or is in trouble itself
log = logging.getLogger(__name__)


class Notifier:
    """`interval_s`: how often `beat` has to be called so that the manager does not take us for hung; infinite without a watchdog."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        name = environment.pop("NOTIFY_SOCKET", "")
        limit_us = environment.pop("WATCHDOG_USEC", "")
        for_pid = environment.pop("WATCHDOG_PID", "")
        self.interval_s = math.inf
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._next_beat = 0.0
        self._status = ""
        self._failed = False
        self._socket: socket.socket | None = None
        if not name.startswith(("/", "@")):
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_SEND_TIMEOUT_S)
        if limit_us.isdecimal() and int(limit_us) > 0 and for_pid in ("", str(os.getpid())):
            self.interval_s = int(limit_us) / 2e6

    def ready(self) -> None:
        """The daemon serves."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The daemon stops, whoever asked for it."""
        self._send("STOPPING=1")

    def beat(self, now: float) -> None:
        """The work loop turns; for each of its turns."""
        if now >= self._next_beat and self.interval_s < math.inf:
            self._next_beat = now + self.interval_s
            self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for people; sent if it is another one."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self.interval_s = None, math.inf

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(text.encode(), self._address)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("the service manager can not be told %s: %s", text, error)
            self._failed = True


def status_line(doing: str, services: Iterable[ServiceStatus]) -> str:
    """What the daemon does, for which models, and who is not at work: "serving demo; storage is starting"."""
    known = tuple(services)
    models = ", ".join(each.name.removeprefix("executor.") for each in known if each.name.startswith("executor."))
    absent = [
        f"{each.name} is {ServiceState(each.state).name.lower()}"
        for each in known
        if each.state != ServiceState.RUNNING
    ]
    return "; ".join([f"{doing} {models}".rstrip(), *absent])
