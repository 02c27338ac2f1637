"""Who a client is: the unix user of its end of a local socket, or the key of its network connection. The operating system and libzmq tell;
what a client says of itself does not count.

A unix user is the tenant of its own name, and sees what that tenant does; root and the daemon's own user are administrators. A key says
what tenant it is of and what role it has, for as long as it is live: it is looked up for each message.
"""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from functools import lru_cache

from llmos.errors import Unauthorized
from llmos.keys.ring import KeyRing
from llmos.keys.roles import Role
from llmos.ports.core import Peer


@dataclass(frozen=True, slots=True)
class Asker:
    """A client that asks. `client` is its id here, `owner` its tenant, `who` what the audit log calls it."""

    client: bytes
    owner: str
    role: Role
    who: str = ""

    @property
    def is_administrator(self) -> bool:
        return self.role >= Role.ADMIN

    @property
    def limited_to(self) -> str | None:
        """Whose sequences it may touch, as the microkernel's `owner`; None = anybody's."""
        return None if self.is_administrator else self.owner


def identify(client: bytes, peer: Peer, keys: KeyRing | None) -> Asker:
    """Raises `Unauthorized` if its key is not live any more."""
    if not peer.key_id:
        role = Role.ADMIN if is_administrator(peer.uid) else Role.INSPECT
        return Asker(client, owner_name(peer.uid), role, "uid:?" if peer.uid is None else f"uid:{peer.uid}")
    key = keys.by_id(peer.key_id) if keys is not None else None
    if key is None:
        raise Unauthorized(f"key {peer.key_id} was revoked", field="key")
    return Asker(client, key.tenant, key.rights, f"key:{key.id}")


@lru_cache(maxsize=1024)
def owner_name(uid: int | None) -> str:
    """The owner string of this user's sequences."""
    if uid is None:
        return "unknown"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid:{uid}"


def is_administrator(uid: int | None) -> bool:
    """Root and the daemon's own user see and change everything."""
    return uid is not None and uid in (0, os.geteuid())
