"""The microkernel's process: the thin, impure shell around `kernel.Kernel`.

One loop: wait for any port, hand each message to the kernel, plan steps, write the journal, send all effects, beat. Nobody hears of
anything before it is written down (journal.py), and at the start everything that was is there again. It blocks only in the poller, and
never on a peer: a send that can not be queued is counted and dropped (sequences survive that, see kernel.py). Control messages are
served before tokens. Every `_CHECK_INTERVAL_S` while idle the invariants are asserted; a violation ends the process.

The flight recorder (recorder.py) is written to a file on request of an administrator, and when the process ends by an exception.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import secrets
import time
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from llmos.config import MicrokernelConfig, state_dir
from llmos.errors import LlmosError, PermissionRefused, Unavailable
from llmos.killpoints import ARMED, reach
from llmos.microkernel.journal import Journal
from llmos.microkernel.keeper import Keeper
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.limits import KernelLimits, SchedulerLimits
from llmos.microkernel.recorder import Delivery, Recorder, describe_error
from llmos.microkernel.sender import Sender
from llmos.ports.core import Peer
from llmos.ports.lifeline import Lifeline
from llmos.ports.sync import Listener, PortSet
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema
from llmos.protocol.failures import error_message
from llmos.services.base import ServiceContext, service_main

log = logging.getLogger(__name__)

_ROLES = frozenset({"gateway", "executor", "storage", "supervisor"})
_IDLE_WAIT_S = 0.1
_CHECK_INTERVAL_S = 5.0
_MAX_FLIGHT_FILES = 8
_FLIGHT_SUFFIX = ".flight"
_RECORDS_FOR = frozenset({"gateway", "supervisor"})
_MAX_MESSAGES_PER_TURN = 256  # per port, so that one busy peer can not keep the others from being served


class Shell:
    """Connects the pure kernel to its two listeners. Peers get numbers that are unique over both.

    Leaving it as a context manager closes it; if an exception is the cause, what led to it goes to a flight file in `flights`.
    """

    def __init__(self, context: ServiceContext, recorder: Recorder, keeper: Keeper, flights: Path) -> None:
        self.recorder = recorder
        self.keeper = keeper
        self.flights = flights
        self._outgoing: list[Delivery] = []
        schema: Schema[Any] = Schema(m.ToKernel)
        incarnation = secrets.randbits(32)
        names = ("kernel-control", "kernel")
        self.listeners = [Listener(context.run_dir, name, schema, _ROLES, incarnation=incarnation) for name in names]
        self._numbers = itertools.count(1)
        self._peers: dict[int, tuple[Listener[Any], Peer]] = {}
        self._senders: dict[Peer, Sender] = {}
        for listener in self.listeners:
            listener.core.on_greet = lambda peer, listener=listener: self._greet(listener, peer)
            listener.core.on_lost = self._forget

    def _greet(self, listener: Listener[Any], peer: Peer) -> None:
        if ARMED:
            reach("microkernel.greeted")
        sender = Sender(next(self._numbers), peer.role, peer.name, peer.pid)
        self._senders[peer] = sender
        self._peers[sender.peer] = (listener, peer)
        self.deliver(self.recorder.greet(sender, time.monotonic()))

    def serve(self, listener: Listener[Any]) -> None:
        """Handle what has arrived on one port."""
        for _ in range(_MAX_MESSAGES_PER_TURN):
            received = listener.receive()
            if received is None:
                return
            peer, message = received
            if ARMED:
                reach("microkernel.received")
            if isinstance(message, m.RecordWrite):
                listener.send(peer, self._answer_record(peer, message))
                continue
            self.deliver(self.recorder.handle(self._senders[peer], message, time.monotonic()))
            if isinstance(message, m.ServiceDown):
                self._forget_process(message.pid)
                if ARMED:
                    reach("microkernel.death.heard")
            if ARMED:
                reach("microkernel.handled")

    def deliver(self, deliveries: list[Delivery]) -> None:
        """Send these at the next `flush`."""
        self._outgoing += deliveries

    def flush(self, now: float) -> None:
        """Write down what happened, then tell everybody."""
        self.keeper.write(now)
        outgoing, self._outgoing = self._outgoing, []
        for effect, frame in outgoing:
            known = self._peers.get(effect.peer)
            if known is not None and not known[0].send_frame(known[1], frame):
                log.warning("%s to %s could not be queued", type(effect.message).__name__, known[1].name)
            if ARMED:
                reach("microkernel.sent.one")
        if ARMED and outgoing:
            reach("microkernel.sent.all")

    def _forget_process(self, pid: int) -> None:
        for peer in [peer for peer in self._senders if peer.pid == pid]:
            self._peers[self._senders[peer].peer][0].core.forget(peer)
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        """This connection is over; its listener knows."""
        sender = self._senders.pop(peer)
        del self._peers[sender.peer]
        self.deliver(self.recorder.peer_down(sender, time.monotonic()))

    # ------------------------------------------------------------ flight files

    def _answer_record(self, peer: Peer, message: m.RecordWrite) -> m.Message:
        """Gateways ask for administrators only."""
        try:
            if peer.role not in _RECORDS_FOR:
                raise PermissionRefused(f"role {peer.role!r} may not send RecordWrite")
            if not self.recorder.calls:
                raise Unavailable(
                    "nothing is recorded; microkernel.recorder_mib is 0 or too small", field="recorder_mib"
                )
            path, size = self._write(f"on request of {peer.name}")
        except OSError as error:
            return error_message(Unavailable(f"cannot write to {self.flights}: {error.strerror}"), message.req)
        except LlmosError as error:
            return error_message(error, message.req)
        return m.RecordWritten(message.req, str(path), self.recorder.calls, size)

    def _write(self, reason: str) -> tuple[Path, int]:
        wall = time.time()
        return write_flight(self.flights, self.recorder.file(reason, wall, time.monotonic()), wall)

    def __enter__(self) -> Shell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.recorder.calls:
            try:
                path, _ = self._write(describe_error(error))
                log.error("the flight recorder is in %s", path)
            except (OSError, MemoryError) as failure:
                log.error("the flight recorder could not be written: %s", failure)
        self.close()

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        self.keeper.close()


def write_flight(directory: Path, content: Iterable[bytes], wall: float) -> tuple[Path, int]:
    """A new file for its owner only, named by the time (UTC); the oldest go, so that `_MAX_FLIGHT_FILES` are kept."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(wall))
    with _new_file(directory, moment) as file:
        file.writelines(content)
        size = file.tell()
    for old in sorted(directory.glob(f"*{_FLIGHT_SUFFIX}"))[:-_MAX_FLIGHT_FILES]:
        old.unlink(missing_ok=True)
    return Path(file.name), size


