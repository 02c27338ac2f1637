"""The server's own CURVE key: `server.key` in the state directory, the Z85 text of its secret half, 0600.

A file of its own, as it is the one secret the daemon has, and as clients know its public half: it must not change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import zmq

from llmos.errors import ConfigError
from llmos.keys.private import locked, read_private, replace_private
from llmos.keys.secret import is_public_key

FILE_NAME = "server.key"


@dataclass(frozen=True, slots=True)
class ServerKey:
    """Both halves in Z85."""

    public: str
    secret: bytes = field(repr=False)


def read_server_key(state_dir: Path) -> ServerKey | None:
    """None if there is none. Raises `ConfigError`."""
    path = state_dir / FILE_NAME
    distrust = "it has to be a file of this user, with mode 600"
    content = read_private(path, 100, "server_key", distrust=distrust)
    if content is None:
        return None
    text = content.decode(errors="replace").strip()
    if not is_public_key(text):  # both halves have the same form
        raise ConfigError(f"{path}: not a CURVE secret key", field="server_key")
    return ServerKey(zmq.curve_public(text.encode()).decode(), text.encode())


def make_server_key(state_dir: Path) -> ServerKey:
    """The server's key, made now if there is none."""
    with locked(state_dir, "server_key"):
        if (found := read_server_key(state_dir)) is not None:
            return found
        public, secret = zmq.curve_keypair()
        replace_private(state_dir / FILE_NAME, secret + b"\n")
        return ServerKey(public.decode(), secret)
