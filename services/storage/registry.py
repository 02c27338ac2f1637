"""The registry: SQLite in the state directory. One row per model, per file whose digest is known, per tenant with limits of its own.

Invariants: the file is 0600; states are as of this start (nothing is `serving` until the microkernel says so); a registry of an older
version is brought up to date; a file that is not a readable registry of this version is moved aside and replaced, never repaired and
never deleted; a tenant's row that makes no sense is named in the log and left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import astuple

from llmos.errors import ConfigError, InvalidRequest
from llmos.protocol.checks import check_tenant_set
from llmos.protocol.messages import ModelRow, TenantLimitsRow, TenantSet
from llmos.services.storage.digest import FileId

AVAILABLE, SERVING, FAILED = "available", "serving", "failed"
_VERSION = 2
_SCHEMA = {  # version: what it adds to the one before
    1: """
CREATE TABLE models (
    name TEXT PRIMARY KEY, path TEXT NOT NULL, digest TEXT NOT NULL, architecture TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('available', 'serving', 'failed')), bytes INTEGER NOT NULL,
    added_at REAL NOT NULL
) STRICT;
CREATE TABLE files (
    path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL
) STRICT;
""",
    2: """
CREATE TABLE tenants (
    tenant TEXT PRIMARY KEY, weight REAL NOT NULL, max_pages INTEGER NOT NULL, guaranteed_pages INTEGER NOT NULL,
    max_running INTEGER NOT NULL, max_waiting INTEGER NOT NULL, tokens_per_s REAL NOT NULL
) STRICT;
""",
}
_TENANT_COLUMNS = TenantLimitsRow.__struct_fields__
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

    def set_tenant(self, limits: TenantLimitsRow) -> None:
        """Keep a tenant's limits instead of those it had."""
        marks = ", ".join("?" * len(_TENANT_COLUMNS))
        with self._db:
            self._db.execute(f"INSERT OR REPLACE INTO tenants VALUES ({marks})", astuple(limits))

    def tenants(self) -> tuple[TenantLimitsRow, ...]:
        """All tenants with limits of their own, by name."""
        # Names as bytes: one that is not UTF-8 must not hide the others.
        columns = ", ".join(["CAST(tenant AS BLOB)", *_TENANT_COLUMNS[1:]])
        rows = self._db.execute(f"SELECT {columns} FROM tenants ORDER BY tenant")
        return tuple(limits for row in rows if (limits := self._checked(row)) is not None)

    def close(self) -> None:
        self._db.close()

    def _checked(self, row: tuple[Any, ...]) -> TenantLimitsRow | None:
        """A tenant's limits, or None if somebody wrote nonsense there."""
        try:
            limits = msgspec.convert((row[0].decode(), *row[1:]), TenantLimitsRow)
            check_tenant_set(TenantSet(0, *astuple(limits)))
            if limits.guaranteed_pages > limits.max_pages:
                raise InvalidRequest(
                    f"guaranteed_pages {limits.guaranteed_pages} is above max_pages {limits.max_pages}"
                )
        except (UnicodeDecodeError, AttributeError, msgspec.ValidationError, InvalidRequest) as error:
            name = (row[0] or b"").decode(errors="backslashreplace")
            log.error("%s: the limits of tenant %r are left out: %s", self.path, name, error)
            return None
        return limits

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
        if not 0 <= version <= _VERSION:
            raise sqlite3.DatabaseError(f"version {version}, this llmos writes {_VERSION}")
        if (verdict := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(verdict)
        if version < _VERSION:
            steps = "".join(_SCHEMA[step] for step in range(version + 1, _VERSION + 1))
            db.executescript(f"BEGIN; {steps} PRAGMA user_version = {_VERSION}; COMMIT;")
        db.execute("SELECT name, path, digest, architecture, state, bytes, added_at FROM models LIMIT 1")
        db.execute(f"SELECT {', '.join(_TENANT_COLUMNS)} FROM tenants LIMIT 1")
    except BaseException:
        db.close()
        raise
    return db
