"""Encode and decode messages: msgpack arrays straight into typed structs, size limit before decode.

Invariants: decoding never builds a Python object that no struct asked for; whatever bytes come in, the only exception that comes
out is `ProtocolError`. A `Schema` is the set of message types that one direction of one port accepts.
"""

from __future__ import annotations

import hashlib
import sys
import typing
from array import array
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

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
        self._tags = {cls.__struct_config__.tag for cls in typing.get_args(union)}
        self.max_bytes = max_bytes

    def decode(self, frame: bytes | memoryview) -> M:
        """Decode one frame; raises `ProtocolError` that says what was wrong with it."""
        if len(frame) > self.max_bytes:
            raise ProtocolError(f"message of {len(frame)} bytes is over the limit of {self.max_bytes}", field="message")
        try:
            return self._decoder.decode(frame)
        except msgspec.ValidationError as error:
            raise ProtocolError(self._explain(frame, error), field=_path(str(error))) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise ProtocolError(f"not a message: {error}") from None

    def _explain(self, frame: bytes | memoryview, error: msgspec.ValidationError) -> str:
        """Say "unknown message type" in our words; field errors already name their place."""
        kind = _message_type(frame)
        if kind is not None and kind not in self._tags:
            return f"message type {kind} is not accepted on this port"
        return f"bad message of type {kind}: {error}" if kind is not None else f"bad message: {error}"


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
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
        return None


def request_id(frame: bytes | memoryview) -> int:
    """The `req` of a message that failed to decode, so that the error can answer it; 0 if it has none."""
    try:
        return _header_decoder.decode(frame).req
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
        return 0


def _path(text: str) -> str | None:
    """The field path in a msgspec error ("... - at `$[2]`")."""
    return text.rsplit("`", 2)[1] if text.endswith("`") else None


def pack_i32(values: Iterable[int]) -> bytes:
    """Integers as a little-endian int32 blob."""
    packed = array("i", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_i32(blob: bytes) -> array[int]:
    """The inverse of `pack_i32`; raises `ProtocolError` if the length is not a multiple of 4."""
    if len(blob) % 4:
        raise ProtocolError(f"int32 blob of {len(blob)} bytes: not a multiple of 4")
    values = array("i")
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
