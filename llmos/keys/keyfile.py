"""The key file: `keys.json` in the state directory, one entry per key ever made, revoked ones included.

Invariants: it is 0600 and of the daemon's user; it is replaced as a whole, under a lock, after it was written to disk; no secret is in
it. Whoever reads it gets all of it or a `ConfigError` that names what is wrong: a key that can not be read well is not left out, as
the next write would forget it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import msgspec
from msgspec import structs

from llmos.errors import ConfigError, InvalidRequest, NotFound
from llmos.keys.private import locked, read_private, replace_private
from llmos.keys.roles import Role, role_of
from llmos.keys.secret import Secret, is_public_key
from llmos.protocol.checks import check_tenant

FILE_NAME = "keys.json"
_FORMAT = 1
_MAX_BYTES = 16 * 1024 * 1024
_MAX_NAME_CHARS = 64
_ID = re.compile(r"[0-9a-f]{8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key. `role` by name; `created` and `revoked` in seconds since 1970; `revoked` None = it is live."""

    id: str
    name: str
    tenant: str
    role: str
    public_key: str
    sha256: str
    created: float
    revoked: float | None = None

    @property
    def rights(self) -> Role:
        return role_of(self.role)


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    keys: tuple[Key, ...]


class KeyFile:
    """The key file of a state directory. `add` and `revoke` are safe against each other in any number of processes."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / FILE_NAME

    def read(self) -> tuple[Key, ...]:
        """All keys in the order in which they were made; () if there is no file. Raises `ConfigError`."""
        raw = read_private(self.path, _MAX_BYTES + 1, "keys")
        return () if raw is None else self._parse(raw)

    def add(self, name: str, tenant: str, role: Role) -> tuple[Key, Secret]:
        """Make a key. Its secret is given here and nowhere else."""
        _check_name(name)
        check_tenant(tenant)
        with locked(self.path.parent, "keys"):
            keys = self.read()
            taken = {key.id for key in keys}
            secret = next(made for made in iter(Secret.make, None) if made.id not in taken)
            key = Key(secret.id, name, tenant, role.word, secret.public_key, secret.sha256, time.time())
            self._write((*keys, key))
        return key, secret

    def revoke(self, key_id: str) -> Key:
        """From now on it is worth nothing. Raises `NotFound`; a key that was revoked before stays as it was."""
        with locked(self.path.parent, "keys"):
            keys = self.read()
            found = next((key for key in keys if key.id == key_id), None)
            if found is None:
                raise NotFound(f"no key {key_id!r}; `keys list` shows those there are", field="id")
            if found.revoked is not None:
                return found
            revoked = structs.replace(found, revoked=time.time())
            self._write(tuple(revoked if key is found else key for key in keys))
        return revoked

    def version(self) -> tuple[int, int, int] | None:
        """Differs if the file or its mode does; None = there is none."""
        try:
            found = self.path.lstat()
        except OSError:
            return None
        return found.st_ino, found.st_ctime_ns, found.st_size

    def _parse(self, raw: bytes) -> tuple[Key, ...]:
        if len(raw) > _MAX_BYTES:
            raise self._bad(f"over {_MAX_BYTES} bytes")
        try:
            content = msgspec.json.decode(raw, type=_Content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._bad(str(error)) from None
        if content.format != _FORMAT:
            raise self._bad(f"format {content.format}; this llmos reads {_FORMAT}")
        for key in content.keys:
            self._check(key)
        for what in ("id", "public_key", "sha256"):
            if len({getattr(key, what) for key in content.keys}) != len(content.keys):
                raise self._bad(f"two keys have the same {what}")
        return content.keys

    def _check(self, key: Key) -> None:
        try:
            _check_name(key.name)
            check_tenant(key.tenant)
            role_of(key.role)
        except InvalidRequest as error:
            raise self._bad(f"key {key.id[:8]!r}: {error.message}") from None
        for good, what in (
            (_ID.fullmatch(key.id), "id"),
            (is_public_key(key.public_key), "public_key"),
            (_DIGEST.fullmatch(key.sha256), "sha256"),
        ):
            if not good:
                raise self._bad(f"key {key.id[:8]!r}: {what} is malformed")

    def _write(self, keys: tuple[Key, ...]) -> None:
        text = msgspec.json.format(msgspec.json.encode(_Content(_FORMAT, keys)), indent=1) + b"\n"
        replace_private(self.path, text)

    def _bad(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.path}: {problem}", field="keys")


def _check_name(name: str) -> None:
    if not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequest(f"name: 1 to {_MAX_NAME_CHARS} printable characters", field="name")
