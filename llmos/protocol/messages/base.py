"""Bases of all messages, and the handshake that opens every port.

Of the handshake's messages further fields are ignored: two versions must understand each other well enough to refuse each other.
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of all wire messages."""


class Part(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of structs that travel inside messages."""


class Hello(Message, tag=1, frozen=True, forbid_unknown_fields=False):
    """First message of every connecting peer. `role`: client, gateway, executor, tokenizer, storage, supervisor."""

    protocol: int
    schema_hash: str
    role: str
    name: str
    pid: int


class Welcome(Message, tag=2, frozen=True, forbid_unknown_fields=False):
    """The listener's answer. `incarnation` changes when the listener restarts."""

    protocol: int
    schema_hash: str
    name: str
    incarnation: int


class Error(Message, tag=3, frozen=True, forbid_unknown_fields=False):
    """A typed failure. `req` is the request it answers (0 = none, e.g. an undecodable frame). `retry_after_ms`: a guess when the same
    may be accepted, where one can be made."""

    req: int
    code: int
    message: str
    field: str | None = None
    rid: int | None = None
    retry_after_ms: float | None = None
