"""Replay of a flight file: the same calls to the same kernel must give the same effects. No executor, no GPU, no clock.

`python -P -m llmos.microkernel.replay FILE` writes a `Report` as JSON on stdout. Exit codes: 0 the same decisions, 1 a difference,
2 the file can not be read, or another version of llmos wrote it (one line on stderr). `llmosctl replay` makes that readable.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from llmos import __version__
from llmos.errors import LlmosError, ProtocolError, VersionMismatch
from llmos.microkernel.describe import FieldDifference, brief, first_difference
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.outbox import Send
from llmos.microkernel.recorder import (
    FRAME,
    MAGIC,
    Call,
    Called,
    End,
    Header,
    Known,
    Paused,
    Record,
    Refusing,
    Snapshot,
    describe_error,
)
from llmos.microkernel.sender import Sender
from llmos.microkernel.thaw import thaw
from llmos.protocol import messages as m
from llmos.protocol.codec import SCHEMA_HASH, Schema, encode

EXIT_SAME, EXIT_DIFFERENT, EXIT_UNREADABLE = 0, 1, 2
_MAX_SECONDS = 1e12
_records = msgspec.msgpack.Decoder(Header | Snapshot | Known | Called | Paused | Refusing | End)
_to_kernel: Schema[Any] = Schema(m.ToKernel)
_from_kernel: Schema[Any] = Schema(m.FromKernel)


class Difference(msgspec.Struct):
    """The first effect that is not as it was. `at_s`: since the first call; `field` is empty if the recording does not tell."""

    record: int
    at_s: float
    wall: float
    call: str
    effect: str
    field: str
    recorded: str
    replayed: str


class Report(msgspec.Struct):
    """What a replay found. `records`: calls replayed, the first is 1. `steps`: plans among their effects. `crash`: the exception in
    which the recording ends, and the replay too. `pauses`: how often recording stopped for a while. `damage`: why not all was read."""

    verdict: str
    version: str
    reason: str
    wall: float
    records: int = 0
    steps: int = 0
    seconds: float = 0.0
    segments: int = 0
    pauses: int = 0
    crash: str = ""
    damage: str = ""
    difference: Difference | None = None


class FlightFile:
    """The records of a file, up to its end or to where it is damaged; `damage` says which, after `records`."""

    def __init__(self, data: bytes) -> None:
        if not data.startswith(MAGIC[:12]):
            raise ProtocolError("not a flight file")
        if not data.startswith(MAGIC):
            raise VersionMismatch("a flight file of another format")
        self._data = data
        self._place = len(MAGIC)
        self.damage = ""
        header, _ = self._next() or (None, b"")
        if not isinstance(header, Header):
            raise ProtocolError(f"not a flight file: {self.damage or 'it has no header'}")
        self.header = header

    def records(self) -> Iterator[tuple[Record, bytes]]:
        """Each record with the message behind it."""
        while (found := self._next()) is not None:
            if isinstance(found[0], End):
                return
            yield found

    def _next(self) -> tuple[Record, bytes] | None:
        place = self._place
        begin = place + FRAME.size
        if begin > len(self._data):
            self.damage = f"the file is cut off at byte {len(self._data)}"
            return None
        length, behind, checksum = FRAME.unpack_from(self._data, place)
        fields, message = self._data[begin : begin + length], self._data[begin + length : begin + length + behind]
        if len(fields) + len(message) < length + behind:
            self.damage = f"the file is cut off at byte {len(self._data)}"
            return None
        if crc32(message, crc32(fields)) != checksum:
            self.damage = f"the record at byte {place} is damaged"
            return None
        self._place = begin + length + behind
        try:
            return _records.decode(fields), message
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise ProtocolError(f"the record at byte {place} is not one: {str(error)[:200]}") from None


def replay(data: bytes) -> Report:
    """Feed a file's calls to its kernel. Raises `VersionMismatch` or `ProtocolError` if the file can not be used."""
    file = FlightFile(data)
    header = file.header
    _check_times(header.wall, header.now)
    if (header.version, header.schema_hash) != (__version__, SCHEMA_HASH):
        raise VersionMismatch(
            f"written by llmos {header.version} (schema {header.schema_hash}); this is {__version__} ({SCHEMA_HASH}): "
            "replay it with the llmos that wrote it"
        )
    run = _Run(Report("same", header.version, header.reason, header.wall), header)
    for record, message in file.records():
        run.take(record, message)
        if run.report.difference is not None or run.report.crash:
            break
    run.report.damage = file.damage
    if not run.report.segments:
        raise ProtocolError(f"nothing to replay: {file.damage or 'no snapshot'}")
    return run.report


