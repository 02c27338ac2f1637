"""What a crowd of clients can do wrong, one function each: `scenario(target, scale) -> facts`. A fact that ends with `_ok` is a verdict."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import zmq

from hostile.attackers import GREETING
from hostile.target import Target
from llmos import Client
from llmos.errors import LlmosError
from llmos.protocol import handshake
from llmos.protocol.codec import encode

READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
Facts = dict[str, Any]


@contextlib.contextmanager
def many_descriptors(count: int) -> Iterator[None]:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before, min(most, count + 500)), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def connections(target: Target, scale: float) -> Facts:
    """5,000 connections that finish ZeroMQ's handshake; half of them say hello too. Nobody of them leaves until the end."""
    count = int(5000 * scale)
    path = f"ipc://{target.run_dir}/client.sock"
    hello = encode(handshake.hello("client", "flood"))
    with many_descriptors(2 * count):
        context = zmq.Context(io_threads=1)
        context.max_sockets = count + 10
        sockets = []
        for number in range(count):
            dealer = context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(path)
            if number % 2:
                dealer.send(hello)
            sockets.append(dealer)
        deadline = time.monotonic() + 10.0
        answered = sum(1 for dealer in sockets[1::2] if dealer.poll(max(0, int((deadline - time.monotonic()) * 1000))))
        facts = {
            "connections": count,
            "answered": answered,
            "all_answered_ok": answered == count // 2,
            **_gateway(target),
        }
        for dealer in sockets:
            dealer.close()
        context.term()
    return facts


def half_open(target: Target, scale: float) -> Facts:
    """As many that begin ZeroMQ's handshake, or nothing at all, and then wait: they are thrown out after some seconds."""
    count = int(5000 * scale)
    with many_descriptors(count):
        opened = []
        for number in range(count):
            stream = _connect(target)
            with contextlib.suppress(OSError):
                stream.sendall(GREETING[: (number * 7) % 64])
            opened.append(stream)
        most = _descriptors(target)
        deadline = time.monotonic() + 20.0
        while _descriptors(target) > 100 and time.monotonic() < deadline:
            time.sleep(0.2)
        left = _descriptors(target)
        for stream in opened:
            stream.close()
    return {"connections": count, "descriptors": most, "left": left, "thrown_out_ok": left <= 100, **_gateway(target)}


def multipart(target: Target, scale: float) -> Facts:
    """One message of 1 GiB in parts of 1 MiB that does not end. ZeroMQ keeps all of them: the gateway reaches its limit of memory."""
    parts = int(1024 * scale)
    sent, old = 0, target.pid("gateway")
    back: float | None = None
    part = b"\x03" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)  # flags: more, long
    with _connect(target) as stream:
        stream.settimeout(30.0)
        stream.sendall(GREETING + READY)
        with contextlib.suppress(OSError):  # the connection was dropped, or nobody is there any more
            while sent < parts:
                stream.sendall(part)
                sent += 1
    _settle(target)
    if target.pid("gateway") != old:
        back = _back_s(target, old)
    return {"mib_sent": sent, "back_s": back, "stopped_ok": sent < parts, **_gateway(target)}


def descriptors(target: Target, scale: float) -> Facts:
    """A gateway that may open 64 files only meets 200 connections: libzmq ends it, another one comes."""
    old = target.pid("gateway")
    psutil.Process(old).rlimit(psutil.RLIMIT_NOFILE, (64, 64))
    psutil.Process(target.pid("microkernel")).rlimit(psutil.RLIMIT_NOFILE, (128, 128))  # which it never comes near
    opened = []
    for _ in range(200):
        with contextlib.suppress(OSError):
            opened.append(_connect(target))
    back = _back_s(target, old)
    for stream in opened:
        stream.close()
    return {"back_s": back, **_gateway(target)}


SCENARIOS: dict[str, Callable[[Target, float], Facts]] = {
    "connections": connections, "half-open": half_open, "multipart": multipart, "descriptors": descriptors,
}  # fmt: skip


def _connect(target: Target) -> socket.socket:
    """A unix connection to the client port, as soon as there is room among those that wait to be accepted."""
    deadline = time.monotonic() + 10.0
    while True:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(str(target.run_dir / "client.sock"))
        except OSError:
            stream.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return stream


def _gateway(target: Target) -> Facts:
    return {"gateway_mib": target.memory()["gateway"][1]}


def _descriptors(target: Target) -> int:
    try:
        return len(os.listdir(f"/proc/{target.pid('gateway')}/fd"))
    except OSError:
        return 0


def _settle(target: Target) -> None:
    """Until somebody new is served."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        with contextlib.suppress(LlmosError, OSError), Client(target.run_dir, timeout_s=5.0) as client:
            client.status()
            return
        time.sleep(0.05)


def _back_s(target: Target, old: int) -> float:
    """Seconds from the death of the gateway that was process `old` until another one serves; infinite if it does not die."""
    deadline = time.monotonic() + 20.0
    while target.pid("gateway") == old:
        if time.monotonic() > deadline:
            return float("inf")
        time.sleep(0.005)
    died = time.monotonic()
    _settle(target)
    return round(time.monotonic() - died, 2)


MAY_DIE = {"multipart": {"gateway"}, "descriptors": {"gateway"}}
