"""What a crowd of clients can do wrong, one function each: `scenario(target, scale) -> facts`. A fact that ends with `_ok` is a verdict."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import zmq

from hostile.attackers import GREETING, Wire
from hostile.neighbour import Neighbour
from hostile.target import Target, vocab_size
from llmos import Client
from llmos.codes import ErrorCode, ServiceState
from llmos.errors import LlmosError
from llmos.protocol import handshake
from llmos.protocol import messages as m
from llmos.protocol.codec import encode, pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.base import HANG_VARIABLE
from llmos.services.executor.fake import fake_token
from llmos.services.tokenizer.service import TROUBLE_VARIABLE

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


# ---------------------------------------------------------------- clients that do not read, too many requests, texts that kill


def unread(target: Target, scale: float) -> Facts:
    """16 clients stop reading, 16 read. Then the 16 read after all, and get everything."""
    count, tokens = max(2, int(16 * scale)), UNREAD_TOKENS
    vocab = vocab_size()
    slow = [Wire(target, "client", m.GatewayToClient, receive_mark=1) for _ in range(count)]
    readers = [Neighbour(target.run_dir, first_seed=2_000_000 + 1000 * number) for number in range(count)]
    with contextlib.ExitStack() as stack:
        for reader in readers:
            stack.enter_context(reader)
        before = _tokens_per_s(readers)
        kernel_mib = target.mib("microkernel")
        for number, wire in enumerate(slow):
            wire.greet("client", "slow")
            params = SamplingParams(seed=number, max_tokens=tokens, ignore_eos=True)
            wire.send(encode(m.Generate(1, "demo", None, pack_i32([1, 2, 3]), None, params)))
        with Client(target.run_dir) as client:
            deadline = time.monotonic() + 60.0
            while time.monotonic() < deadline and not _are_stalled(client, count):
                time.sleep(0.2)
            stalled = _are_stalled(client, count)
        beside = _tokens_per_s(readers)
        kernel_grown, gateway_mib = target.mib("microkernel") - kernel_mib, target.mib("gateway")
    wrong = sum(
        _read_late(wire) != [fake_token(number, 3 + place, vocab) for place in range(tokens)]
        for number, wire in enumerate(slow)
    )
    for wire in slow:
        wire.close()
    failures = [failure for reader in readers for failure in reader.failures]
    return {
        "slow": count, "stalled_ok": stalled, "tokens_per_s": [round(before), round(beside)], "unaffected_ok": beside > 0.7 * before,
        "kernel_grown_mib": round(kernel_grown, 1), "kernel_ok": kernel_grown <= 10, "unread_gateway_mib": round(gateway_mib),
        "slow_wrong": wrong, "slow_ok": wrong == 0, "reader_failures": failures, "readers_ok": not failures, **_gateway(target),
    }  # fmt: skip


def overload(target: Target, scale: float) -> Facts:
    """Ten times as many requests as there is room for, at once: so many are accepted as fit, and end right; the others are told at once."""
    count, tokens = int(10 * ROOM * scale), 30
    vocab = vocab_size()
    wire = Wire(target, "client", m.GatewayToClient)
    wire.greet("client", "crowd")
    params = SamplingParams(seed=1, max_tokens=tokens, ignore_eos=True)
    sent: dict[int, float] = {}
    refused: dict[int, float] = {}
    accepted: set[int] = set()
    ids: dict[int, list[int]] = {}
    ended = 0
    untyped = 0
    deadline = time.monotonic() + 120.0
    number = 0
    while (
        number < count or ended < len(accepted) or len(accepted) + len(refused) < count
    ) and time.monotonic() < deadline:
        if number < count:
            number += 1
            sent[number] = time.monotonic()
            wire.send(encode(m.Generate(number, "demo", None, pack_i32([1, 2, 3]), None, params)))
        wire.drain() if number < count else wire.wait(100)
        while wire.replies:
            reply = wire.replies.popleft()
            if isinstance(reply, m.Accepted):
                accepted.add(reply.req)
                ids[reply.req] = []
            elif isinstance(reply, m.Tokens):
                ids[reply.req] += reply.ids
            elif isinstance(reply, m.Finished):
                ended += 1
            elif isinstance(reply, m.Error):
                refused[reply.req] = time.monotonic() - sent[reply.req]
                untyped += reply.code != ErrorCode.OVERLOADED or not (reply.retry_after_ms or 0) >= 100
    wire.close()
    right = [fake_token(1, 3 + place, vocab) for place in range(tokens)]
    wrong = sum(ids[req] != right for req in accepted)
    waits = sorted(refused.values()) or [0.0]
    return {
        "asked": count, "accepted": len(accepted), "refused": len(refused), "wrong": wrong, "untyped": untyped,
        "refusal_p50_ms": round(1e3 * waits[len(waits) // 2], 1),
        "refusal_p99_ms": round(1e3 * waits[int(0.99 * len(waits))], 1),
        "accepted_ok": ended == len(accepted) >= ROOM - 4 and wrong == 0,
        "refused_ok": len(refused) == count - len(accepted) > 0 == untyped,
        **_gateway(target),
    }  # fmt: skip


def texts(target: Target, scale: float) -> Facts:
    """A text that the tokenizer can not end with, and one that takes all its memory: each fails alone."""
    filler = " and so on" * 300
    facts: Facts = {}
    with Client(target.run_dir) as client:
        for kind in ("bomb", "hang"):
            started = time.monotonic()
            try:
                client.generate(f"{TROUBLE} {kind}{filler}", model="demo", max_tokens=5)
                facts[f"{kind}_error"] = None
            except LlmosError as error:
                facts[f"{kind}_error"] = f"{type(error).__name__}: {error.message}"
            facts[f"{kind}_ok"] = facts[f"{kind}_error"] is not None
            facts[f"{kind}_s"] = round(time.monotonic() - started, 1)
        facts["after_ok"] = (
            len(client.generate("hello" + filler, model="demo", max_tokens=5, ignore_eos=True).token_ids) == 5
        )
    return {**facts, "tokenizer_mib": target.memory()["tokenizer"][1], **_gateway(target)}


def stopped(target: Target, scale: float) -> Facts:
    """SIGSTOP to each service in turn."""
    return _hang_all(target, signal.SIGSTOP)


def stuck(target: Target, scale: float) -> Facts:
    """Each service in turn is stuck in C with the interpreter's lock held: ZeroMQ's own thread goes on, the work loop does not."""
    return _hang_all(target, signal.SIGUSR1)


def _hang_all(target: Target, number: int) -> Facts:
    facts: Facts = {}
    for name in ("executor.demo", "gateway", "tokenizer", "storage", "microkernel"):
        old, started = target.pid(name), time.monotonic()
        os.kill(old, number)
        while target.pid(name) == old and time.monotonic() < started + 20.0:
            time.sleep(0.02)
        facts[f"{name}_noticed_s"] = round(time.monotonic() - started, 2)
        while not _is_running(target, name, old) and time.monotonic() < started + 40.0:
            time.sleep(0.02)
        facts[f"{name}_back_s"] = round(time.monotonic() - started, 2)
        facts[f"{name}_ok"] = facts[f"{name}_noticed_s"] <= HANG_S + NOTICE_S
    return {**facts, **_gateway(target)}


def _is_running(target: Target, name: str, old: int) -> bool:
    with contextlib.suppress(LlmosError, OSError), Client(target.run_dir, timeout_s=5.0) as client:
        return any(
            row.name == name and row.pid not in (0, old) and row.state == ServiceState.RUNNING
            for row in client.status().services
        )
    return False


def _tokens_per_s(readers: list[Neighbour], seconds: float = 2.0) -> float:
    before, started = sum(reader.tokens for reader in readers), time.monotonic()
    time.sleep(seconds)  # the measurement itself
    return (sum(reader.tokens for reader in readers) - before) / (time.monotonic() - started)


def _are_stalled(client: Client, count: int) -> bool:
    """Have all that nobody reads come to the end of their window?"""
    rows = [row for row in client.ps() if row.max_tokens == UNREAD_TOKENS]
    return len(rows) == count and all(row.output_tokens >= WINDOW for row in rows)


def _read_late(wire: Wire) -> list[int]:
    ids: list[int] = []
    wire.drain()
    while True:
        while wire.replies:
            reply = wire.replies.popleft()
            if isinstance(reply, m.Finished):
                return ids
            if isinstance(reply, m.Tokens):
                assert reply.offset == len(ids), (reply.offset, len(ids))
                ids += reply.ids
        wire.send(encode(m.Ack(1, len(ids))))
        wire.wait(20_000)


HANG_S, NOTICE_S = 1.0, 2.5  # the limit for a silent work loop, and what a loaded machine takes longer
WINDOW, UNREAD_TOKENS = 512, 1500
ROOM = 80  # rows and places in the queue that `CONFIGS` gives
TROUBLE = "trouble"
SCENARIOS: dict[str, Callable[[Target, float], Facts]] = {
    "connections": connections, "half-open": half_open, "multipart": multipart, "descriptors": descriptors, "unread": unread,
    "overload": overload, "texts": texts, "stopped": stopped, "stuck": stuck,
}  # fmt: skip
_SERVICES = {"executor.demo", "gateway", "tokenizer", "storage", "microkernel"}
MAY_DIE = {
    "stopped": _SERVICES,
    "stuck": _SERVICES,
    "multipart": {"gateway"},
    "descriptors": {"gateway"},
    "texts": {"tokenizer"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "unread": {"microkernel": f"client_window_tokens = {WINDOW}"},
    "overload": {"microkernel": "max_rows = 16\nmax_waiting = 64"},
    "stopped": {"daemon": f"hang_timeout_s = {HANG_S}"},
    "stuck": {"daemon": f"hang_timeout_s = {HANG_S}", "environment": {HANG_VARIABLE: "1"}},
    "texts": {"environment": {TROUBLE_VARIABLE: TROUBLE}, "more": "\n[tokenizer]\nmemory_mib = 512\n"},
}
