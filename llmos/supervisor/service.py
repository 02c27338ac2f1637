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
from llmos.protocol.messages import Heartbeat, ServiceFailed, ServiceStatus
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
        self.stop_by = 0.0  # in STOPPING
        self.renewing = False  # in STOPPING: another process is to take its place
        self.ready_at: float | None = None  # of this process
        self.beat_at = 0.0  # when its work loop last gave a sign of life
        self.deaths_in_a_row = 0
        self.restart_at = 0.0  # in BACKOFF
        self.progress = 0
        self.working = False  # its next sign of life may take longer

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        """0 without a process."""
        return self.process.pid if self.process else 0

    def start(self, now: float) -> None:
        self._move(ServiceState.STARTING)
        self.process = spawn(self.spec.command, dict(self.spec.environment), self.spec.inherits)
        self.pidfd = os.pidfd_open(self.process.pid)
        self.started_at, self.peer, self.failure, self.detail = now, None, None, "starting"
        self.ready_at, self.renewing = None, False

    def ready(self, detail: str, now: float) -> None:
        self._move(ServiceState.RUNNING)
        self.working = False
        self.detail, self.ready_at, self.beat_at = detail, now, now

    def beat(self, beat: Heartbeat, now: float) -> None:
        self.progress, self.working, self.beat_at = beat.progress, beat.working, now

    def count_death(self, stable_s: float, now: float) -> None:
        """It died without being asked to: the first of a new row if it had been ready for `stable_s`."""
        stable = self.ready_at is not None and now - self.ready_at >= stable_s
        self.deaths_in_a_row = 1 if stable else self.deaths_in_a_row + 1

    def wait_for_restart(self, restart_at: float) -> None:
        """After `reap(BACKOFF)`."""
        self.restart_at = restart_at
        self.restarts += 1

    def forgive(self) -> None:
        """Somebody wants it to be started again, whatever happened before."""
        self.deaths_in_a_row = 0

    def give_up_restart(self) -> None:
        """The daemon stops: nothing is started any more."""
        self._move(ServiceState.STOPPED)

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

    def was_killed(self) -> bool:
        """Did a signal end the process that `has_exited` saw?"""
        seen = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return seen is not None and seen.si_code != os.CLD_EXITED

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
