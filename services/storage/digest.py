"""Content digests of model directories, computed in slices so that the service loop keeps answering.

A model's digest is sha256 over the lines "<sha256 of the file> <file name>" of its files in name order. Digests of
files are kept by (path, size, modification time), so that a restart reads nothing again. Invariant: one `work` call
returns within its budget plus one read of `_READ_BYTES`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_READ_BYTES = 1 << 20
_PATTERNS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


@dataclass(frozen=True)
class FileId:
    """A file's content as far as can be told without reading it."""

    path: str
    size: int
    mtime_ns: int


def model_files(directory: Path) -> list[FileId]:
    """What makes the model in `directory`: configuration, tokenizer and weights, in name order."""
    found = {path for pattern in _PATTERNS + _TOKENIZER_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    files = []
    for path in sorted(found):
        status = path.stat()
        files.append(FileId(str(path), status.st_size, status.st_mtime_ns))
    return files


class Digester:
    """Computes the digest of one model. `known` and `learn` are the cache of file digests."""

    def __init__(
        self, files: list[FileId], known: Callable[[FileId], str | None], learn: Callable[[FileId, str], None]
    ) -> None:
        self._files: Iterator[FileId] = iter(files)
        self._known = known
        self._learn = learn
        self._lines = hashlib.sha256()
        self._current: tuple[FileId, BinaryIO, hashlib._Hash] | None = None

    def work(self, budget_s: float) -> str | None:
        """Go on for at most `budget_s`; the digest when it is done, else None. `OSError` if a file can not be read."""
        deadline = time.monotonic() + budget_s
        while True:
            if self._current is None:
                file = next(self._files, None)
                if file is None:
                    return self._lines.hexdigest()
                self._begin(file)
            else:
                self._read(*self._current)
            if time.monotonic() >= deadline:
                return None

    def close(self) -> None:
        """Give up."""
        if self._current is not None:
            self._current[1].close()
            self._current = None

    def _begin(self, file: FileId) -> None:
        known = self._known(file)
        if known is not None:
            self._add(file, known)
        else:
            stream = Path(file.path).open("rb", buffering=0)  # noqa: SIM115 - read over many calls, closed by close()
            self._current = (file, stream, hashlib.sha256())

    def _read(self, file: FileId, stream: BinaryIO, digest: hashlib._Hash) -> None:
        block = stream.read(_READ_BYTES)
        digest.update(block)
        if not block:
            self.close()
            self._learn(file, digest.hexdigest())
            self._add(file, digest.hexdigest())

    def _add(self, file: FileId, digest: str) -> None:
        self._lines.update(f"{digest} {Path(file.path).name}\n".encode())
