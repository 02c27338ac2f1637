"""The microkernel's process: the thin, impure shell around `kernel.Kernel`.

One loop: wait for any port, hand each message to the kernel, send its effects, plan steps, beat. It blocks only in the poller, and
never on a peer: a send that can not be queued is counted and dropped (sequences survive that, see kernel.py). Control messages are
served before tokens. Every `_CHECK_INTERVAL_S` while idle the invariants are asserted; a violation ends the process.
"""

from __future__ import annotations

import gc
import itertools
import logging
import secrets
import time
from typing import Any

from llmos.config import MicrokernelConfig
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.limits import KernelLimits, SchedulerLimits
from llmos.microkernel.outbox import Send
from llmos.microkernel.sender import Sender
from llmos.ports.core import Peer
from llmos.ports.lifeline import Lifeline
from llmos.ports.sync import Listener, PortSet
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema
from llmos.services.base import ServiceContext, service_main

log = logging.getLogger(__name__)

_ROLES = frozenset({"gateway", "executor", "storage", "supervisor"})
_IDLE_WAIT_S = 0.1
_CHECK_INTERVAL_S = 5.0
_MAX_MESSAGES_PER_TURN = 256  # per port, so that one busy peer can not keep the others from being served


class Shell:
    """Connects the pure kernel to its two listeners. Peers get numbers that are unique over both."""

    def __init__(self, context: ServiceContext, kernel: Kernel) -> None:
        self.kernel = kernel
        schema: Schema[Any] = Schema(m.ToKernel)
        incarnation = secrets.randbits(32)
        names = ("kernel-control", "kernel")
        self.listeners = [Listener(context.run_dir, name, schema, _ROLES, incarnation=incarnation) for name in names]
        self._numbers = itertools.count(1)
        self._peers: dict[int, tuple[Listener[Any], Peer]] = {}
        self._senders: dict[Peer, Sender] = {}
        for listener in self.listeners:
            listener.core.on_greet = lambda peer, listener=listener: self._greet(listener, peer)

    def _greet(self, listener: Listener[Any], peer: Peer) -> None:
        sender = Sender(next(self._numbers), peer.role, peer.name)
        self._senders[peer] = sender
        self._peers[sender.peer] = (listener, peer)
        self.deliver(self.kernel.greet(sender, time.monotonic()))

    def serve(self, listener: Listener[Any]) -> None:
        """Handle what has arrived on one port."""
        for _ in range(_MAX_MESSAGES_PER_TURN):
            received = listener.receive()
            if received is None:
                return
            peer, message = received
            self.deliver(self.kernel.handle(self._senders[peer], message, time.monotonic()))
            if isinstance(message, m.ServiceDown):
                self._forget_process(message.pid)

    def deliver(self, effects: list[Send]) -> None:
        for effect in effects:
            known = self._peers.get(effect.peer)
            if known is not None and not known[0].send(known[1], effect.message):
                log.warning("%s to %s could not be queued", type(effect.message).__name__, known[1].name)

    def _forget_process(self, pid: int) -> None:
        for peer, sender in list(self._senders.items()):
            if peer.pid == pid:
                listener = self._peers.pop(sender.peer)[0]
                del self._senders[peer]
                listener.core.forget(peer)
                self.deliver(self.kernel.peer_down(sender.peer, time.monotonic()))

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


def _limits(config: MicrokernelConfig) -> tuple[KernelLimits, SchedulerLimits]:
    """What the configuration says, in the kernel's terms."""
    whole = KernelLimits(config.max_waiting, config.retention_s, config.idle_timeout_s)
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
    config = context.config.microkernel
    models = tuple(model.name for model in context.config.models)
    kernel = Kernel(*_limits(config), models, secrets.randbits(128), time.monotonic())
    shell = Shell(context, kernel)
    ports = PortSet(lifeline.port, *shell.listeners)
    lifeline.ready(f"rows {config.max_rows}, token budget {config.max_step_tokens}")
    gc.collect()
    gc.freeze()
    turns = 0
    next_check = time.monotonic() + _CHECK_INTERVAL_S
    while not lifeline.stopping:
        ready = ports.wait(_IDLE_WAIT_S)
        lifeline.poll()
        for listener in shell.listeners:
            if listener in ready:
                shell.serve(listener)
        now = time.monotonic()
        shell.deliver(kernel.tick(now))
        turns += 1
        lifeline.beat(turns, now)
        if not ready and now >= next_check:
            kernel.check()
            next_check = now + _CHECK_INTERVAL_S
    shell.close()


def main() -> None:
    """Entry point of `python -m llmos.microkernel.main`."""
    service_main("microkernel", run)


if __name__ == "__main__":
    main()
