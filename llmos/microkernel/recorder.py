"""The flight recorder: a kernel, and a bounded memory of what it was told and what it decided, so that it can be replayed.

The memory is one or two segments, each a snapshot of the kernel (freeze.py) followed by every call since: message, time, sender, and a
checksum of each effect; plans are kept whole, so that a replay can say what differs. A file is a header, the segments and an end mark.
It holds the token ids of prompts and outputs, and the root of the seeds: whoever may read it may read what tenants asked.

States: recording -> (the newest segment fills half of the budget) wants a snapshot -> recording in a new segment; as long as a snapshot
would cost too much, recording goes on until the budget is used up -> paused, until a snapshot is cheap. Invariants: a segment has no
gaps; the bytes kept never exceed the budget. Off (budget 0): calls go through, nothing is kept.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from enum import IntEnum
from struct import Struct as Packing
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from llmos import __version__
from llmos.microkernel.freeze import FreezeError, TooLarge, freeze
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.outbox import Send
from llmos.microkernel.sender import Sender
from llmos.protocol.codec import SCHEMA_HASH, encode
from llmos.protocol.messages import Message, StepPlan

MAGIC = b"llmos flight 1\n"
FRAME = Packing(
    "<III"
)  # in front of every record: length of its fields, length of the message behind them, checksum of both
BUSY_COST, IDLE_COST = 10_000, 50_000  # of a snapshot, in objects: about 10 and 50 ms
RETRY_S = 10.0  # after a snapshot that was too expensive
_PIECE_BYTES = 48  # what a bytes object costs besides its content
_SMALL = 512  # to copy so many bytes costs less than another piece
_SPARE_BYTES = 1024  # for the names of a peer, and the mark of a pause
_MAX_ERROR_CHARS = 300
_encoder = msgspec.msgpack.Encoder()
log = logging.getLogger(__name__)


class Call(IntEnum):
    """Entry points of the kernel."""

    HANDLE = 1
    TICK = 2
    GREET = 3
    PEER_DOWN = 4
    CHECK = 5


class Record(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of what a flight file is made of."""


class Header(Record, tag=1, frozen=True):
    """`wall` (seconds since 1970) and `now` (the kernel's clock) are the same moment, that of writing."""

    version: str
    schema_hash: str
    reason: str
    wall: float
    now: float


class Snapshot(Record, tag=2, frozen=True):
    """A segment begins: the whole kernel."""

    now: float
    graph: bytes


class Known(Record, tag=3, frozen=True):
    """Who a peer is."""

    peer: int
    role: str
    name: str
    pid: int = 0


class Called(Record, tag=4, frozen=True):
    """One call; the message, as on the wire, lies behind the record. `checks`: checksum of each effect. `plans`: (place among the
    effects, the plan as on the wire). `error`: the exception in which it ended."""

    call: int
    now: float
    peer: int = 0
    checks: tuple[int, ...] = ()
    plans: tuple[tuple[int, bytes], ...] = ()
    error: str = ""


_CALLED = Called.__struct_config__.tag


class Paused(Record, tag=5, frozen=True):
    """No room was left; what came after is not known."""


class Refusing(Record, tag=7, frozen=True):
    """From now on the kernel takes no new work, for this reason; None = it does again. The shell sets it between calls."""

    reason: str | None


class End(Record, tag=6, frozen=True):
    """The file is whole."""


class Delivery(NamedTuple):
    """An effect and its bytes on the wire."""

    effect: Send
    frame: bytes


class _Segment:
    """A snapshot and the calls since, as in a file, in pieces."""

    def __init__(self, snapshot: bytes) -> None:
        self.pieces = [snapshot]
        self.size = len(snapshot) + _PIECE_BYTES
        self.calls = 0

    def add(self, record: bytes, message: bytes = b"") -> None:
        if len(message) < _SMALL:
            self.pieces.append(record + message)
        else:
            self.pieces += (record, message)
            self.size += _PIECE_BYTES
        self.size += len(record) + len(message) + _PIECE_BYTES


