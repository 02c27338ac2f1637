"""The journal's files: segments of records, from which a microkernel that died is made again. Impure, used by the shell only.

A segment is a file `00000001.journal` of frames: length and CRC32 of the payload (u32 each, little-endian), payload (records.py).
Records are written before anybody hears of what they say. A `write` survives the death of the process; whether it survives the machine
is the policy `sync`: "process" (it need not), "interval" (flushed that often), "always" (flushed before anybody hears).

Old segments go away by carrying: a new segment begins with counters and executors, then gets every sequence that is still known, some per
turn, and when all are in, the older segments are deleted. States: closed -> durable (`begin`) -> failed (a write failed) -> durable
(`retry`, into a new segment with everything carried). While failed nothing is written; the shell refuses new work.

Prompts are in it: files are 0600 in a 0700 folder, and what is not known any more is gone with its segment.
"""

from __future__ import annotations

import logging
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmos.microkernel import transcript
from llmos.microkernel.records import VERSION, ExecutorRecord, MetaRecord, Record, decode, encode
from llmos.microkernel.recovery import Fold
from llmos.microkernel.state import State

log = logging.getLogger(__name__)
_FRAME = struct.Struct("<II")
_SUFFIX = ".journal"
_MAX_PAYLOAD = 256 * 1024 * 1024
SEGMENT_BYTES = 64 * 1024 * 1024
CARRY_BYTES = 1024 * 1024  # per turn, at least one sequence


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was read. `shift_s`: what to add to recorded times so that they fit the clock of this boot; `dropped`: bytes of damaged
    or cut-off segments that were not read."""

    fold: Fold
    shift_s: float
    records: int
    dropped: int


class Journal:
    """One folder of segments, one process at a time. `interval_s` counts for sync = "interval"."""

    def __init__(self, directory: Path, sync: str, interval_s: float, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory = directory
        self._sync = sync
        self._interval_s = interval_s
        self._segment_bytes = segment_bytes
        self._file = -1
        self._number = 0
        self._size = 0
        self._flushed_at = 0.0
        self._unflushed = False
        self._carry: deque[int] = deque()  # sequences that are not in this segment yet
        self._old: list[Path] = []  # segments to delete when they are
        self.failure: str | None = None

    @property
    def is_carrying(self) -> bool:
        return bool(self._carry or self._old)

    # ------------------------------------------------------------ reading

    def recover(self) -> Recovered:
        """Read all segments there are. Never fails on what is in them; a cut-off end is cut off in the file, too."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fold = Fold()
        records = dropped = 0
        for path in self._segments():
            data = path.read_bytes()
            good = 0
            for end, record in _read(data):
                fold.add(record)
                good = end
                records += 1
            if good < len(data):
                log.error("journal %s: %d of %d bytes are damaged or cut off", path.name, len(data) - good, len(data))
                dropped += len(data) - good
                os.truncate(path, good)
            self._number = max(self._number, int(path.stem))
        return Recovered(fold, _shift(fold.meta), records, dropped)

    def _segments(self) -> list[Path]:
        found = [path for path in self._directory.glob(f"*{_SUFFIX}") if path.stem.isdigit()]
        return sorted(found, key=lambda path: int(path.stem))

    # ------------------------------------------------------------ writing

    def begin(self, state: State) -> None:
        """Open a new segment and carry everything into it. Raises `OSError`."""
        old = self._segments()
        self._number += 1
        path = self._directory / f"{self._number:08}{_SUFFIX}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size, self._old = file, 0, old
        self._carry = deque(sorted((*state.sequences, *state.ended)))
        executors = [lane.capabilities for lane in state.lanes.values() if lane.capabilities is not None]
        meta = state.meta(time.monotonic(), time.time(), _boot_id())
        self._append([meta, *map(ExecutorRecord, executors)])
        self.failure = None

    def write(self, records: Iterable[Record]) -> None:
        """Write these down; when it returns they survive the process, unless `failure` is set."""
        if self.failure is None:
            try:
                self._append(records)
            except OSError as error:
                self._fail(error)

    def turn(self, state: State, now: float) -> None:
        """Housekeeping, once per turn of the loop: carry, delete, flush, begin the next segment."""
        if self.failure is not None:
            return
        try:
            if self._carry:
                self._carry_some(state)
            if self._old and not self._carry:
                self._flush()  # what replaces them must be there before they go
                for path in self._old:
                    path.unlink(missing_ok=True)
                self._old = []
            if self._size >= self._segment_bytes and not self.is_carrying:
                self.begin(state)
            if self._sync == "interval" and self._unflushed and now - self._flushed_at >= self._interval_s:
                self._flush()
                self._flushed_at = now
        except OSError as error:
            self._fail(error)

    def retry(self, state: State) -> bool:
        """After a failure: try a new segment."""
        try:
            self.begin(state)
        except OSError as error:
            self._fail(error)
        return self.failure is None

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _carry_some(self, state: State) -> None:
        budget = CARRY_BYTES
        while self._carry and budget > 0:
            rid = self._carry.popleft()
            seq = state.sequences.get(rid) or state.ended.get(rid)
            if seq is not None:
                budget -= self._append([transcript.whole(seq)])

    def _append(self, records: Iterable[Record]) -> int:
        frames = bytearray()
        for record in records:
            payload = encode(record)
            frames += _FRAME.pack(len(payload), zlib.crc32(payload))
            frames += payload
        view = memoryview(frames)
        while view:
            view = view[os.write(self._file, view) :]
        self._size += len(frames)
        self._unflushed = True
        if self._sync == "always":
            self._flush()
        return len(frames)

    def _flush(self) -> None:
        if self._unflushed and self._sync != "process":
            os.fdatasync(self._file)
        self._unflushed = False

    def _fail(self, error: OSError) -> None:
        """Part of a frame may be in the file; reading stops there, and the next segment has everything again."""
        self.failure = f"{self._directory}: {error.strerror or error}"
        log.error("journal failed, new work is refused until it can be written again: %s", self.failure)


def _read(data: bytes) -> Iterable[tuple[int, Record]]:
    """Records with the place where each ends, up to the first that is damaged."""
    at = 0
    view = memoryview(data)
    while at + _FRAME.size <= len(data):
        length, crc = _FRAME.unpack_from(data, at)
        start, at = at + _FRAME.size, at + _FRAME.size + length
        if length > _MAX_PAYLOAD or at > len(data) or zlib.crc32(view[start:at]) != crc:
            return
        try:
            record = decode(view[start:at])
        except msgspec.DecodeError:
            return
        if isinstance(record, MetaRecord) and record.version != VERSION:
            log.error("journal of version %d, this is version %d: not read", record.version, VERSION)
            return
        yield at, record


def _shift(meta: MetaRecord | None) -> float:
    """What to add to times of the monotonic clock that were recorded: 0 on the same boot, else by the wall clock."""
    if meta is None or meta.boot == _boot_id():
        return 0.0
    elapsed = max(0.0, time.time() - meta.wall_s)
    return time.monotonic() - elapsed - meta.monotonic_s


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