class _Run:
    """One pass through a file."""

    def __init__(self, report: Report, header: Header) -> None:
        self.report = report
        self._header = header
        self._kernel: Kernel | None = None
        self._senders: dict[int, Sender] = {}
        self._begin: float | None = None
        self._last_message = ""

    def take(self, record: Record, message: bytes) -> None:
        if isinstance(record, Snapshot):
            kernel = thaw(record.graph)
            if not isinstance(kernel, Kernel):
                raise ProtocolError("snapshot: not a kernel")
            self._kernel = kernel
            self.report.segments += 1
        elif isinstance(record, Known):
            self._senders[record.peer] = Sender(record.peer, record.role, record.name, record.pid)
        elif isinstance(record, Paused):
            self.report.pauses += 1
        elif isinstance(record, Refusing):
            if self._kernel is None:
                raise ProtocolError("a record comes before any snapshot")
            self._kernel.state.refusal = record.reason
        elif isinstance(record, Called):
            self._call(record, message)
            if self._kernel is not None and self._kernel.state.notes:
                self._kernel.state.notes.clear()  # as the shell does when it has written them to the journal

    def _call(self, record: Called, message: bytes) -> None:
        report = self.report
        report.records += 1
        _check_times(record.now)
        self._begin = record.now if self._begin is None else self._begin
        report.seconds = record.now - self._begin
        act = self._act(record, message)
        effects: list[Send] = []
        frames: list[bytes] = []
        error = where = ""
        try:
            effects = act()
            frames = [encode(effect.message) for effect in effects]
        except Exception as raised:  # noqa: BLE001 - whatever the kernel raises is what this is here to find
            error, where = describe_error(raised), _origin(raised)
        report.steps += sum(isinstance(effect.message, m.StepPlan) for effect in effects)
        if error != record.error:
            self._differs(record, "", FieldDifference("exception", record.error or "none", f"{error or 'none'}{where}"))
        elif error:
            report.crash = f"{error}{where}"
        else:
            self._compare(record, effects, frames)

    def _act(self, record: Called, message: bytes) -> Any:
        """The call, ready to be made."""
        kernel = self._kernel
        number = self.report.records
        if kernel is None:
            raise ProtocolError(f"record {number} comes before any snapshot")
        now = record.now
        if record.call == Call.TICK:
            return lambda: kernel.tick(now)
        if record.call == Call.CHECK:
            return lambda: _checked(kernel)
        sender = self._senders.get(record.peer)
        if sender is None:
            raise ProtocolError(f"record {number} is from a peer that the file does not name")
        if record.call == Call.GREET:
            return lambda: kernel.greet(sender, now)
        if record.call == Call.PEER_DOWN:
            return lambda: kernel.peer_down(sender.peer, now)
        if record.call != Call.HANDLE:
            raise ProtocolError(f"record {number} is a call of kind {record.call}")
        decoded = _to_kernel.decode(message)
        self._last_message = f"{brief(decoded)} from {sender.name}"
        return lambda: kernel.handle(sender, decoded, now)

    def _compare(self, record: Called, effects: list[Send], frames: list[bytes]) -> None:
        checks = tuple(crc32(frame, effect.peer) for effect, frame in zip(effects, frames))
        if checks == record.checks:
            return
        place = next((i for i, pair in enumerate(zip(checks, record.checks)) if pair[0] != pair[1]), None)
        if place is None:
            place = min(len(checks), len(record.checks))
        effect = effects[place] if place < len(effects) else None
        name = f"effect {place + 1}"
        if effect is not None:
            name = f"{type(effect.message).__name__} to {self._name(effect.peer)}"
        plan = dict(record.plans).get(place)
        recorded = _from_kernel.decode(plan) if plan is not None else None
        if isinstance(recorded, m.StepPlan) and effect is not None and isinstance(effect.message, m.StepPlan):
            found = first_difference(recorded, effect.message)
            if found is None:
                found = FieldDifference("peer", "another executor", str(effect.peer))
            self._differs(record, f"StepPlan {recorded.step} to {self._name(effect.peer)}", found)
            return
        if recorded is not None:
            before = brief(recorded)
        else:
            before = "another message" if place < len(record.checks) else f"nothing: {len(record.checks)} effects"
        now = brief(effect.message) if effect is not None else f"nothing: {len(effects)} effects"
        self._differs(record, name, FieldDifference("", before, now))

    def _differs(self, record: Called, effect: str, found: FieldDifference) -> None:
        report = self.report
        call = Call(record.call).name.lower()
        if record.call == Call.HANDLE:
            call = self._last_message
        elif record.call == Call.TICK and self._last_message:
            call = f"tick after {self._last_message}"
        wall = self._header.wall - (self._header.now - record.now)
        report.verdict = "different"
        report.difference = Difference(report.records, report.seconds, wall, call, effect, *found)

    def _name(self, peer: int) -> str:
        known = self._senders.get(peer)
        return known.name if known is not None else f"peer {peer}"


def _check_times(*seconds: float) -> None:
    """Clocks count up from small numbers; what is beyond, or no number, could keep the kernel waiting for ever."""
    if not all(0 <= each < _MAX_SECONDS for each in seconds):
        raise ProtocolError(f"{', '.join(map(str, seconds))} is no time")


def _checked(kernel: Kernel) -> list[Send]:
    kernel.check()
    return []


def _origin(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="llmos.microkernel.replay", description="Replay a flight file; JSON on stdout."
    )
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    try:
        report = replay(path.read_bytes())
    except OSError as error:
        sys.stderr.write(f"cannot read {path}: {error.strerror}\n")
        return EXIT_UNREADABLE
    except LlmosError as error:
        sys.stderr.write(f"{path}: {error.message}\n")
        return EXIT_UNREADABLE
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    return EXIT_SAME if report.difference is None else EXIT_DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
