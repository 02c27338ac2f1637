"""A microkernel without sockets between corrupt peers and an innocent stream: fast, seeded, one exception is one finding.

Two models: `good` has an honest executor, on which an innocent stream always runs; `rogue` has an executor whose answers are damaged
ones. Gateways, storage and supervisor send what `frames.FrameMaker` makes. What would be an order with authority over the innocent (a
gateway may end any sequence, a supervisor may drain) is not sent: that is no fault.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import msgspec
import numpy as np

from hostile.frames import FrameMaker, Hints
from llmos.errors import ProtocolError
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.limits import KernelLimits, SchedulerLimits
from llmos.microkernel.outbox import Send
from llmos.microkernel.sender import Sender
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, pack_i32, unpack_i32, unpack_i64
from llmos.protocol.params import SamplingParams
from llmos.services.executor.fake import fake_token

GOOD, ROGUE = "good", "rogue"
OWNER = "innocent"
VOCAB = 300
NEUTRAL = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
_to_kernel: Schema[Any] = Schema(m.ToKernel)
_HONEST, _HONEST_GATEWAY = Sender(1, "executor", "executor.good"), Sender(2, "gateway", "gateway")
_BAD_EXECUTOR = Sender(3, "executor", "executor.rogue")
_ROLES = ("gateway", "gateway", "gateway", "executor", "storage", "supervisor")
_BAD = {role: Sender(10 + number, role, f"{role}.bad") for number, role in enumerate(dict.fromkeys(_ROLES))}


class Honest:
    """Executes plans by hashing: what `FakeBackend` gives, without its checks of pages."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[int, int]] = {}  # row -> seed, next position
        self.decode: list[int] = []

    def run(self, plan: m.StepPlan) -> m.StepResult:
        for add in plan.row_adds:
            assert add.params.seed is not None
            self.rows[add.row] = (add.params.seed, len(add.tokens) // 4)
        if plan.decode is not None:
            self.decode = list(unpack_i32(plan.decode))
        prefill = np.frombuffer(plan.prefill, "<i4").reshape(-1, 4)
        samples = []
        for row in [*self.decode, *prefill[prefill[:, 3] == 1, 0].tolist()]:
            seed, position = self.rows[row]
            samples += [row, position, fake_token(seed, position, VOCAB)]
            self.rows[row] = (seed, position + 1)
        return m.StepResult(plan.generation, plan.step, pack_i32(samples), (), b"", 1000, 0)


class Inside:
    """`attack` sends one hostile frame; the innocent stream goes on meanwhile and is checked token by token."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.finished = self.frames = self.decoded = 0
        limits = KernelLimits(max_waiting=200, retention_s=2.0, idle_timeout_s=5.0, linger_s=1.0)
        scheduling = SchedulerLimits(max_rows=8, max_step_tokens=64)
        self.kernel = Kernel(limits, scheduling, (GOOD, ROGUE), seed, 0.0)
        self._honest = Honest()
        self._plans: dict[int, deque[m.StepPlan]] = {_HONEST.peer: deque(), _BAD_EXECUTOR.peer: deque()}
        self._own: deque[int] = deque(maxlen=32)  # sequences of the bad ones
        self._rid = self._got = 0
        self._asked = False
        self._last_ready = 0.0
        hints = Hints(
            {
                "model": lambda chance: ROGUE if chance.random() < 0.9 else GOOD,
                "rid": lambda chance: chance.choice(self._own) if self._own else 1,
                "prompt": lambda chance: pack_i32([chance.randrange(VOCAB) for _ in range(chance.choice((1, 5, 40)))]),
                "tokens": lambda chance: pack_i32([1, 2, 3]) if chance.random() < 0.5 else b"",
                "owner": lambda chance: chance.choice(("eve", "mallory", None)) or "eve",
                "nice": lambda chance: chance.randrange(-20, 20),
                "after": lambda chance: (),
                "temperature": lambda chance: 0.0,
                "top_k": lambda chance: 0,
                "top_p": lambda chance: 1.0,
                "min_p": lambda chance: 0.0,
                "repetition_penalty": lambda chance: 1.0,
                "max_tokens": lambda chance: chance.choice((1, 3, 20, None)),
                "generation": lambda chance: self.kernel.state.lanes[ROGUE].generation,
                "step": lambda chance: self._oldest_step(),
                "samples": self._samples,
            }
        )
        self._maker = FrameMaker(seed, m.ToKernel, hints, {m.Drain: 0.0, m.ExecutorReady: 0.3})
        for sender in (_HONEST, _HONEST_GATEWAY, _BAD_EXECUTOR, *_BAD.values()):
            self._deliver(self.kernel.greet(sender, self.now))
        for sender, model in ((_HONEST, GOOD), (_BAD_EXECUTOR, ROGUE)):
            self._send(sender, _ready(model))

    # ------------------------------------------------------------ one turn

    def attack(self) -> None:
        """One hostile frame, as the kernel's process would take it, then whatever follows from it."""
        self.frames += 1
        self.now += 0.001
        frame = self._maker.frame()
        try:
            message = _to_kernel.decode(frame)
        except ProtocolError:
            return
        if isinstance(message, (m.Hello, m.RecordWrite)):
            return
        role = self.chance.choice(_ROLES)
        if _is_order(message, self.kernel.state.sequences.get(self._rid) is not None and self._rid, role):
            return
        self.decoded += 1
        if role == "executor" or isinstance(message, (m.StepResult, m.ExecutorReady)):
            if isinstance(message, m.ExecutorReady) and message.model != ROGUE:
                return
            self._send(_BAD_EXECUTOR, message)
            self._plans[_BAD_EXECUTOR.peer].clear() if isinstance(message, m.ExecutorReady) else None
        else:
            self._send(_BAD[role], message)
        self.innocent_turn()

    def innocent_turn(self) -> None:
        """The innocent's stream takes a step; when it has ended, another one begins."""
        if not self._rid and not self._asked:
            self._asked, self._got = True, 0
            params = msgspec.structs.replace(NEUTRAL, seed=7, max_tokens=50)
            self._send(_HONEST_GATEWAY, m.SeqSubmit(1, GOOD, pack_i32([1, 2, 3]), params, OWNER, None, -20))
        plans = self._plans[_HONEST.peer]
        if plans:
            self._send(_HONEST, self._honest.run(plans.popleft()))

    def mend(self) -> None:
        """Now and then the rogue executor registers again with sane capacities, so that there is something to attack."""
        self._plans[_BAD_EXECUTOR.peer].clear()
        self._send(_BAD_EXECUTOR, _ready(ROGUE))

    # ------------------------------------------------------------ plumbing

    def _send(self, sender: Sender, message: m.Message) -> None:
        self._deliver(self.kernel.handle(sender, message, self.now))
        self._deliver(self.kernel.tick(self.now))

    def _deliver(self, sends: list[Send]) -> None:
        for send in sends:
            message = send.message
            encode(message)  # what cannot be encoded would end the process too
            if isinstance(message, m.StepPlan):
                if send.peer in self._plans:
                    self._plans[send.peer].append(message)
            elif isinstance(message, (m.SeqAccepted, m.Forked)) and send.peer != _HONEST_GATEWAY.peer:
                self._own.extend([message.rid] if isinstance(message, m.SeqAccepted) else message.rids[:3])
            elif send.peer == _HONEST_GATEWAY.peer:
                self._innocent(message)

    def _innocent(self, message: m.Message) -> None:
        if isinstance(message, m.SeqAccepted):
            self._rid, self._asked = message.rid, False
        elif isinstance(message, m.SeqTokens):
            values = unpack_i64(message.columns)
            for rid, offset, token in zip(values[0::3], values[1::3], values[2::3]):
                assert (rid, offset, token) == (self._rid, self._got, fake_token(7, 3 + self._got, VOCAB)), (
                    "a wrong token"
                )
                self._got += 1
            for end in message.ends:
                assert (end.rid, end.reason, self._got) == (self._rid, 2, 50), f"the innocent ended as {end}"
                self._rid, self.finished = 0, self.finished + 1
        else:
            raise AssertionError(f"the innocent was answered {message}")

    def _oldest_step(self) -> int:
        scheduler = self.kernel.state.lanes[ROGUE].scheduler
        return scheduler.in_flight[0].step if scheduler is not None and scheduler.in_flight else 1

    def _samples(self, chance: random.Random) -> bytes:
        """What was asked for, right or with a few numbers changed."""
        scheduler = self.kernel.state.lanes[ROGUE].scheduler
        if scheduler is None or not scheduler.in_flight:
            return b""
        step = scheduler.in_flight[0]
        count = len(step.rows) - step.num_silent
        samples = np.zeros((count, 3), np.int64)
        samples[:, 0], samples[:, 1], samples[:, 2] = step.rows[:count], step.stored[:count], 5
        if count and chance.random() < 0.6:
            samples[chance.randrange(count), chance.randrange(3)] = chance.choice(
                (-1, 0, 299, 300, 2**31 - 1, -(2**31))
            )
        return samples.astype("<i4").tobytes()


def _ready(model: str) -> m.ExecutorReady:
    return m.ExecutorReady(model, 64, 4, 8, 64, 200, VOCAB, "none", "fake", 8, 1.0)


def _is_order(message: m.Message, innocent: int | bool, role: str) -> bool:
    """Does somebody with the right to it ask for what harms the innocent?"""
    if isinstance(message, m.Drain):
        return role == "supervisor"
    if isinstance(message, m.Kill) and message.rid is None:
        return message.model != ROGUE
    if isinstance(message, (m.TenantSet, m.TenantsStored)):
        return (
            True if isinstance(message, m.TenantsStored) else message.tenant == OWNER or bool(message.guaranteed_pages)
        )
    if isinstance(message, m.ServiceDown):
        return message.name != f"executor.{ROGUE}"
    if isinstance(message, (m.SeqSpawn, m.SeqSubmit)):
        return message.model == GOOD and message.nice < 0  # it may be served first
    return bool(innocent) and innocent in (getattr(message, "rid", None), getattr(message, "job", None))