class Recorder:
    """Stands in front of a kernel: its entry points, with effects as deliveries."""

    def __init__(self, kernel: Kernel, budget_bytes: int) -> None:
        self.kernel = kernel
        self._budget = budget_bytes
        self._segments: list[_Segment] = []
        self._peers: dict[int, Sender] = {}  # whom the newest segment names
        self._refusal: str | None = None  # the kernel's, as last written
        self._recording = False
        self._broken = budget_bytes <= 0
        self._next_try = float("-inf")

    # ------------------------------------------------------------ calls

    def handle(self, sender: Sender, message: Message, now: float) -> list[Delivery]:
        return self._run(Call.HANDLE, now, sender, message, self.kernel.handle, sender, message, now)

    def tick(self, now: float) -> list[Delivery]:
        return self._run(Call.TICK, now, None, None, self.kernel.tick, now)

    def greet(self, sender: Sender, now: float) -> list[Delivery]:
        return self._run(Call.GREET, now, sender, None, self.kernel.greet, sender, now)

    def peer_down(self, sender: Sender, now: float) -> list[Delivery]:
        return self._run(Call.PEER_DOWN, now, sender, None, self.kernel.peer_down, sender.peer, now)

    def check(self, now: float) -> None:
        """Assert the kernel's invariants; that they were violated is worth a record."""
        self._run(Call.CHECK, now, None, None, self._check)

    def _check(self) -> list[Send]:
        self.kernel.check()
        return []

    def _run(
        self,
        call: int,
        now: float,
        sender: Sender | None,
        message: Message | None,
        function: Callable[..., list[Send]],
        *arguments: Any,
    ) -> list[Delivery]:
        if self._recording and self.kernel.state.refusal != self._refusal:
            self._note_refusal()
        done: list[Delivery] | None = None
        try:
            done = [Delivery(effect, encode(effect.message)) for effect in function(*arguments)]
        finally:
            if self._recording:
                self._note(call, now, sender, message, done)
        return done

    # ------------------------------------------------------------ recording

    def roll(self, now: float, *, idle: bool) -> None:
        """Begin a new segment if it is time and cheap. For once per turn of the loop, between two calls."""
        full = not self._recording or self._segments[-1].size >= self._budget // 2
        if not full or self._broken or now < self._next_try:
            return
        self._next_try = now + RETRY_S  # if it fails
        try:
            snapshot = _framed(Snapshot(now, freeze(self.kernel, limit=IDLE_COST if idle else BUSY_COST)))
        except TooLarge:
            return
        except FreezeError as error:
            log.error("the flight recorder can not take snapshots any more: %s", error)
            self._broken = True
            return
        if len(snapshot) > self._budget // 4:
            return
        newest = _Segment(snapshot)
        for sender in self._peers.values():
            newest.add(_framed(Known(sender.peer, sender.role, sender.name, sender.pid)))
        self._segments.append(newest)
        self._refusal = self.kernel.state.refusal
        self._make_room(0)
        self._recording = True
        self._next_try = now

    @property
    def calls(self) -> int:
        """Recorded calls; 0 as long as there is nothing to write to a file."""
        return sum(segment.calls for segment in self._segments)

    def file(self, reason: str, wall: float, now: float) -> Iterator[bytes]:
        """The content of a flight file. `wall`: seconds since 1970, at `now`."""
        yield MAGIC
        yield _framed(Header(__version__, SCHEMA_HASH, reason, wall, now))
        for segment in self._segments:
            yield from segment.pieces
        yield _framed(End())

    def _note(
        self, call: int, now: float, sender: Sender | None, message: Message | None, done: list[Delivery] | None
    ) -> None:
        checks, plans, error = [], [], ""
        if done is None:
            error = describe_error(sys.exception())
        else:
            for place, (effect, frame) in enumerate(done):
                checks.append(crc32(frame, effect.peer))
                if type(effect.message) is StepPlan:
                    plans.append((place, frame))
        told = encode(message) if message is not None else b""
        peer = sender.peer if sender is not None else 0
        # Not a `Called`: a plain list is encoded in half the time.
        record = _framed([_CALLED, int(call), now, peer, checks, plans, error], told)
        if not self._make_room(len(record) + len(told)):
            return
        newest = self._segments[-1]
        if sender is not None and peer not in self._peers:
            self._peers[peer] = sender
            newest.add(_framed(Known(peer, sender.role, sender.name, sender.pid)))
        newest.add(record, told)
        newest.calls += 1
        if call == Call.PEER_DOWN:
            del self._peers[peer]

    def _note_refusal(self) -> None:
        self._refusal = self.kernel.state.refusal
        record = _framed(Refusing(self._refusal))
        if self._make_room(len(record)):
            self._segments[-1].add(record)

    def _make_room(self, num_bytes: int) -> bool:
        """Drop the older segment if need be. False: there is none, so the recorder has paused."""
        segments = self._segments
        while (
            segments[-1].size + (segments[0].size if len(segments) > 1 else 0) + num_bytes + _SPARE_BYTES > self._budget
        ):
            if len(segments) == 1:
                segments[0].add(_framed(Paused()))
                self._recording = False
                return False
            del segments[0]
        return True


def describe_error(error: BaseException | None) -> str:
    """One short line, valid Unicode."""
    return f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()[:_MAX_ERROR_CHARS]


def _framed(record: Record | list[Any], message: bytes = b"") -> bytes:
    fields = _encoder.encode(record)
    return FRAME.pack(len(fields), len(message), crc32(message, crc32(fields))) + fields
