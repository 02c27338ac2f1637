"""The journal's files: segments of records, from which a microkernel that died is made again. Impure, used by the shell only.

A segment is a file `00000001.journal` of frames (frames.py). Records are written before anybody hears of what they say. A `write`
survives the death of the process; whether it survives the machine is the policy `sync`: "process" (it need not), "interval" (flushed
that often), "always" (flushed before anybody hears).

Old segments go away by carrying: a new segment begins with counters and executors, then gets every sequence that is still known, some per
turn, and when all are in, the older segments are deleted, oldest first.

States: closed -> durable (`start`) -> broken (something could not be written) -> mending (`retry`: a new segment, in which everything has
to come anew; what happens is written again) -> durable. A file that failed once is never written again. `refusal` says why no new work
should be taken: while not durable, and while less than `reserve_bytes` are free on the disk. So much is also kept back in a file of its
own, which is given up when the disk is full: what runs by then can be written to its end.

Prompts are in it: files are 0600 in a 0700 folder, and what is not known any more is gone with its segment, which is renewed for that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmos.errors import Unavailable
from llmos.killpoints import ARMED, reach
from llmos.microkernel import frames, transcript
from llmos.microkernel.frames import Damage
from llmos.microkernel.records import OLDEST_VERSION, VERSION, ExecutorRecord, MetaRecord, Origin, Record
from llmos.microkernel.recovery import Fold
from llmos.microkernel.reserve import FULL, Reserve
from llmos.microkernel.state import State

log = logging.getLogger(__name__)
_SUFFIX = ".journal"
SEGMENT_BYTES = 64 * 1024 * 1024
CARRY_BYTES = 256 * 1024  # per turn, at least one sequence
MEND_BYTES = 16 * 1024 * 1024  # at once when it can be written again: most journals are whole before anybody hears more
RENEW_S = 60.0  # how long what is forgotten may stay in a segment
CLEAN_S = 1.0  # between attempts to delete
OTHER_BOOT_RIDS = 100_000  # more than can have been given out in what the machine had not yet written when it stopped


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was read. `shift_s`: what to add to recorded times so that they fit the clock of this boot; `dropped`: bytes that are
    damaged or cut off, at `places` places."""

    fold: Fold
    shift_s: float
    records: int
    dropped: int
    places: int


