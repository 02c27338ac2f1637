"""The registry of models: SQLite in the state directory, one row per model, and digests of files already read.

Invariants: the file is 0600; states are as of this start (nothing is `serving` until the microkernel says so); a file
that is not a readable registry of this version is moved aside and replaced, never repaired and never deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from pathlib import Path

from llmos.errors import ConfigError
from llmos.protocol.messages import ModelRow
from llmos.services.storage.digest import FileId

AVAILABLE, SERVING, FAILED = "available", "serving", "failed"
_VERSION = 1
_SCHEMA = """
CREATE TABLE models (
    name TEXT PRIMARY KEY, path TEXT NOT NULL, digest TEXT NOT NULL, architecture TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('available', 'serving', 'failed')), bytes INTEGER NOT NULL,
    added_at REAL NOT NULL
) STRICT;
CREATE TABLE files (
    path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL
) STRICT;
"""
log = logging.getLogger(__name__)


class Registry:
    """Owner of the database. Every method is one transaction."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "registry.sqlite3"
        _prepare(directory)
        try:
            self._db = _open(self.path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and not self.path.is_file():
                raise ConfigError(f"cannot open {self.path}: {error}", field="state_dir") from None
            self._set_aside(error)
            self._db = _open(self.path)

    def register(self, name: str, path: str, architecture: str, size: int, state: str) -> None:
        """Add a model or bring its row up to date. Another path or size voids the digest."""
        with self._db:
            self._db.execute(
                "INSERT INTO models VALUES (?, ?, '', ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                "digest = CASE WHEN path = excluded.path AND bytes = excluded.bytes THEN digest ELSE '' END, "
                "path = excluded.path, architecture = excluded.architecture, "
                "state = excluded.state, bytes = excluded.bytes",
                (name, path, architecture, state, size, time.time()),
            )

    def set_state(self, name: str, state: str) -> bool:
        """False if there is no such model."""
        with self._db:
            return self._db.execute("UPDATE models SET state = ? WHERE name = ?", (state, name)).rowcount == 1

    def set_digest(self, name: str, digest: str) -> None:
        with self._db:
            self._db.execute("UPDATE models SET digest = ? WHERE name = ?", (digest, name))

    def rows(self) -> tuple[ModelRow, ...]:
        """All models by name."""
        columns = "name, path, digest, architecture, state, bytes"
        return tuple(ModelRow(*row) for row in self._db.execute(f"SELECT {columns} FROM models ORDER BY name"))

    def known_file(self, file: FileId) -> str | None:
        """The digest of exactly this content, if it was read before."""
        found = self._db.execute(
            "SELECT sha256 FROM files WHERE path = ? AND size = ? AND mtime_ns = ?",
            (file.path, file.size, file.mtime_ns),
        ).fetchone()
        return found[0] if found else None

    def learn_file(self, file: FileId, digest: str) -> None:
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", (file.path, file.size, file.mtime_ns, digest)
            )

    def close(self) -> None:
        self._db.close()

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = self.path.with_name(f"{self.path.name}.corrupt-{time.time_ns()}")
        log.error("%s is not a readable registry (%s): moved to %s, starting a new one", self.path, error, aside.name)
        self.path.rename(aside)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")


def _prepare(directory: Path) -> None:
    """Make the folder (0700) and the file (0600), where they are not there yet."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(directory / "registry.sqlite3", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise ConfigError(f"cannot write to state_dir {directory}: {error.strerror}", field="state_dir") from None


def _open(path: Path) -> sqlite3.Connection:
    os.close(
        os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    )  # SQLite gives its -wal and -shm the same mode
    db = sqlite3.connect(path, timeout=5.0)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"version {version}, this llmos writes {_VERSION}")
        if (verdict := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(verdict)
        if version == 0:
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        db.execute("SELECT name, path, digest, architecture, state, bytes, added_at FROM models LIMIT 1")
    except BaseException:
        db.close()
        raise
    return db
