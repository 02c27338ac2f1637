"""The live keys as a running gateway knows them: looked up by CURVE public key, by id, or by secret.

`refresh` looks whether the file is another one, at most every `CHECK_EVERY_S`, or at once when somebody wants in. What is not in a
readable key file is not a key: a file that is damaged, open to others or gone means nobody, until it is mended.
"""

from __future__ import annotations

import hmac
import logging
from pathlib import Path

from llmos.errors import ConfigError, InvalidRequest
from llmos.keys.keyfile import Key, KeyFile
from llmos.keys.secret import Secret

CHECK_EVERY_S = 0.5
log = logging.getLogger(__name__)


class KeyRing:
    """`version` grows when the keys change."""

    def __init__(self, state_dir: Path) -> None:
        self._file = KeyFile(state_dir)
        self._seen: tuple[int, int, int] | None = None
        self._by_id: dict[str, Key] = {}
        self._by_public: dict[str, Key] = {}
        self._check_at = 0.0
        self.version = 0

    def load(self) -> None:
        """Read the file now; raises `ConfigError`."""
        self._seen = self._file.version()
        self._keep(self._file.read())

    def refresh(self, now: float, *, at_once: bool = False) -> None:
        """Read the file again if it is another one."""
        if now < self._check_at and not at_once:
            return
        self._check_at = now + CHECK_EVERY_S
        seen = self._file.version()
        if seen == self._seen:
            return
        try:
            self.load()
        except ConfigError as error:
            log.error("%s; until it is mended no key is good", error.message)
            self._keep(())

    def __len__(self) -> int:
        return len(self._by_id)

    def by_public_key(self, public_key: str) -> Key | None:
        return self._by_public.get(public_key)

    def by_id(self, key_id: str) -> Key | None:
        return self._by_id.get(key_id)

    def by_secret(self, text: str) -> Key | None:
        """The key whose secret this is, found in a time that does not depend on how much of it is right."""
        try:
            secret = Secret.parse(text)
        except InvalidRequest:
            return None
        key = self._by_id.get(secret.id)
        expected = key.sha256 if key is not None else "0" * 64
        return key if hmac.compare_digest(secret.sha256, expected) and key is not None else None

    def _keep(self, keys: tuple[Key, ...]) -> None:
        live = [key for key in keys if key.revoked is None]
        self._by_id = {key.id: key for key in live}
        self._by_public = {key.public_key: key for key in live}
        self.version += 1
