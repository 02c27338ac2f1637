"""A small stand-in for systemd: starts llmosd, starts it again when it ends without being asked to, watches its watchdog.

As in a unit with `Type=notify`, `Restart=always`, `TimeoutStartSec` and `WatchdogSec`. The watchdog only bites a llmosd that has
spoken to it. If llmosd does not come to serve in `MOST_STARTS` attempts in a row, the stand-in gives up (`failure`), as systemd would.

States: down -> starting -> serving -> (dies) down ... -> stopped. Must run in the main thread: llmosd dies with the thread that
started it, so that nothing is left when this program is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import socket
import sys
import time
from dataclasses import dataclass

from chaos.home import Home

SERVING = "llmos is serving"
RESTART_S = 0.1
WATCHDOG_S, WATCH_S = 5.0, 0.1
START_TIMEOUT_S = 60.0
MOST_STARTS = 30
STOP_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """For `preexec_fn`: one system call."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Life:
    """One llmosd process."""

    pid: int
    started_at: float
    served_at: float | None = None
    ended_at: float | None = None


class Standin:
    """`start`, and `stop` in any case."""

    def __init__(self, home: Home) -> None:
        self.lives: list[Life] = []
        self.failure: str | None = None
        self.serving = asyncio.Event()
        self._home = home
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.bind(str(home.path / "notify"))

    @property
    def pid(self) -> int:
        """Of the living llmosd; 0 without one."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    async def start(self) -> None:
        """Returns when it serves for the first time; raises RuntimeError if it does not."""
        self._task = asyncio.create_task(self._run())
        serving = asyncio.create_task(self.serving.wait())
        await asyncio.wait({self._task, serving}, return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        if not self.serving.is_set():
            self._task.result()
            raise RuntimeError(self.failure or "llmosd did not start")

    async def stop(self) -> int | None:
        """Ask llmosd to stop; returns its exit code, or what killed it. None: there was none."""
        self._stopping = True
        process = self._process
        code = None
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                code = await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                code = await process.wait()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._notify.close()
        return code

    async def _run(self) -> None:
        attempts = 0
        while not self._stopping:
            attempts += 1
            if await self._one_life():
                attempts = 0
            if attempts >= MOST_STARTS:
                self.failure = f"llmosd did not come to serve in {attempts} starts"
                return
            await asyncio.sleep(RESTART_S)

    async def _one_life(self) -> bool:
        """Start it and wait for its end; True if it has served."""
        command = [sys.executable, "-P", "-m", "llmos.supervisor.main"]
        command += ["--config", str(self._home.config), "--run-dir", str(self._home.run_dir)]
        watchdog = {"NOTIFY_SOCKET": str(self._home.path / "notify"), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
        self._notifications()  # what the one before said is not about this one
        with self._home.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log,
                env=self._home.environment | watchdog, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        process = self._process
        life = Life(process.pid, time.monotonic())
        self.lives.append(life)
        watching = asyncio.create_task(self._watch(process))
        assert process.stdout is not None
        while line := await process.stdout.readline():
            if line.decode(errors="replace").startswith(SERVING):
                life.served_at = time.monotonic()
                self.serving.set()
        await process.wait()
        self.serving.clear()
        life.ended_at = time.monotonic()
        watching.cancel()
        return life.served_at is not None

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """It has to be ready in time; from then on, a watchdog that falls silent is answered with SIGABRT and SIGKILL (a stopped
        process takes no SIGABRT)."""
        is_ready, last_beat, start_by = False, None, time.monotonic() + START_TIMEOUT_S
        while process.returncode is None:
            if not self.serving.is_set() and time.monotonic() > start_by:
                process.kill()
            words = self._notifications()
            is_ready = is_ready or "READY=1" in words
            if is_ready and "WATCHDOG=1" in words:
                last_beat = time.monotonic()
            if last_beat is not None and time.monotonic() - last_beat > WATCHDOG_S:
                last_beat = None
                for number in (signal.SIGABRT, signal.SIGKILL):
                    process.send_signal(number)
            await asyncio.sleep(WATCH_S)

    def _notifications(self) -> list[str]:
        """All that was said since the last call."""
        words = []
        with contextlib.suppress(BlockingIOError):
            while True:
                words += self._notify.recv(4096).decode(errors="replace").splitlines()
        return words
