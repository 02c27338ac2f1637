"""The microkernel as a pure state machine: `handle(sender, message, now) -> effects`, `tick(now) -> effects`.

No sockets, clock, threads, tensors or randomness: time is an argument, effects are messages to peers, so the same calls give the same
effects. The thin shell in main.py connects it to ports; the simulation in the tests connects it to fake ones.

Rights are by role, checked before anything else: a gateway submits, reads and ends sequences, an executor reports steps of its own
model, the supervisor reports services, storage answers about models and tenants. An error in one request is answered to its sender and
changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop

from llmos.codes import FinishReason
from llmos.errors import LlmosError, PermissionRefused
from llmos.microkernel import control_verbs, sequence_verbs, service_verbs
from llmos.microkernel.limits import KernelLimits, SchedulerLimits
from llmos.microkernel.outbox import Send
from llmos.microkernel.sender import Sender
from llmos.microkernel.sequence import NOBODY
from llmos.microkernel.state import State
from llmos.microkernel.verb_table import VerbTable
from llmos.protocol import messages as m
from llmos.protocol.failures import error_message

_PEOPLE = frozenset({"gateway", "supervisor"})
_TABLES: tuple[tuple[frozenset[str], VerbTable], ...] = (
    (frozenset({"gateway"}), sequence_verbs.VERBS),
    (_PEOPLE, control_verbs.VERBS),
    (frozenset({"executor"}), service_verbs.EXECUTOR_VERBS),
    (frozenset({"storage"}), service_verbs.STORAGE_VERBS),
    (frozenset({"supervisor"}), service_verbs.SUPERVISOR_VERBS),
)
_HANDLERS = {kind: (roles, handler) for roles, table in _TABLES for kind, handler in table.handlers.items()}


class Kernel:
    """Entry points. `seed_root`: 128 bits of chance, the seeds of sequences that bring none come from it."""

    def __init__(
        self, limits: KernelLimits, scheduling: SchedulerLimits, models: Iterable[str], seed_root: int, now: float
    ) -> None:
        self.state = State(limits, scheduling, models, seed_root, now)

    def handle(self, sender: Sender, message: m.Message, now: float) -> list[Send]:
        """Apply one message. Its sender's mistakes come back as an `Error` with the message's `req`."""
        roles, handler = _HANDLERS[type(message)]
        try:
            if sender.role not in roles:
                raise PermissionRefused(f"role {sender.role!r} may not send {type(message).__name__}")
            handler(self.state, sender, message, now)
        except LlmosError as error:
            self.state.outbox.send(sender.peer, error_message(error, getattr(message, "req", 0)))
        return self._effects(now)

    def tick(self, now: float) -> list[Send]:
        """Issue every step that can be issued now; called after each batch of messages."""
        state = self.state
        self._pass_deadlines(now)
        state.expire(now)
        state.settle(now)
        for lane in state.lanes.values():
            if state.supervisor != NOBODY and (reason := lane.overdue(now)) is not None:
                service_verbs.have_killed(state, lane, reason)
            while (plan := lane.plan(now)) is not None:
                assert lane.executor is not None
                state.outbox.send(lane.executor, plan)
        return state.outbox.drain()

    def greet(self, sender: Sender, now: float) -> list[Send]:
        """A peer said hello."""
        if sender.role == "storage":
            service_verbs.storage_came(self.state, sender)
        elif sender.role == "supervisor":
            service_verbs.supervisor_came(self.state, sender)
        return self._effects(now)

    def peer_down(self, peer: int, now: float) -> list[Send]:
        """A connection is gone for good (its process was reaped). What it read goes on, and may be read by somebody else."""
        state = self.state
        for seq in [seq for seq in state.sequences.values() if seq.reader == peer]:
            if seq.is_open:
                state.read_by(seq, NOBODY, now)
            else:
                state.orphan(seq, now)
        state.settle(now)
        state.forget_requests(peer)
        state.outbox.forget(peer)
        return state.outbox.drain()

    def check(self) -> None:
        """Assert all invariants; O(everything)."""
        self.state.check()

    def _effects(self, now: float) -> list[Send]:
        self.state.settle(now)
        return self.state.outbox.drain()

    def _pass_deadlines(self, now: float) -> None:
        """End turns that still wait for their first row at their deadline. One that has begun goes on, and counts as a miss."""
        state = self.state
        while state.deadlines and state.deadlines[0][0] <= now:
            moment, rid = heappop(state.deadlines)
            seq = state.sequences.get(rid)
            if seq is not None and seq.deadline == moment and seq.started_at is None and seq.generating:
                state.end_output(seq, FinishReason.DEADLINE, now)
