"""A real llmosd with real processes on a private run directory, for tests. Leaves nothing behind."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

DEADLINE_S = 60.0


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll until `condition()` is true; fail with `what` at the deadline."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.02)


class Daemon:
    """Started and serving. `log` is its stderr. `prepare`: done to its state directory before it starts."""

    def __init__(self, config: str, prepare: Callable[[Path], object] = lambda state: None) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="llmos-"))  # short: unix socket paths are limited
        self.run_dir = self.home / "run"
        self.config = self.home / "llmosd.toml"
        http = "" if "[http]" in config else "\n[http]\nenabled = false\n"  # a process that most tests do not need
        self.config.write_text(config + http + f'\n[storage]\nstate_dir = "{self.home}/state"\n')
        self.log_path = self.home / "log"
        prepare(self.home / "state")
        self._start()

    def start_again(self) -> None:
        """After it ended: on the same directories."""
        assert self.process.poll() is not None
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._start()

    def _start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("llmosd"), "--config", self.config, "--run-dir", self.run_dir],
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        self.serving_line = self.process.stdout.readline()
        assert self.serving_line.startswith("llmos is serving"), self.log_path.read_text()

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def children(self) -> dict[str, psutil.Process]:
        """Service name -> process, by the command line it was started with."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            command = child.cmdline()
            if "--name" in command:
                found[command[command.index("--name") + 1]] = child
        return found

    def listening(self) -> set[str]:
        """Network sockets that any of its processes could be reached through."""
        processes = [psutil.Process(self.process.pid), *self.children().values()]
        return {
            f"{inet.laddr.ip}:{inet.laddr.port}"
            for process in processes
            for inet in process.net_connections("inet")
            if inet.status == psutil.CONN_LISTEN or inet.type != socket.SOCK_STREAM
        }

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self.home, ignore_errors=True)


@contextlib.contextmanager
def running(config: str, prepare: Callable[[Path], object] = lambda state: None) -> Iterator[Daemon]:
    """A daemon that is stopped at the end, whatever happens."""
    daemon = Daemon(config, prepare)
    try:
        yield daemon
        if daemon.process.poll() is None:
            assert daemon.stop() == 0, daemon.log
    finally:
        daemon.close()


FAKE = """
[[models]]
name = "demo"
backend = "fake"
num_pages = 512
"""
