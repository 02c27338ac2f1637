"""Disk space that the journal keeps back: so that no new work is taken before the disk is full, and what runs then can be written."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)
_LOOK_S = 1.0
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Reserve:
    """A file of `size` bytes beside the segments; 0 = nothing is kept back. `shortage`: why no new work should be taken."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._path = directory / "reserve"
        self._size = size
        self._has_file: bool | None = None  # None: an earlier process may have left it
        self._look_at = 0.0
        self.shortage: str | None = None

    def look(self, now: float) -> None:
        """From time to time: is there room enough? The file is made anew when there is twice as much as it takes."""
        if not self._size or now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        try:
            if self._has_file is None:
                self._has_file = self._path.exists() and self._path.stat().st_size == self._size
            free = self._free()
            if not self._has_file and free >= 2 * self._size:
                self._has_file = self._make()
                free = self._free()
        except OSError as error:
            self._tell(f"{self._directory}: {error.strerror or error}")
            return
        needed = self._size if self._has_file else 2 * self._size
        short = free < needed
        self._tell(
            f"disk space is low: {free >> 20} MiB are free in {self._directory}, {needed >> 20} are needed"
            if short
            else None
        )

    def give_up(self) -> None:
        """The disk is full: room for what has begun."""
        self._has_file = False
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _free(self) -> int:
        found = os.statvfs(self._directory)
        return found.f_bavail * found.f_frsize

    def _make(self) -> bool:
        """True: what is there now can be given up. Not every file system can set space aside; then only the free space counts."""
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, self._size)
        except OSError as error:
            if error.errno in FULL:
                self.give_up()
                raise
            log.warning("no space can be set aside in %s: %s", self._directory, error.strerror)
        finally:
            os.close(file)
        return True

    def _tell(self, shortage: str | None) -> None:
        if (shortage is None) != (self.shortage is None):
            log.warning("%s", shortage or f"there is enough disk space again in {self._directory}")
        self.shortage = shortage
