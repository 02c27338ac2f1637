"""A disk that fails on demand: calls of `os` that touch one folder are counted, and some of them fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

BY_PATH = ("open", "unlink", "mkdir", "statvfs", "truncate", "rename", "replace")
BY_FILE = ("write", "fdatasync", "fsync", "posix_fallocate", "ftruncate")


class BadDisk:
    """`with BadDisk(folder) as disk:`; `disk.fails(name, count)` decides about each call. A failing write writes half of it first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.error = 0
        self.failed = 0
        self.fails: Callable[[str, int], bool] = lambda name, count: False
        self._files: set[int] = set()
        self._real = {name: getattr(os, name) for name in (*BY_PATH, *BY_FILE, "close")}

    def __enter__(self) -> BadDisk:
        fakes = {name: self._by_path(name) for name in BY_PATH} | {name: self._by_file(name) for name in BY_FILE}
        self._patch = mock.patch.multiple(os, **fakes, close=self._close)
        self._patch.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._patch.stop()

    def _call(self, name: str) -> bool:
        """One more; does it fail?"""
        self.calls.append(name)
        bad = self.fails(name, len(self.calls))
        self.failed += bad
        return bad

    def _by_path(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(path: Any, *rest: Any, **options: Any) -> Any:
            mine = str(path).startswith(str(self.folder))
            if mine and self._call(name):
                raise OSError(self.error, os.strerror(self.error), str(path))
            found = real(path, *rest, **options)
            if mine and name == "open":
                self._files.add(found)
            return found

        return call

    def _by_file(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(file: int, *rest: Any) -> Any:
            if file in self._files and self._call(name):
                if name == "write":
                    real(file, rest[0][: len(rest[0]) // 2])
                raise OSError(self.error, os.strerror(self.error))
            return real(file, *rest)

        return call

    def _close(self, file: int) -> None:
        self._files.discard(file)
        self._real["close"](file)
