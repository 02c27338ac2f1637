"""One-time links to the page: what `llmosctl open` leaves in the run directory, and an HTTP worker takes away."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from pathlib import Path

import msgspec

LINK_FOLDER = "links"
LINK_S = 120.0


class Link(msgspec.Struct, frozen=True):
    """`until`: seconds since 1970."""

    key_id: str
    until: float


def link_name(token: str) -> str:
    """The file of a token, which itself is nowhere on disk."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def make_link(run_dir: Path, key_id: str) -> str:
    """The token of a new link; old ones that nobody took are deleted."""
    folder = run_dir / LINK_FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = run_dir.stat()
    for_another = os.geteuid() == 0 and owner.st_uid != 0
    if for_another:
        os.chown(folder, owner.st_uid, owner.st_gid)
    now = time.time()
    for found in folder.iterdir():
        if now - found.lstat().st_mtime > LINK_S:
            found.unlink(missing_ok=True)
    token = secrets.token_urlsafe(32)
    fd = os.open(folder / link_name(token), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        if for_another:
            os.fchown(fd, owner.st_uid, owner.st_gid)
        file.write(msgspec.json.encode(Link(key_id, now + LINK_S)))
    return token
