"""Who a client is, by the unix user of its end of the socket (the kernel tells; the client can not choose)."""

from __future__ import annotations

import os
import pwd
from functools import lru_cache


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
