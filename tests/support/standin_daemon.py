"""llmosd with stand-ins for its children (tests/supervisor/daemon.py), and the fixture that starts it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

DEADLINE_S = 60.0
DAEMON = str(Path(__file__).parents[1] / "supervisor" / "daemon.py")
NAMES = ["executor.demo", "gateway", "microkernel", "storage", "tokenizer"]


def wait_for(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError(f"{what}: not within {DEADLINE_S} s")


class Daemon:
    """One llmosd process and what it wrote."""

    def __init__(self, run_dir, *options, environment=None, **standins):
        self.run_dir = run_dir
        self.log_path = run_dir.parent / "log.txt"
        behaviours = ",".join(f"{name.replace('__', '.')}={behaviour}" for name, behaviour in standins.items())
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", DAEMON, "--run-dir", str(run_dir), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"STANDINS": behaviours} | (environment or {}),
                start_new_session=True,
            )

    @property
    def log(self):
        return self.log_path.read_text()

    def serving_line(self):
        return self.process.stdout.readline()

    def children(self):
        """{service name: psutil.Process}"""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if "--name" in words:  # between fork and exec it still has our command line
                    found[words[words.index("--name") + 1]] = child
        return found

    def told(self):
        path = self.run_dir / "told.txt"
        return path.read_text().splitlines() if path.exists() else []

    def end(self):
        self.process.wait(DEADLINE_S)
        self.process.stdout.close()
        return self.process.returncode


@pytest.fixture
def start():
    """Starts daemons in a short folder; whatever the test does, none is left."""
    daemons = []
    with tempfile.TemporaryDirectory(prefix="llmos-") as folder:

        def start_daemon(*options, environment=None, **standins):
            daemons.append(Daemon(Path(folder) / "run", *options, environment=environment, **standins))
            return daemons[-1]

        yield start_daemon
        for daemon in daemons:
            if daemon.process.poll() is None:
                daemon.process.kill()
            daemon.end()


def assert_gone(processes):
    wait_for(lambda: not any(is_alive(process) for process in processes), f"end of {processes}")


def is_alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_clean(run_dir):
    left = [found.name for found in run_dir.iterdir() if found.suffix not in (".txt",)]
    assert left == []
