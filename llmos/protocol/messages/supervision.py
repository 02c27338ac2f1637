"""The supervisor port, and what the supervisor tells the microkernel."""

from __future__ import annotations

from llmos.protocol.messages.base import Message
from llmos.protocol.messages.control import ServiceStatus


class ServiceReady(Message, tag=120, frozen=True):
    """Child -> supervisor: it can work now. `detail` is one line for people (what was loaded, how long it took)."""

    name: str
    pid: int
    detail: str


class Heartbeat(Message, tag=121, frozen=True):
    """Child -> supervisor from its work loop. `progress` grows with work done. `working`: what it does next may take long, so until the
    next beat it may be silent for longer than others."""

    name: str
    progress: int
    working: bool = False


class ServiceFailed(Message, tag=122, frozen=True):
    """Child -> supervisor just before it exits because it can not work (a typed reason for people)."""

    name: str
    code: int
    message: str
    field: str | None = None


class Stop(Message, tag=123, frozen=True):
    """Supervisor -> child: finish and exit within the grace time."""


class KernelRestarted(Message, tag=126, frozen=True):
    """Supervisor -> child: another microkernel process is ready; greet it."""


class ServiceReport(Message, tag=124, frozen=True):
    """Supervisor -> microkernel: all services as they are now; sent on each change."""

    services: tuple[ServiceStatus, ...]


class ServiceDown(Message, tag=125, frozen=True):
    """Supervisor -> microkernel: the process is dead and reaped. `role` as in its Hello; `name` e.g. executor.demo. `replaced`: another
    one will be started in its place; what it did can wait for that. Sent again with `replaced` false if that is given up. `asked`: it ended
    because it was asked to (`RestartService`), so nothing that it did is to blame."""

    role: str
    name: str
    pid: int
    replaced: bool = False
    asked: bool = False


class KillService(Message, tag=160, frozen=True):
    """Microkernel -> supervisor: this process hangs or lies, put another one in its place. `reason` is for people. What follows is what
    follows any death; may be repeated."""

    name: str
    reason: str


class Drain(Message, tag=154, frozen=True):
    """Supervisor -> microkernel: take no new work from now on, the daemon will stop. May be repeated. The answer is `Draining`."""


class Draining(Message, tag=155, frozen=True):
    """How many sequences generate, or would if it were their turn (not: suspended by their owner, or waiting for others), and for how long
    no output has ended: so long its last tokens may still be on their way to a client."""

    generating: int
    quiet_ms: float
