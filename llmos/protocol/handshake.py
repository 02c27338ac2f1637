"""Handshake, pure: build a Hello, judge a Hello, judge the answer. A mismatch fails loudly at connect, never later.

States of a connection on the listener's side: unknown -> greeted. Before Hello every other message is refused.
"""

from __future__ import annotations

import os

from llmos.errors import ProtocolError, VersionMismatch
from llmos.protocol import limits
from llmos.protocol.codec import PROTOCOL_VERSION, SCHEMA_HASH
from llmos.protocol.failures import typed
from llmos.protocol.messages import Error, Hello, Message, Welcome


def hello(role: str, name: str) -> Hello:
    """This process's introduction. `role` as listed at `messages.Hello`; `name` is unique per role, e.g. executor.demo."""
    return Hello(PROTOCOL_VERSION, SCHEMA_HASH, role, name, os.getpid())


def check_hello(message: Hello, roles: frozenset[str]) -> None:
    """Raise `VersionMismatch` or `ProtocolError` if the peer may not talk on this port. What it says of itself is kept, and shown."""
    for field in ("role", "name", "schema_hash"):
        if (size := len(getattr(message, field))) > limits.MAX_PEER_NAME_CHARS:
            raise ProtocolError(f"{field}: {size} characters, the limit is {limits.MAX_PEER_NAME_CHARS}", field=field)
    if not 0 <= message.pid < 2**31:
        raise ProtocolError(f"pid: {message.pid} is outside [0, {2**31 - 1}]", field="pid")
    _check_version(message.protocol, message.schema_hash, f"{message.role} {message.name}")
    if message.role not in roles:
        raise ProtocolError(
            f"role {message.role!r} is not accepted on this port; accepted: {sorted(roles)}", field="role"
        )


def welcome(name: str, incarnation: int) -> Welcome:
    return Welcome(PROTOCOL_VERSION, SCHEMA_HASH, name, incarnation)


def check_answer(message: Message, peer: str) -> Welcome:
    """The connecting side's check; returns the Welcome or raises the typed error that came instead."""
    if isinstance(message, Error):
        raise typed(message)
    if not isinstance(message, Welcome):
        raise ProtocolError(f"{peer} answered Hello with {type(message).__name__}")
    _check_version(message.protocol, message.schema_hash, peer)
    return message


def _check_version(protocol: int, schema_hash: str, peer: str) -> None:
    if protocol != PROTOCOL_VERSION:
        raise VersionMismatch(f"{peer} speaks protocol {protocol}, this side {PROTOCOL_VERSION}", field="protocol")
    if schema_hash != SCHEMA_HASH:
        raise VersionMismatch(
            f"{peer} has message schema {schema_hash}, this side {SCHEMA_HASH}: mixed llmos versions",
            field="schema_hash",
        )
