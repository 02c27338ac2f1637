"""Encode and decode messages: msgpack arrays straight into typed structs, size limit before decode.

Invariants: decoding never builds a Python object that no struct asked for; whatever bytes come in, the only exception that comes
out is `ProtocolError`. A `Schema` is the set of message types that one direction of one port accepts.
"""

from __future__ import annotations

import hashlib
import re
import sys
import typing
from array import array
from collections.abc import Iterable
from typing import Any, Generic, Literal, TypeVar

import msgspec

from llmos.errors import ProtocolError
from llmos.protocol import limits, messages

PROTOCOL_VERSION = 1

M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()


def encode(message: messages.Message) -> bytes:
    """One message as one wire frame."""
    return _encoder.encode(message)


class Schema(Generic[M]):
    """Decoder for one direction of one port.

    >>> Schema(messages.ToSupervisor).decode(encode(messages.Heartbeat("storage", 7)))
    Heartbeat(name='storage', progress=7)
    """

    def __init__(self, union: Any, *, max_bytes: int = limits.MAX_MESSAGE_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._types = {cls.__struct_config__.tag: cls for cls in typing.get_args(union)}
        self.max_bytes = max_bytes

    def decode(self, frame: bytes | memoryview) -> M:
        """Decode one frame; raises `ProtocolError` that says what was wrong with it."""
        if len(frame) > self.max_bytes:
            raise ProtocolError(f"message of {len(frame)} bytes is over the limit of {self.max_bytes}", field="message")
        try:
            return self._decoder.decode(frame)
        except msgspec.ValidationError as error:
            raise self._explain(frame, str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise ProtocolError(f"not a message: {error}") from None

    def _explain(self, frame: bytes | memoryview, text: str) -> ProtocolError:
        """A message of the wrong shape, in our words: its type's name and the field's."""
        kind = _message_type(frame)
        if kind is None:  # cut off, or something else than an array that begins with a number
            return ProtocolError(f"bad message: {text}", field="type" if text.endswith("`$[0]`") else None)
        if kind not in self._types:
            return ProtocolError(f"message type {kind} is not accepted on this port", field="type")
        name = f"bad message of type {kind} ({self._types[kind].__name__})"
        field, problem = locate(self._types[kind], text)
        return ProtocolError(f"{name}: {field}: {problem}" if field else f"{name}: {problem}", field=field)


class _TypeOnly(msgspec.Struct, array_like=True):
    """Reads the type number of any message and skips the rest without building it."""

    kind: int


_type_decoder = msgspec.msgpack.Decoder(_TypeOnly)


class _RequestHeader(msgspec.Struct, array_like=True):
    kind: int
    req: int


_header_decoder = msgspec.msgpack.Decoder(_RequestHeader)


def _message_type(frame: bytes | memoryview) -> int | None:
    try:
        return _type_decoder.decode(frame).kind
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return None


def request_id(frame: bytes | memoryview) -> int:
    """The `req` of a message that failed to decode, so that the error can answer it; 0 if it has none."""
    try:
        return _header_decoder.decode(frame).req
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return 0


_MISSING = re.compile(r"Expected `array` of at least length \d+, got (\d+)")


def locate(cls: type[msgspec.Struct], text: str) -> tuple[str | None, str]:
    """The field's name and the problem out of msgspec's words, which number the fields.

    >>> locate(messages.Generate, "Expected `float | null`, got `str` - at `$[6][0]`")
    ('params.temperature', 'Expected `float | null`, got `str`')
    """
    problem, _, path = text.partition(" - at `$")
    indexes = [int(index) for index in re.findall(r"\[(\d+)\]", path)]
    if (missing := _MISSING.fullmatch(problem)) is not None:
        indexes.append(int(missing[1]))  # the first field that is not there
        problem = "missing"
    return _name_of(cls, indexes), problem


def _name_of(kind: Any, indexes: list[int]) -> str | None:
    """`messages[0].content` for the places [5, 0, 1] of a `Generate`."""
    name = ""
    for index in indexes:
        kind = _not_none(kind)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            fields = msgspec.structs.fields(kind)
            place = index - (kind.__struct_config__.tag is not None)
            if not 0 <= place < len(fields):
                break
            kind = fields[place].type
            name += f".{fields[place].name}" if name else fields[place].name
        else:
            kind = _entry_type(kind, index)
            name += f"[{index}]"
    return name or None


def _not_none(kind: Any) -> Any:
    """X for `X | None`."""
    choices = typing.get_args(kind)
    return next(choice for choice in choices if choice is not type(None)) if type(None) in choices else kind


def _entry_type(kind: Any, index: int) -> Any:
    """The type of one entry of `tuple[X, ...]` or `tuple[X, Y]`."""
    entries = [entry for entry in typing.get_args(kind) if entry is not Ellipsis]
    return entries[min(index, len(entries) - 1)] if entries else None


def pack_i32(values: Iterable[int]) -> bytes:
    """Integers as a little-endian int32 blob."""
    packed = array("i", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_i32(blob: bytes) -> array[int]:
    """The inverse of `pack_i32`; raises `ProtocolError` if the length is not a multiple of 4."""
    return _unpack("i", blob)


def unpack_i64(blob: bytes) -> array[int]:
    """A little-endian int64 blob; raises `ProtocolError` if the length is not a multiple of 8."""
    return _unpack("q", blob)


def _unpack(kind: Literal["i", "q"], blob: bytes) -> array[int]:
    values = array(kind)
    if len(blob) % values.itemsize:
        raise ProtocolError(f"int{8 * values.itemsize} blob of {len(blob)} bytes: not a multiple of {values.itemsize}")
    values.frombytes(blob)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _describe(cls: type[msgspec.Struct]) -> str:
    hints = ", ".join(f"{f.name}:{f.type}={f.default!r}" for f in msgspec.structs.fields(cls))
    return f"{cls.__name__}#{cls.__struct_config__.tag}({hints})"


def schema_hash() -> str:
    """16 hex digits over every message's number, fields, types and defaults; compared in the handshake."""
    classes = [c for c in vars(messages).values() if isinstance(c, type) and issubclass(c, msgspec.Struct)]
    text = "\n".join(sorted(_describe(c) for c in classes))
    return hashlib.sha256(f"{PROTOCOL_VERSION}\n{text}".encode()).hexdigest()[:16]


SCHEMA_HASH = schema_hash()
