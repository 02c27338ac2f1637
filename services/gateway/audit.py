"""The audit log: who changed what, and who was refused; one JSON object a line in `audit.log` of the state directory, 0600.

A line has `time` (UTC), `who` (key or unix user), `tenant`, `verb`, `target`, `outcome`: "ok" or the code of the error. Never a prompt, a
token or a secret: control verbs carry none.

Invariant: nothing that happens to the file stops the gateway. What can not be written is counted and said once in the daemon's log.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from llmos.codes import ErrorCode
from llmos.protocol.messages import (
    After,
    Close,
    Deadline,
    Error,
    Fork,
    Kill,
    Message,
    Nice,
    RecordWrite,
    RestartService,
    Resume,
    Suspend,
    TenantSet,
)
from llmos.services.gateway.owners import Asker

FILE_NAME = "audit.log"
MAX_BYTES = 16 * 1024 * 1024  # of one file
KEPT = 4  # older files, audit.log.1 the newest
CHANGES = frozenset({Kill, Nice, Suspend, Resume, Fork, Close, Deadline, After, TenantSet, RecordWrite, RestartService})
_REFUSALS = frozenset({ErrorCode.PERMISSION, ErrorCode.UNAUTHORIZED})
_MAX_TEXT, _MAX_ITEMS = 128, 16
log = logging.getLogger(__name__)


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


class AuditLog:
    """`note` every answered control verb; what is not worth a line is left out."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES, clock: Callable[[], str] = _utc_now) -> None:
        self.path = folder / FILE_NAME
        self.failures = 0
        self._max_bytes = max_bytes
        self._clock = clock
        self._fd = -1
        self._size = 0
        self._torn = False  # the last line has no end

    def note(self, asker: Asker, verb: Message, answer: Message) -> None:
        code = answer.code if isinstance(answer, Error) else None
        if type(verb) not in CHANGES and code not in _REFUSALS:
            return
        line = {
            "time": self._clock(),
            "who": asker.who,
            "tenant": asker.owner,
            "verb": type(verb).__name__,
            "target": _target(verb),
            "outcome": "ok" if code is None else _word(code),
        }
        self._write(msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, line: bytes) -> None:
        try:
            if self._fd < 0:
                self._open()
            if self._size and self._size + len(line) > self._max_bytes:
                self._rotate()
            text = b"\n" + line if self._torn else line
            written = os.write(self._fd, text)
            self._size += written
            self._torn = written < len(text)
            if self._torn:
                raise OSError("the disk is full")
        except OSError as error:
            self.failures += 1
            if self.failures == 1:
                log.error("%s can not be written, the gateway goes on: %s", self.path, error)
            self.close()

    def _open(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        self.close()
        names = [self.path, *(self.path.with_name(f"{FILE_NAME}.{number}") for number in range(1, KEPT + 1))]
        for older, newer in zip(reversed(names), list(reversed(names))[1:]):
            if newer.exists():
                newer.replace(older)
        self._torn = False
        self._open()


def _target(verb: Message) -> dict[str, Any]:
    """What the verb is about: its fields that are set."""
    values = {name: getattr(verb, name) for name in verb.__struct_fields__ if name not in ("req", "owner")}
    return {name: _short(value) for name, value in values.items() if value is not None}


def _short(value: Any) -> Any:
    """As long as it may be: what was refused may be of any size."""
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    return value[:_MAX_ITEMS] if isinstance(value, tuple) else value


def _word(code: int) -> str:
    return ErrorCode(code).name.lower() if code in set(ErrorCode) else str(code)
