"""The first key: made at the first start, so that HTTP on this machine has one from the beginning. `admin.key` in the state directory,
0600, is the text of its secret: who can read it may be an administrator, as may whoever opens the local sockets.

Made only where there was never a key. An operator who revokes it, or deletes the file, has decided: it does not come back.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from llmos.errors import ConfigError, InvalidRequest
from llmos.keys.keyfile import KeyFile
from llmos.keys.private import read_private, replace_private
from llmos.keys.roles import Role
from llmos.keys.secret import Secret

FILE_NAME = "admin.key"
_NAME = "first start"
_MAX_BYTES = 4096


def make_admin_key(state_dir: Path) -> bool:
    """Make it if there was never a key; True if so. Raises `ConfigError`."""
    keys = KeyFile(state_dir)
    if keys.read():
        return False
    _, secret = keys.add(_NAME, _tenant(), Role.ADMIN)
    replace_private(state_dir / FILE_NAME, f"{secret.text}\n".encode())
    return True


def read_admin_key(state_dir: Path) -> Secret | None:
    """Its secret; None = there is no such file. Raises `ConfigError` if it is not to be trusted."""
    path = state_dir / FILE_NAME
    content = read_private(path, _MAX_BYTES, "keys")
    if content is None:
        return None
    try:
        return Secret.parse(content.decode(errors="replace"))
    except InvalidRequest as error:
        raise ConfigError(f"{path}: {error.message}", field="keys") from None


def _tenant() -> str:
    """The daemon's own user: over HTTP and over the local sockets it is the same tenant."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid:{os.geteuid()}"
