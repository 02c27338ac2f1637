"""One child process as the supervisor sees it: its state, its pid, what it last said.

Invariant: `process` is set exactly in the states that have a pid (states.HAS_PROCESS); it is reaped before the state
leaves them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from llmos.codes import ServiceState
from llmos.ports.core import Peer
from llmos.protocol.messages import ServiceFailed, ServiceStatus
from llmos.supervisor import states
from llmos.supervisor.plan import ServiceSpec
from llmos.supervisor.spawn import spawn


class Service:
    """Owner of one child. Decides nothing; the supervisor does."""

    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self.state = ServiceState.STOPPED
        self.process: subprocess.Popen[bytes] | None = None
        self.pidfd = -1
        self.peer: Peer | None = None
        self.failure: ServiceFailed | None = None
        self.detail = ""
        self.restarts = 0
        self.started_at = 0.0
        self.stop_by = 0.0
        self.progress = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        """0 without a process."""
        return self.process.pid if self.process else 0

    def start(self, now: float) -> None:
        self._move(ServiceState.STARTING)
        self.process = spawn(self.spec.command, dict(self.spec.environment))
        self.pidfd = os.pidfd_open(self.process.pid)
        self.started_at, self.peer, self.failure, self.detail = now, None, None, "starting"

    def ready(self, detail: str) -> None:
        self._move(ServiceState.RUNNING)
        self.detail = detail

    def ask_to_stop(self, stop_by: float) -> None:
        """SIGTERM; the caller sends the Stop message."""
        self._move(ServiceState.STOPPING)
        self.detail, self.stop_by = "stopping", stop_by
        os.kill(self.pid, signal.SIGTERM)  # not Popen.terminate, which reaps on its own

    def kill_group(self) -> None:
        """SIGKILL to the child and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def has_exited(self) -> bool:
        """True once the process is dead; it stays a zombie until `reap`."""
        return (
            self.process is not None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        )

    def reap(self, into: ServiceState) -> tuple[int, str]:
        """Collect a dead process and the rest of its group, enter `into`; returns exit code and how it ended."""
        assert self.process is not None
        self.kill_group()  # before the reaping: afterwards the number could belong to somebody else
        code = self.process.wait()
        ending = _ending(code)
        os.close(self.pidfd)
        self.process, self.pidfd, self.peer = None, -1, None
        self._move(into)
        self.detail = f"{ending}: {self.failure.message}" if self.failure else ending
        return code, self.detail

    def status(self, now: float) -> ServiceStatus:
        assert (self.process is not None) == (self.state in states.HAS_PROCESS)
        uptime = (now - self.started_at) * 1000 if self.process else 0.0
        return ServiceStatus(self.name, int(self.state), self.pid, self.restarts, round(uptime, 1), self.detail)

    def _move(self, new: ServiceState) -> None:
        states.check(self.state, new)
        self.state = new


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
