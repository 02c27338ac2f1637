"""Corrupt peers on the real ports of a private llmosd: each greets as it should, and sends hostile frames from then on.

What would be an order that its role may give, and that by rights harms others (kill them all, restart a service), is left out: obeying
it is no fault.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import zmq

from hostile.frames import FrameMaker, Hints
from hostile.target import Target
from llmos.errors import ProtocolError
from llmos.protocol import handshake
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, pack_i32
from llmos.protocol.params import SamplingParams

ANSWER_MS = 20_000
RECONNECT_EVERY = 25_000
RAW_CONNECTIONS = 8
GREETING = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48)
Frame = bytes | list[bytes]


class Stuck(Exception):
    """The port does not read, or does not answer: that is a finding."""


class Wire:
    """A connection that can be broken in every way. Replies are kept, the newest ones, decoded if they can be."""

    def __init__(self, target: Target, port: str, answers: Any, *, receive_mark: int = 0) -> None:
        self.port = port
        self._receive_mark = receive_mark
        self.replies: deque[Any] = deque(maxlen=100_000)
        self._path = target.run_dir / f"{port}.sock"
        self._schema: Schema[Any] = Schema(answers)
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes]
        self._open()

    def _open(self) -> None:
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 500)
        if self._receive_mark:
            self.socket.setsockopt(zmq.RCVHWM, self._receive_mark)
            self.socket.setsockopt(zmq.RCVBUF, 4096)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self.socket.connect(f"ipc://{self._path}")

    def greet(self, role: str, name: str, pid: int | None = None) -> None:
        hello = handshake.hello(role, name)
        self.ask(msgspec.structs.replace(hello, pid=pid) if pid is not None else hello, m.Welcome)

    def ask(self, message: m.Message, answer: type) -> Any:
        """Send, and wait for an answer of this type; whatever else comes is kept."""
        self.send(encode(message))
        while self.socket.poll(ANSWER_MS):
            reply = self._decode(self.socket.recv())
            if isinstance(reply, answer):
                return reply
            self.replies.append(reply)
        raise Stuck(f"{self.port}: no {answer.__name__} within {ANSWER_MS / 1000:g} s")

    def send(self, frame: Frame) -> None:
        while True:
            try:
                if isinstance(frame, bytes):
                    self.socket.send(frame, zmq.NOBLOCK)
                else:
                    self.socket.send_multipart(frame, zmq.NOBLOCK)
            except zmq.Again:
                self.drain()
                if not self.socket.poll(ANSWER_MS, zmq.POLLOUT):
                    raise Stuck(f"{self.port}: does not read") from None
            else:
                return

    def wait(self, timeout_ms: int) -> None:
        """For something to come, then as `drain`."""
        self.socket.poll(timeout_ms)
        self.drain()

    def drain(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self.replies.append(self._decode(self.socket.recv(zmq.NOBLOCK)))

    def _decode(self, frame: bytes) -> Any:
        try:
            return self._schema.decode(frame)
        except ProtocolError:
            return None

    def again(self) -> None:
        """Another connection; the old one is dropped without a word."""
        self.socket.close()
        self._open()

    def raw(self, chance: random.Random) -> None:
        """Connections that speak no ZeroMQ, or only begin to."""
        for _ in range(RAW_CONNECTIONS):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
                stream.settimeout(1.0)
                stream.connect(str(self._path))
                start = chance.choice((b"", GREETING[: chance.randrange(64)], GREETING, b"GET / HTTP/1.1\r\n\r\n"))
                stream.sendall(start + chance.randbytes(chance.choice((0, 1, 64, 5000))))

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@dataclass(frozen=True)
class Role:
    """Who the attacker claims to be on a port. `hints` and `is_order` may look at what was answered so far."""

    port: str
    role: str
    takes: Any
    answers: Any
    name: Callable[[Target], tuple[str, int]]
    weights: dict[type, float]
    may_die: tuple[str, ...] = ()


def _myself(target: Target) -> tuple[str, int]:
    return "fuzz", os.getpid()


def _rogue_executor(target: Target) -> tuple[str, int]:
    return "executor.rogue", target.pid("executor.rogue")


_ORDERS: dict[type, float] = {m.Drain: 0.0, m.RecordWrite: 0.002, m.TenantSet: 0.3}
ROLES = {
    "client": Role("client", "client", m.ClientToGateway, m.GatewayToClient, _myself, _ORDERS),
    "client-control": Role("client-control", "client", m.ClientToGateway, m.GatewayToClient, _myself, _ORDERS),
    "kernel": Role("kernel", "gateway", m.ToKernel, m.FromKernel, _myself, _ORDERS),
    "kernel-control": Role("kernel-control", "gateway", m.ToKernel, m.FromKernel, _myself, _ORDERS),
    "text": Role("text", "gateway", m.GatewayToTokenizer, m.TokenizerToGateway, _myself, {}),
    "supervisor": Role("supervisor", "executor", m.ToSupervisor, m.FromSupervisor, _rogue_executor, {}, ("executor.rogue",)),
    "executor": Role("kernel", "executor", m.ToKernel, m.FromKernel, _rogue_executor, {m.StepResult: 40.0}, ("executor.rogue",)),
}  # fmt: skip


class Attacker:
    """Sends `frames` frames; `progress` is called with how many it has sent."""

    def __init__(self, name: str, target: Target, seed: int, progress: Callable[[int], None]) -> None:
        self.role = ROLES[name]
        self.sent = 0
        self._target = target
        self._progress = progress
        self._chance = random.Random(seed)
        self._own: deque[int] = deque(maxlen=64)
        self._plans: deque[m.StepPlan] = deque(maxlen=4)
        self._generation = 0
        self._name = self.role.name(target)[0]
        self._takes: Schema[Any] = Schema(self.role.takes)
        self._wire = Wire(target, self.role.port, self.role.answers)
        self._maker = FrameMaker(seed, self.role.takes, self._hints(), self.role.weights)
        self._customer: Wire | None = (
            None  # asks for the model whose executor is corrupt, so that it has something to answer
        )
        if name == "executor":
            self._customer = Wire(target, "kernel", m.FromKernel)
            self._customer.greet("gateway", "customer")

    def run(self, frames: int) -> None:
        self._greet()
        while self.sent < frames:
            frame = self._maker.frame()
            if self._is_order(frame):
                continue
            self._wire.send([frame, b"x"] if self._chance.random() < 0.002 else frame)
            self.sent += 1
            if not self.sent % 64:
                self._wire.drain()
                self._learn()
                self._order()
            if not self.sent % 2048:
                self._progress(self.sent)
            if not self.sent % RECONNECT_EVERY:
                self._settle()
                self._wire.raw(self._chance)
                self._wire.again()
                self._greet()
        self._settle()

    def close(self) -> None:
        self._wire.close()
        if self._customer is not None:
            self._customer.close()

    def _order(self) -> None:
        if self._customer is not None:
            params = SamplingParams(
                temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, max_tokens=8
            )
            self._customer.drain()
            self._customer.send(encode(m.SeqSubmit(self.sent, "rogue", pack_i32([1, 2, 3]), params, "customer")))

    def _greet(self) -> None:
        self._wire.greet(self.role.role, *self.role.name(self._target))
        if self.role.role == "executor" and self.role.port == "kernel":
            self._register()

    def _settle(self) -> None:
        """Until everything that was sent has been taken: the hello goes behind it, in the same connection."""
        self._wire.greet(self.role.role, *self.role.name(self._target))

    def _register(self) -> None:
        self._wire.send(encode(m.ExecutorReady("rogue", 64, 16, 16, 256, 500, 1000, "none", "fake")))

    def _learn(self) -> None:
        while self._wire.replies:
            reply = self._wire.replies.popleft()
            if isinstance(reply, (m.Accepted, m.Spawned, m.SeqAccepted)):
                self._own.append(reply.rid)
            elif isinstance(reply, m.Forked):
                self._own.extend(reply.rids[:4])
            elif isinstance(reply, m.ExecutorWelcome):
                self._generation = reply.generation
            elif isinstance(reply, m.StepPlan):
                self._plans.append(reply)
            elif isinstance(reply, m.Error) and reply.field == "hello":
                self._greet()  # we were taken for the process that was killed because of us
                return

    def _is_order(self, frame: bytes) -> bool:
        try:
            message = self._takes.decode(frame)
        except ProtocolError:
            return False
        if isinstance(message, m.Kill) and message.rid is None:
            return message.tenant is None and message.model != "rogue" and message.job not in self._own
        if isinstance(message, m.TenantSet):
            return message.tenant == "root" or bool(message.guaranteed_pages)
        if isinstance(message, m.RestartService):
            return True
        if isinstance(message, m.Hello):
            return message.role != self.role.role
        if isinstance(message, m.Tokenize | m.Encode):
            return False
        rids = {getattr(message, name, None) for name in ("rid", "job")} - {None}
        return any(0 < rid < 2**31 and rid not in self._own for rid in rids)

    def _hints(self) -> Hints:
        def own(chance: random.Random) -> int:
            return chance.choice(self._own) if self._own else 2**40

        return Hints(
            {
                "model": lambda chance: chance.choice(("demo", "rogue", "rogue")),
                "rid": own,
                "req": lambda chance: chance.randrange(1, 1000),
                "stream": lambda chance: chance.randrange(1, 300),
                "text": lambda chance: chance.choice(("hello there", "é🙂", None)),
                "messages": lambda chance: None,
                "token_ids": lambda chance: chance.choice((None, pack_i32([1, 2, 3]))),
                "prompt": lambda chance: pack_i32([chance.randrange(500) for _ in range(chance.choice((1, 5, 40)))]),
                "tokens": lambda chance: pack_i32([1, 2, 3]),
                "ids": lambda chance: tuple(chance.randrange(600) for _ in range(3)),
                "owner": lambda chance: chance.choice(("eve", "mallory")),
                "tenant": lambda chance: chance.choice(("eve", "mallory")),
                "nice": lambda chance: chance.randrange(0, 20),
                "after": lambda chance: (),
                "deadline_ms": lambda chance: None,
                "temperature": lambda chance: 0.0,
                "top_k": lambda chance: 0,
                "top_p": lambda chance: 1.0,
                "min_p": lambda chance: 0.0,
                "repetition_penalty": lambda chance: 1.0,
                "max_tokens": lambda chance: chance.choice((1, 3, 8)),
                "generation": lambda chance: self._generation,
                "step": lambda chance: self._plans[-1].step if self._plans else 1,
                "samples": self._samples,
                "name": lambda chance: self._name,
            }
        )

    def _samples(self, chance: random.Random) -> bytes:
        """The rows that the newest plan asks for, with tokens that are right in form."""
        if not self._plans:
            return b""
        plan = self._plans[-1]
        rows = np.frombuffer(plan.decode or b"", "<i4").tolist()
        return pack_i32(value for row in rows for value in (row, chance.randrange(600), chance.randrange(-1, 1001)))
