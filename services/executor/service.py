"""The executor process: load a model, register with the microkernel, execute its plans until asked to stop.

States: loading -> greeting (hello sent) -> announcing (ExecutorReady sent) -> serving (ExecutorWelcome with a generation received).
When another microkernel took over (the supervisor says so, or it does not know us): back to greeting, and its welcome starts a new
generation with an empty row table. Plans of another generation are dropped and counted.

As many steps as the backend's `window` are submitted before the oldest one's result is waited for, so that a device always has the next
step queued; while a device computes, the loop goes on reading plans.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import time
from collections import deque
from typing import Any

from llmos.config import model_path
from llmos.errors import ProtocolError
from llmos.killpoints import ARMED, reach
from llmos.ports.lifeline import Lifeline
from llmos.ports.sync import Dialer, PortSet
from llmos.protocol import handshake
from llmos.protocol.codec import Schema, unpack_i32
from llmos.protocol.failures import typed
from llmos.protocol.messages import (
    Error,
    ExecutorReady,
    ExecutorWelcome,
    FromKernel,
    Message,
    StepPlan,
    StepResult,
    Welcome,
)
from llmos.services.base import ServiceContext
from llmos.services.executor.backend import Backend, Limits, open_backend

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.1  # how often an idle executor looks for signals and beats
_NO_GENERATION = -1
_NONE = -1
_LONG_STEP_S = 0.5
_LOOK_EVERY_S = 0.0005  # how often plans are looked for while a device computes


class Pulse:
    """Called wherever the work loop turns, also between layers: listens to the supervisor and beats.

    `begin` and `end` stand around each step: one layer of a long prompt may take longer than the supervisor is patient, which it is told
    before.
    """

    def __init__(self, line: Lifeline) -> None:
        self.line = line
        self._turns = 0
        self._working = False
        self._token_s: float | None = None  # the slowest lately

    def __call__(self) -> None:
        self._turns += 1
        self.line.poll()
        self.line.beat(self._turns, time.monotonic(), working=self._working)

    def begin(self, num_tokens: int) -> None:
        if self._token_s is None or self._token_s * num_tokens > _LONG_STEP_S:
            self._working = True
            self()

    def end(self, num_tokens: int, took_s: float) -> None:
        took = took_s / num_tokens
        self._token_s = took if self._token_s is None else max(took, 0.9 * self._token_s)
        self._working = False


@dataclasses.dataclass(frozen=True, slots=True)
class Submitted:
    """A step that the backend was given at `at`, and where it stands."""

    generation: int
    step: int
    num_tokens: int
    at: float


class ExecutorService:
    """The loop between the microkernel's port and a backend."""

    def __init__(self, name: str, model: str, backend: Backend, port: Dialer[Any], pulse: Pulse) -> None:
        self.name = name
        self.model = model
        self.backend = backend
        self.port = port
        self.pulse = pulse
        self.line = pulse.line
        self.generation = _NO_GENERATION
        self.steps = 0
        self.plans_dropped = 0
        self._ready = False
        self._kernels_greeted = 0
        self._idle_since = time.monotonic()
        self._submitted: deque[Submitted] = deque()

    def run(self, greet_timeout_s: float) -> None:
        """Register, then serve until the lifeline says stop."""
        self.port.greet("executor", self.name, greet_timeout_s)
        self._announce()
        ports = PortSet(self.line.port, self.port)
        while not self.line.stopping:
            if not self._turn():
                ports.wait(_IDLE_WAIT_S)
            self.pulse()
            if self.line.kernel_restarts != self._kernels_greeted:
                self._greet_again()

    def _turn(self) -> bool:
        """Do the next thing; False if there is nothing to do. Messages come first as long as another step may be submitted."""
        if len(self._submitted) < self.backend.window:
            message = self._receive()
            if message is not None:
                self._handle(message)
                return True
        if not self._submitted:
            return False
        if self.backend.done(_LOOK_EVERY_S):
            self._finish()
        return True

    def _greet_again(self) -> None:
        self.generation = _NO_GENERATION
        if self.port.send(handshake.hello("executor", self.name)):  # else the socket has not found the new one yet
            self._kernels_greeted = self.line.kernel_restarts
            if ARMED:
                reach("executor.again.greeted")
            log.info("the microkernel restarted; registering again")

    def _receive(self) -> Message | None:
        try:
            return self.port.receive()  # type: ignore[no-any-return]
        except ProtocolError as error:
            log.error("the microkernel sent a bad message: %s", error)
            return None

    def _handle(self, message: Message) -> None:
        if isinstance(message, StepPlan):
            self._submit(message)
        elif isinstance(message, ExecutorWelcome):
            self._serve(message.generation)
        elif isinstance(message, Welcome):
            handshake.check_answer(message, "the microkernel")
            self._announce()
        elif isinstance(message, Error) and message.field == "hello":
            self._kernels_greeted = _NONE  # our result reached one that does not know us
        elif isinstance(message, Error):
            raise typed(message)
        else:
            log.error("unexpected %s from the microkernel", type(message).__name__)

    def _announce(self) -> None:
        fields = dataclasses.asdict(self.backend.capabilities)
        self.port.send(ExecutorReady(model=self.model, **fields))
        if ARMED:
            reach("executor.start.announced")

    def _serve(self, generation: int) -> None:
        if ARMED:
            reach("executor.start.generation")
        self.backend.reset()
        self._submitted.clear()
        self.generation = generation
        self._idle_since = time.monotonic()
        if not self._ready:
            self._ready = True
            self.line.ready(self.backend.description)
        log.info("serving %s as generation %d", self.model, generation)

    def _submit(self, plan: StepPlan) -> None:
        if plan.generation != self.generation:
            self.plans_dropped += 1
            return
        if ARMED:
            reach("executor.plan.received")
        step = Submitted(plan.generation, plan.step, _num_tokens(plan), time.monotonic())
        self.pulse.begin(step.num_tokens)
        self.backend.submit(plan)
        self._submitted.append(step)

    def _finish(self) -> None:
        """Send the oldest step's result. It computed since it was submitted, or since the one before it was done."""
        output = self.backend.collect()
        step = self._submitted.popleft()
        if ARMED:
            reach("executor.step.computed")
        ended = time.monotonic()
        started = max(step.at, self._idle_since)
        self.pulse.end(step.num_tokens, ended - started)
        busy_us, idle_us = int((ended - started) * 1e6), int((started - self._idle_since) * 1e6)
        self.steps += 1
        self._idle_since = ended
        self.port.send(
            StepResult(
                step.generation,
                step.step,
                output.samples,
                output.logprobs,
                output.failed,
                busy_us,
                idle_us,
                output.results,
            )
        )
        if ARMED:
            reach("executor.result.sent")
            if self.steps % 5 == 0:
                reach("executor.result.fifth")


def _num_tokens(plan: StepPlan) -> int:
    """About what it computes, and at least 1."""
    lengths = unpack_i32(plan.prefill)[2::4]
    return max(1, sum(lengths) + len(plan.decode or b"") // 4)


def run(context: ServiceContext, line: Lifeline) -> None:
    """The service's body, called by `service_main`."""
    assert context.model is not None, "an executor is started with --model"
    config, model = context.config, context.model
    # Threads that spin at the end of each parallel region would take the cores that the microkernel needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    started = time.monotonic()
    pulse = Pulse(line)
    limits = Limits(config.microkernel.max_rows, config.microkernel.max_step_tokens)
    backend = open_backend(model, model_path(model), limits, pulse)
    log.info("%s: ready in %.1f s: %s", model.name, time.monotonic() - started, backend.description)
    gc.collect()
    gc.freeze()
    if ARMED:
        reach("executor.start.loaded")
    port: Dialer[Any] = Dialer(context.run_dir, "kernel", Schema(FromKernel))
    try:
        ExecutorService(context.name, model.name, backend, port, pulse).run(config.daemon.start_timeout_s)
    finally:
        port.close()
