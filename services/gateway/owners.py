"""Who a client is, by the unix user of its end of the socket (the kernel tells; the client can not choose)."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Asker:
    """A client that asks. `client` is its routing id."""

    client: bytes
    owner: str
    is_administrator: bool

    @property
    def limited_to(self) -> str | None:
        """Whose sequences it may touch, as the microkernel's `owner`; None = anybody's."""
        return None if self.is_administrator else self.owner


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
