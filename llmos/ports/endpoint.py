"""The run directory: where sockets, lock and pid live, and with which modes.

Invariants: the directory is 0700 and ours, sockets in it are 0600 (umask 0177 around bind), paths fit a unix socket address.
Sockets: `client` and `client-control` (SDK -> gateway), `kernel` and `kernel-control` (services -> microkernel),
`text` (gateway -> tokenizer), `supervisor` (children -> supervisor).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from llmos.errors import ConfigError

_MAX_SOCKET_PATH = 107  # sun_path on Linux, less the terminating zero
_LONGEST_NAME = len("/client-control.sock")


def default_run_dir() -> Path:
    """$LLMOS_RUN_DIR, else $XDG_RUNTIME_DIR/llmosd, else /run/llmosd for root, else a folder of this user in the temporary directory."""
    if chosen := os.environ.get("LLMOS_RUN_DIR"):
        return Path(chosen)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "llmosd"
    if os.geteuid() == 0:
        return Path("/run/llmosd")
    return Path(f"/tmp/llmosd-{os.geteuid()}")


class RunDir:
    """Paths inside one run directory."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        if len(str(self.path).encode()) + _LONGEST_NAME > _MAX_SOCKET_PATH:
            raise ConfigError(
                f"run_dir {self.path} is too long for unix sockets ({_MAX_SOCKET_PATH} bytes)", field="run_dir"
            )

    def create(self) -> None:
        """Make the directory 0700; refuse one that is not ours alone: another user's, a link, or in use with wider rights."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise ConfigError(f"run_dir {self.path} is not a directory of this user", field="run_dir")
        if found.st_mode & 0o077:
            # Closing a folder that others use (somebody's --run-dir /tmp) would break the machine.
            if any(self.path.iterdir()):
                raise ConfigError(f"run_dir {self.path} is open to other users and not empty", field="run_dir")
            self.path.chmod(0o700)

    def socket(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def address(self, name: str) -> str:
        """The ZeroMQ address of a socket."""
        return f"ipc://{self.socket(name)}"

    @property
    def lock(self) -> Path:
        return self.path / "llmosd.lock"

    def remove_sockets(self) -> None:
        """Delete socket files; only called by whoever holds the lock."""
        for found in self.path.glob("*.sock"):
            found.unlink(missing_ok=True)
