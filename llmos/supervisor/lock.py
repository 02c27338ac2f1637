"""One daemon per run directory: an flock on `llmosd.lock`, which holds the owner's pid.

The operating system drops the lock with its holder, so a lock file left by `kill -9` refuses nobody.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from llmos.ports.endpoint import RunDir


class AlreadyRunning(Exception):
    """Another llmosd holds the run directory."""

    def __init__(self, pid: str, run_dir: RunDir) -> None:
        super().__init__(f"llmosd is already running on {run_dir.path} (pid {pid})")
        self.pid = pid


class RunLock:
    """Context manager that holds the lock; raises `AlreadyRunning`."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._fd = -1

    def __enter__(self) -> RunLock:
        path = self._run_dir.lock
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.read(fd, 32).decode(errors="replace").strip()
                os.close(fd)
                raise AlreadyRunning(pid or "unknown", self._run_dir) from None
            # The previous holder removes the file when it leaves; a lock on a removed file protects nothing.
            if _is_file(path, fd):
                break
            os.close(fd)
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        self._fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run_dir.lock.unlink(missing_ok=True)
        os.close(self._fd)


def _is_file(path: Path, fd: int) -> bool:
    """True if `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
