"""A private llmosd for one benchmark: own run directory, own configuration, own state; stopped with SIGTERM at the end."""

from __future__ import annotations

import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil

SERVING = "llmos is serving"
CONFIG = """
[daemon]
log_level = "warning"
start_timeout_s = {timeout}

[microkernel]
max_rows = {max_rows}
prefix_cache = false

[[models]]
name = "bench"
path = "{model}"
backend = "{backend}"
threads = {threads}
weights = "{weights}"

[http]
{http}

[storage]
state_dir = "{state}"
"""


class Daemon:
    """`with Daemon(...) as daemon:` gives a serving llmosd at `daemon.run_dir`."""

    def __init__(
        self,
        model: Path,
        *,
        threads: int,
        max_rows: int = 64,
        timeout_s: float = 180.0,
        backend: str = "cpu",
        http_workers: int = 0,
        weights: str = "as_is",
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="llmos-"))
        self.run_dir = self._folder / "run"
        self.log = self._folder / "llmosd.log"
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        values = {"model": model, "state": self._folder / "state", "threads": threads, "max_rows": max_rows}
        values["http"] = f'address = "127.0.0.1:0"\nworkers = {http_workers}' if http_workers else "enabled = false"
        values["weights"] = weights
        self._config = self._folder / "llmosd.toml"
        self._config.write_text(CONFIG.format(timeout=timeout_s, backend=backend, **values))

    def __enter__(self) -> Daemon:
        command = [sys.executable, "-P", "-m", "llmos.supervisor.main"]
        command += ["--config", str(self._config), "--run-dir", str(self.run_dir)]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            self._wait_until_serving(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def idle_cores(self, seconds: float = 1.0) -> float:
        """Cores that the whole process tree burns while nothing is asked of it."""
        before = self._cpu_seconds()
        start = time.perf_counter()
        time.sleep(seconds)  # the measurement itself, not a synchronisation
        return (self._cpu_seconds() - before) / (time.perf_counter() - start)

    def processes(self) -> list[psutil.Process]:
        """llmosd and all that it started."""
        assert self._process is not None
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def _cpu_seconds(self) -> float:
        times = [process.cpu_times() for process in self.processes()]
        return float(sum(used.user + used.system for used in times))

    def _wait_until_serving(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        deadline = time.monotonic() + self._timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([process.stdout], [], [], left)[0]:
                break
            line = process.stdout.readline()
            if line.startswith(SERVING):
                return
            if not line:
                raise RuntimeError(f"llmosd ended with {process.wait()}:\n{self.log.read_text()[-3000:]}")
        raise RuntimeError(f"llmosd did not serve within {self._timeout_s} s:\n{self.log.read_text()[-3000:]}")

    def _stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)
