from __future__ import annotations

import os

import msgspec
import pytest
from msgspec.structs import replace

from llmos.codes import ErrorCode
from llmos.errors import Overloaded, ProtocolError, VersionMismatch
from llmos.protocol import handshake
from llmos.protocol.codec import PROTOCOL_VERSION, SCHEMA_HASH, Schema, encode
from llmos.protocol.messages import Error, Hello, Message, Stop, Welcome

ROLES = frozenset({"client"})
GOOD = handshake.hello("client", "me")


def test_hello_says_who_we_are() -> None:
    assert Hello(PROTOCOL_VERSION, SCHEMA_HASH, "client", "me", os.getpid()) == GOOD
    handshake.check_hello(GOOD, ROLES)


@pytest.mark.parametrize(
    ("hello", "error", "field"),
    [
        (replace(GOOD, protocol=PROTOCOL_VERSION + 1), VersionMismatch, "protocol"),
        (replace(GOOD, protocol=0), VersionMismatch, "protocol"),
        (replace(GOOD, schema_hash="0" * 16), VersionMismatch, "schema_hash"),
        (replace(GOOD, schema_hash=""), VersionMismatch, "schema_hash"),
        (replace(GOOD, role="executor"), ProtocolError, "role"),
        (replace(GOOD, role=""), ProtocolError, "role"),
    ],
)
def test_a_bad_hello_is_refused_by_field(hello: Hello, error: type[ProtocolError], field: str) -> None:
    with pytest.raises(error) as caught:
        handshake.check_hello(hello, ROLES)
    assert caught.value.field == field


def test_the_refusal_names_both_hashes() -> None:
    with pytest.raises(VersionMismatch) as caught:
        handshake.check_hello(replace(GOOD, schema_hash="feedfeedfeedfeed"), ROLES)
    assert "feedfeedfeedfeed" in caught.value.message
    assert SCHEMA_HASH in caught.value.message


def test_the_answer_is_checked_too() -> None:
    welcome = handshake.welcome("client", 5)
    assert handshake.check_answer(welcome, "client") is welcome
    with pytest.raises(VersionMismatch):
        handshake.check_answer(replace(welcome, schema_hash="0" * 16), "client")
    with pytest.raises(Overloaded, match="full"):
        handshake.check_answer(Error(0, ErrorCode.OVERLOADED, "full"), "client")
    with pytest.raises(ProtocolError, match="answered Hello with Stop"):
        handshake.check_answer(Stop(), "client")
    assert Welcome(PROTOCOL_VERSION, SCHEMA_HASH, "client", 5) == welcome


@pytest.mark.parametrize("message", [handshake.hello("client", "x"), handshake.welcome("x", 1), Error(1, 11, "no")])
def test_a_later_versions_handshake_can_be_read(message: Message) -> None:
    later = msgspec.msgpack.encode([*msgspec.msgpack.decode(encode(message)), "something new"])
    assert Schema(Hello | Welcome | Error).decode(later) == message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "x" * 129}, "name"),
        ({"role": "x" * 10**6}, "role"),
        ({"schema_hash": "x" * 10**6}, "schema_hash"),
        ({"pid": -1}, "pid"),
    ],
)
def test_what_a_peer_says_of_itself_is_bounded(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        handshake.check_hello(replace(GOOD, **changes), ROLES)
    assert caught.value.field == field
    assert len(caught.value.message) < 200