class Journal:
    """One folder of segments, one process at a time. `interval_s` counts for sync = "interval"."""

    def __init__(
        self, directory: Path, sync: str, interval_s: float, segment_bytes: int = SEGMENT_BYTES, reserve_bytes: int = 0
    ) -> None:
        self._directory = directory
        self._sync = sync
        self._interval_s = interval_s
        self._segment_bytes = segment_bytes
        self._reserve = Reserve(directory, reserve_bytes)
        self._file = -1
        self._size = 0
        self._flushed_at = 0.0
        self._unflushed = False
        self._carry: deque[int] = deque()  # sequences that are not in this segment yet
        self._old: list[Path] = []  # segments to delete when they are, oldest first
        self._clean_at = 0.0
        self._forgotten = 0  # by the state, when this segment began
        self._stale_since: float | None = None
        self.is_broken = False
        self.failure: str | None = None  # why it is not durable

    @property
    def is_carrying(self) -> bool:
        return bool(self._carry)

    @property
    def refusal(self) -> str | None:
        if self.failure is not None:
            return f"the journal can not be written: {self.failure}"
        return self._reserve.shortage

    # ------------------------------------------------------------ reading

    def recover(self) -> Recovered:
        """Read all segments there are. Never fails on what is in them, but for `Unavailable` if another version wrote them. Raises
        `OSError` if they can not be read."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in FULL:
                raise
        fold = Fold()
        counts = [0, 0, 0]
        previous: int | None = None
        for path in self._segments():
            previous = self._read(path, previous, fold, counts)
        shift_s = _shift(fold.meta)
        if shift_s and self._sync != "always":
            fold.skip(OTHER_BOOT_RIDS)
        return Recovered(fold, shift_s, *counts)

    def _read(self, path: Path, previous: int | None, fold: Fold, counts: list[int]) -> int:
        """Returns the length of this segment. `previous`: of the one before it."""
        data = path.read_bytes()
        for record in frames.scan(data):
            if isinstance(record, Damage):
                lost = record.end - record.start
                rest = "nothing behind it can be read" if record.end == len(data) else "what follows can be read"
                log.error("%s: %d bytes at %d of %d are damaged; %s", path, lost, record.start, len(data), rest)
                fold.damage(lost)
                counts[1] += lost
                counts[2] += 1
                continue
            if isinstance(record, MetaRecord) and not OLDEST_VERSION <= record.version <= VERSION:
                text = f"{path} is of version {record.version}, this llmosd reads {OLDEST_VERSION} to {VERSION}"
                raise Unavailable(f"{text}; to start without what is in it, move the folder away", field="state_dir")
            fold.add(record)
            counts[0] += 1
            if isinstance(record, MetaRecord) and record.origin == Origin.SEGMENT and previous is not None:
                cut = record.previous_bytes - previous
                if cut > 0:
                    log.error("the segment before %s lacks its last %d bytes", path, cut)
                    fold.damage(cut)
                    counts[1] += cut
                    counts[2] += 1
        return len(data)

    def _segments(self) -> list[Path]:
        found = [path for path in self._directory.glob(f"*{_SUFFIX}") if path.stem.isdigit()]
        return sorted(found, key=lambda path: int(path.stem))

    # ------------------------------------------------------------ writing

    def start(self, state: State) -> None:
        """After `recover`, with what was made of it."""
        try:
            self._renew(state, Origin.PROCESS)
        except OSError as error:
            self._fail(error)

    def write(self, records: Iterable[Record]) -> None:
        """Write these down; when it returns they survive the process, unless `failure` is set."""
        if not self.is_broken:
            try:
                self._append(frames.pack(records))
            except OSError as error:
                self._fail(error)

    def turn(self, state: State, now: float) -> None:
        """Housekeeping, once per turn of the loop: carry, delete, flush, begin the next segment."""
        self._reserve.look(now)
        if self.is_broken:
            return
        try:
            if self._carry:
                self._carry_some(state, CARRY_BYTES)
            if self._old and not self._carry and now >= self._clean_at:
                self._delete_old(now)
            if not self._carry and (self._size >= self._segment_bytes or self._is_stale(state, now)):
                self._renew(state, Origin.SEGMENT)
            if self._sync == "interval" and self._unflushed and now - self._flushed_at >= self._interval_s:
                self._flush()
                self._flushed_at = now
        except OSError as error:
            self._fail(error)

    def retry(self, state: State) -> None:
        """After a failure: a new segment."""
        try:
            self._renew(state, Origin.GAP)
            self.is_broken = False
            self._carry_some(state, MEND_BYTES)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            with contextlib.suppress(OSError):
                os.close(file)

    def _renew(self, state: State, origin: Origin) -> None:
        """Open a new segment, into which everything will be carried."""
        if not self.is_broken:
            self._flush()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        old = self._segments()
        number = int(old[-1].stem) + 1 if old else 1
        path = self._directory / f"{number:08}{_SUFFIX}"
        executors = [lane.capabilities for lane in state.lanes.values() if lane.capabilities is not None]
        meta = state.meta(time.monotonic(), time.time(), _boot_id(), origin, self._size)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if ARMED:
            reach("microkernel.start.segment")
        try:
            size = _write(file, frames.pack([meta, *map(ExecutorRecord, executors)]))
            if self._sync != "process":
                self._sync_directory()
        except OSError:
            os.close(file)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        self.close()
        self._file, self._size, self._old, self._unflushed = file, size, old, True
        self._carry = deque((*sorted(state.sequences), *sorted(state.ended)))  # the living first
        self._forgotten, self._stale_since = state.num_forgotten, None

    def _carry_some(self, state: State, budget: int) -> None:
        while self._carry and budget > 0:
            rid = self._carry[0]
            seq = state.sequences.get(rid) or state.ended.get(rid)
            if seq is not None:
                budget -= self._append(frames.pack([transcript.whole(seq)]))
            self._carry.popleft()
            if ARMED:
                reach("microkernel.carry.some")
        if ARMED and not self._carry:
            reach("microkernel.carry.all")
        if not self._carry and self.failure is not None:
            self.failure = None
            log.warning("the journal can be written again, and has everything")

    def _delete_old(self, now: float) -> None:
        """Oldest first: what is left then never lacks the beginning of a sequence that it has the end of."""
        self._flush()  # what replaces them must be there before they go
        while self._old:
            try:
                self._old[0].unlink(missing_ok=True)
            except OSError as error:
                log.error("%s can not be deleted: %s", self._old[0], error.strerror)
                self._clean_at = now + CLEAN_S
                return
            del self._old[0]
            if ARMED:
                reach("microkernel.carry.deleted")

    def _is_stale(self, state: State, now: float) -> bool:
        """Has it held something for too long that is not to be known any more?"""
        if self._stale_since is None and state.num_forgotten != self._forgotten:
            self._stale_since = now
        return self._stale_since is not None and now - self._stale_since >= RENEW_S

    def _append(self, content: bytearray) -> int:
        size = _write(self._file, content)
        self._size += size
        self._unflushed = True
        if self._sync == "always":
            self._flush()
        return size

    def _flush(self) -> None:
        if self._unflushed and self._sync != "process":
            os.fdatasync(self._file)
        self._unflushed = False

    def _sync_directory(self) -> None:
        """The name of a new file must survive the machine, too."""
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _fail(self, error: OSError) -> None:
        """Part of a frame may be in the file; it is never written again."""
        if self.failure is None:
            log.error(
                "journal %s failed, no new work is taken until it can be written again: %s", self._directory, error
            )
        self.failure = f"{self._directory}: {error.strerror or error}"
        self.is_broken = True
        if error.errno in FULL:
            self._reserve.give_up()


def _write(file: int, content: bytearray) -> int:
    view = memoryview(content)
    if ARMED:
        reach("microkernel.journal.torn", lambda: os.write(file, view[: len(view) // 2]))
    while view:
        view = view[os.write(file, view) :]
    return len(content)


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
