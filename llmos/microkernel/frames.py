"""How records lie in a segment of the journal: length and CRC32 of the payload (u32 each, little-endian), payload. Pure.

Reading never fails. It goes on behind a frame that is damaged if another good frame begins exactly where that one says it ends; else
nothing behind it can be read, because what lies there may be anything, also what a client wrote. Nobody searches for frames.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from llmos.microkernel.records import Record, decode, encode

_HEADER = struct.Struct("<II")
_MAX_PAYLOAD = 256 * 1024 * 1024
MIN_BYTES = _HEADER.size + 8  # no record that gives out a number is shorter


@dataclass(frozen=True, slots=True)
class Damage:
    """These bytes say nothing."""

    start: int
    end: int


def pack(records: Iterable[Record]) -> bytearray:
    frames = bytearray()
    for record in records:
        payload = encode(record)
        frames += _HEADER.pack(len(payload), zlib.crc32(payload))
        frames += payload
    return frames


def scan(data: bytes) -> Iterator[Record | Damage]:
    """All of a segment in its order."""
    view = memoryview(data)
    at = 0
    while at < len(data):
        start, end, good = _frame(view, at)
        if not good and (end == at or (end < len(data) and not _frame(view, end)[2])):
            yield Damage(at, len(data))
            return
        try:
            yield decode(view[start:end]) if good else Damage(at, end)
        except msgspec.DecodeError:
            yield Damage(at, end)
        at = end


def _frame(view: memoryview, at: int) -> tuple[int, int, bool]:
    """Where the payload begins and ends, and whether it is as it was written. It ends at `at` if there is none."""
    start = at + _HEADER.size
    if start > len(view):
        return at, at, False
    length, crc = _HEADER.unpack_from(view, at)
    end = start + length
    if not 0 < length <= _MAX_PAYLOAD or end > len(view):
        return at, at, False
    return start, end, zlib.crc32(view[start:end]) == crc
