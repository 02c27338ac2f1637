"""Who is there behind a run directory: does anybody listen, does a daemon run. Asks the operating system, never the daemon."""

from __future__ import annotations

import os
import socket as unix

from llmos.errors import DaemonNotRunning, PermissionRefused
from llmos.ports.endpoint import RunDir


def check_listening(run_dir: RunDir, name: str) -> None:
    """Raise `DaemonNotRunning` if nobody accepts connections on the socket. ZeroMQ would retry in silence instead."""
    path = str(run_dir.socket(name))
    with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return  # its backlog is full: it lives
        except PermissionError:
            raise PermissionRefused(f"no permission to connect to llmosd on {run_dir.path}", field="run_dir") from None
        except OSError:
            raise DaemonNotRunning(
                f"llmosd is not running on {run_dir.path}; start it with: llmosd (or: make run)", field="run_dir"
            ) from None


def daemon_runs(run_dir: RunDir) -> bool:
    """Is the process alive that wrote itself into the lock? (To try the lock would keep a daemon that starts just now from it.)"""
    try:
        pid = int(run_dir.lock.read_text())
        if pid > 0:
            os.kill(pid, 0)
    except PermissionError:
        return True  # another user's process, and the lock is ours to read
    except (OSError, ValueError, OverflowError):
        return False
    return pid > 0
