"""A private llmosd under attack: two fake models (`demo` for the innocent, `rogue` for what is broken on purpose), and a watch on it.

Only what this run started is ever looked at or touched.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from chaos.answers import write_fake_model
from chaos.standin import die_with_parent

START_S = 60.0
LOOK_S = 0.1
CONFIG = """
[daemon]
log_level = "warning"
{daemon}

[microkernel]
retention_s = 5.0
{microkernel}

[storage]
state_dir = "{home}/state"

{more}

[[models]]
name = "demo"
backend = "fake"
num_pages = {pages}

[[models]]
name = "rogue"
path = "{home}/model"
backend = "fake"
num_pages = 256
"""


@dataclass
class Seen:
    """One service while it was watched. `deaths`: times at which its process was another one, or none."""

    pid: int
    first_mib: float
    most_mib: float
    deaths: list[float] = field(default_factory=list)


class Target:
    """`with Target() as target:` serves. Sections of configuration: lines of [daemon], [microkernel], and whole further tables."""

    def __init__(
        self, *, daemon: str = "", microkernel: str = "", more: str = "", pages: int = 4096,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.home = Path(tempfile.mkdtemp(prefix="llmos-hostile-"))  # short: unix socket paths are limited
        self.run_dir = self.home / "run"
        self.log = self.home / "llmosd.log"
        write_fake_model(self.home / "model")
        config = CONFIG.format(home=self.home, daemon=daemon, microkernel=microkernel, more=more, pages=pages)
        (self.home / "llmosd.toml").write_text(config)
        self.services: dict[str, Seen] = {}
        self._environment = {**os.environ, **(environment or {})}
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Target:
        command = [sys.executable, "-P", "-m", "llmos.supervisor.main", "--config", str(self.home / "llmosd.toml")]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--run-dir", str(self.run_dir)], stdout=subprocess.PIPE, stderr=log, text=True,
                env=self._environment, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        assert self._process.stdout is not None
        line = ""
        if select.select([self._process.stdout], [], [], START_S)[0]:
            line = self._process.stdout.readline()
        if not line.startswith("llmos is serving"):
            self._end()
            raise RuntimeError(f"llmosd does not serve: {line}")
        self._watch.start()
        while len(self.services) < 7:
            time.sleep(LOOK_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._watch.join()
        self._end()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self.home, ignore_errors=True)

    # ------------------------------------------------------------ the watch

    def children(self) -> dict[str, psutil.Process]:
        """Service name -> process, as of now; the supervisor is `llmosd`."""
        found = {}
        try:
            root = psutil.Process(self._process.pid)
            found["llmosd"] = root
            for child in root.children():
                command = child.cmdline()
                if "--name" in command[:-1]:
                    found[command[command.index("--name") + 1]] = child
        except psutil.Error:  # one of them has just ended
            pass
        return found

    def pid(self, name: str) -> int:
        """0: it has no process right now."""
        child = self.children().get(name)
        return child.pid if child is not None else 0

    def look(self) -> None:
        now = time.monotonic()
        present = self.children()
        for name, process in present.items():
            try:
                mib = process.memory_info().rss / 2**20
            except psutil.Error:
                continue
            seen = self.services.setdefault(name, Seen(process.pid, mib, mib))
            seen.most_mib = max(seen.most_mib, mib)
            if seen.pid != process.pid:
                seen.pid = process.pid
                seen.deaths.append(now)

    def _look_on(self) -> None:
        while not self._stop.wait(LOOK_S):
            self.look()

    def deaths(self) -> dict[str, int]:
        self.look()
        return {name: len(seen.deaths) for name, seen in self.services.items() if seen.deaths}

    def memory(self) -> dict[str, tuple[int, int]]:
        """MiB of each service: when it was first seen, and at most."""
        return {name: (round(seen.first_mib), round(seen.most_mib)) for name, seen in self.services.items()}

    def mib(self, name: str) -> float:
        """Of this service now."""
        return float(self.children()[name].memory_info().rss) / 2**20

    def log_lines(self) -> int:
        return self.log.read_bytes().count(b"\n")


def vocab_size() -> int:
    """Of the embedded model, whose tokenizer the fake `demo` uses."""
    import llmos

    config = Path(llmos.__file__).parent / "assets" / "demo-model" / "config.json"
    return int(json.loads(config.read_text())["vocab_size"])
