"""What clients saw, as JSON lines: one history per client, written while it happens and read while it grows.

An event is a flat object: `t` (CLOCK_MONOTONIC, the same in all processes), `req` (the client's own number of a request),
`event`, and what belongs to it:

    ask        verb, and key (client_request_id), rid, start (first offset), answer (see answers.py), expect (see judge.py),
               waits (true: its first token may take as long as it likes)
    refused    error, message: not accepted; the client asks again for the same
    accepted   rid
    tokens     offset, ids, text
    handover   the client is about to let another reader take this one's place
    end        reason, ids (how many in all), text (all of it)
    reply      value: the answer to a request that is no stream
    error      error, message
    left       the client stopped reading on purpose
    gave_up    message: the client waited for longer than any recovery may take

A history is cut into segments, so that what is read can be deleted while it grows. Imports nothing of llmos.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

Event = dict[str, Any]
SEGMENT_BYTES = 4 << 20


def _segment(folder: Path, client: int, number: int) -> Path:
    return folder / f"client-{client:03}.{number:05}.jsonl"


class HistoryWriter:
    """The history of one client. What is written becomes visible at `flush`, at the latest after `SEGMENT_BYTES`."""

    def __init__(self, folder: Path, client: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._client = client
        self._clock = clock
        self._segment = 0
        self._written = 0
        self._file = self._open()
        self._last_req = 0

    def new_request(self) -> int:
        self._last_req += 1
        return self._last_req

    def write(self, req: int, event: str, **content: Any) -> None:
        line = json.dumps({"t": self._clock(), "req": req, "event": event, **content}, separators=(",", ":")) + "\n"
        if self._written + len(line) > SEGMENT_BYTES:
            self._file.close()
            self._segment += 1
            self._written = 0
            self._file = self._open()
        self._file.write(line)
        self._written += len(line)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> TextIOWrapper:
        return _segment(self._folder, self._client, self._segment).open("w", encoding="utf-8")


class HistoryReader:
    """Follows the history of one client. `keep` False: segments are deleted when they are read."""

    def __init__(self, folder: Path, client: int, *, keep: bool = False) -> None:
        self.client = client
        self._folder = folder
        self._keep = keep
        self._segment = 0
        self._file: TextIOWrapper | None = None
        self._partial = ""

    def new_events(self) -> Iterator[Event]:
        """What was written since the last call. A line that is not whole yet comes later."""
        while True:
            path = _segment(self._folder, self.client, self._segment)
            if self._file is None:
                if not path.exists():
                    return
                self._file = path.open(encoding="utf-8")
            # Asked before reading: when the next segment exists, this one is complete.
            is_complete = _segment(self._folder, self.client, self._segment + 1).exists()
            yield from self._lines(self._file)
            if not is_complete:
                return
            self.close()
            if not self._keep:
                path.unlink()
            self._segment += 1

    def _lines(self, file: TextIOWrapper) -> Iterator[Event]:
        while line := file.readline():
            if not line.endswith("\n"):
                self._partial += line
                continue
            event: Event = json.loads(self._partial + line)
            self._partial = ""
            yield event

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
