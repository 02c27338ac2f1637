"""Files of the state directory that only the daemon's user may read: one lock for all of them, and how they are replaced and judged."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from llmos.errors import ConfigError


@contextlib.contextmanager
def locked(folder: Path, field: str) -> Iterator[None]:
    """Nobody else changes keys meanwhile. The folder is made if need be. Raises `ConfigError` about `field`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / "keys.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"{folder} can not be used: {error.strerror}", field=field) from None
    try:
        give_to_owner(fd, folder)
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def problem_of(found: os.stat_result) -> str | None:
    """Why a file that was found is not to be trusted."""
    if not stat.S_ISREG(found.st_mode):
        return "not a file"
    if found.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {found.st_uid}"
    if found.st_mode & 0o077:
        return f"it is open to other users (mode {found.st_mode & 0o777:o}); chmod 600 it"
    return None


def read_private(path: Path, most: int, field: str, *, distrust: str | None = None) -> bytes | None:
    """The first `most` bytes of such a file; None = there is none. Raises `ConfigError` about `field` if it is not to be trusted;
    `distrust`: in these words, whatever the problem is."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", field=field) from None
    with os.fdopen(fd, "rb") as file:
        if (problem := problem_of(os.fstat(fd))) is not None:
            raise ConfigError(f"{path}: {distrust or problem}", field=field)
        return file.read(most)


def replace_private(path: Path, content: bytes) -> None:
    """Write a 0600 file in one step: after a crash there is the old one or the new one. Raises `ConfigError`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            give_to_owner(fd, path.parent)
            file.write(content)
            file.flush()
            os.fsync(fd)
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise ConfigError(f"{path} can not be written: {error.strerror}", field="keys") from None


def give_to_owner(fd: int, folder: Path) -> None:
    """What root makes in the state directory of another user's daemon has to be that user's."""
    owner = folder.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(fd, owner.st_uid, owner.st_gid)