def _new_file(directory: Path, stem: str) -> BinaryIO:
    for number in itertools.count():
        path = directory / f"{stem}{f'_{number:03}' if number else ''}{_FLIGHT_SUFFIX}"
        with contextlib.suppress(FileExistsError):
            return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))
    raise AssertionError("numbers do not end")


def _limits(config: MicrokernelConfig) -> tuple[KernelLimits, SchedulerLimits]:
    """What the configuration says, in the kernel's terms."""
    whole = KernelLimits(config.max_waiting, config.retention_s, config.idle_timeout_s, config.linger_s)
    scheduling = SchedulerLimits(
        max_rows=config.max_rows,
        max_step_tokens=config.max_step_tokens,
        steps_in_flight=config.steps_in_flight,
        client_window_tokens=config.client_window_tokens,
        prefix_cache=config.prefix_cache,
        share_prefixes=config.prefix_sharing == "all",
        policy=config.policy,
        ageing_s=config.ageing_s,
        target_step_s=config.target_step_ms / 1e3,
    )
    return whole, scheduling


def run(context: ServiceContext, lifeline: Lifeline) -> None:
    """Serve until asked to stop."""
    gc.disable()  # until everything of an earlier process is there again: all of it lives on
    config = context.config.microkernel
    models = tuple(model.name for model in context.config.models)
    kernel = Kernel(*_limits(config), models, secrets.randbits(128), time.monotonic())
    keeper = Keeper(kernel, open_journal(context), time.monotonic())
    recorder = Recorder(kernel, int(config.recorder_mib * 2**20))
    with Shell(context, recorder, keeper, state_dir(context.config.storage) / "flight") as shell:
        ports = PortSet(lifeline.port, *shell.listeners)
        if ARMED:
            reach("microkernel.start.ready")
        lifeline.ready(f"rows {config.max_rows}, token budget {config.max_step_tokens}, {keeper.summary}")
        gc.freeze()  # without a collection, which would look at all of it once
        gc.enable()
        _loop(shell, ports, lifeline)


def open_journal(context: ServiceContext) -> Journal | None:
    """Each run directory has its own, so that two daemons of one user do not mix."""
    config = context.config.microkernel
    if config.journal == "off":
        return None
    place = blake2b(str(context.run_dir.path).encode(), digest_size=6).hexdigest()
    directory = state_dir(context.config.storage) / "journal" / place
    reserve = int(config.journal_reserve_mib * 2**20)
    return Journal(directory, config.journal, config.journal_interval_ms / 1e3, reserve_bytes=reserve)


def _loop(shell: Shell, ports: PortSet, lifeline: Lifeline) -> None:
    recorder = shell.recorder
    turns = 0
    next_check = time.monotonic() + _CHECK_INTERVAL_S
    while not lifeline.stopping:
        ready = ports.wait(_IDLE_WAIT_S)
        lifeline.poll()
        for listener in shell.listeners:
            if listener in ready:
                shell.serve(listener)
        now = time.monotonic()
        shell.deliver(recorder.tick(now))
        shell.flush(now)
        turns += 1
        lifeline.beat(turns, now)
        if ARMED:
            reach("microkernel.beat")
        if not ready and now >= next_check:
            recorder.check(now)
            next_check = now + _CHECK_INTERVAL_S
        recorder.roll(now, idle=not ready)


def main() -> None:
    """Entry point of `python -m llmos.microkernel.main`."""
    service_main("microkernel", run)


if __name__ == "__main__":
    main()
