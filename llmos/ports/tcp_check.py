"""Does a TCP port refuse whom it has to refuse? Asked of the live port before anybody is told of it.

Two strangers: one with a CURVE key that nobody knows, one that speaks plain ZMTP. Each has to be refused in so many words, or by the end
of its connection, within the time limit. A port that says nothing is as bad as one that lets them in: its authenticator is dead.
"""

from __future__ import annotations

import asyncio

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from llmos.errors import ConfigError

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
_READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


async def check_refuses(url: str, server_key: str, timeout_s: float = 5.0) -> None:
    """Raise `ConfigError` if the port does not refuse strangers."""
    try:
        async with asyncio.timeout(timeout_s):
            problem = await _check_unknown_key(url, server_key) or await _check_no_curve(url)
    except TimeoutError:
        problem = f"does not answer within {timeout_s:g} s: its authenticator is dead"
    if problem:
        raise ConfigError(f"{url} {problem}; llmosd does not serve on it", field="gateway.tcp")


async def _check_unknown_key(url: str, server_key: str) -> str | None:
    public, secret = zmq.curve_keypair()
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, int("[" in url))
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        events = socket.get_monitor_socket()
        try:
            socket.connect(url)
            while True:
                event = parse_monitor_message(await events.recv_multipart())
                if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return "lets clients in whose key it does not know"
                if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH and event["value"] == 400:
                    return None
        finally:
            socket.disable_monitor()
            events.close(linger=0)


async def _check_no_curve(url: str) -> str | None:
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    try:
        writer.write(_GREETING)
        await writer.drain()
        # The signature and the version come first in any case; a greeting that goes on to the end means that it goes on with us.
        try:
            await reader.readexactly(64)
            writer.write(_READY)
            await writer.drain()
            await reader.readexactly(2)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return "lets clients in that do not use CURVE"
    finally:
        writer.close()
