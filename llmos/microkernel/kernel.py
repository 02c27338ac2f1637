"""The microkernel as a pure state machine: `handle(sender, message, now) -> effects`, `tick(now) -> effects`.

No sockets, clock, threads, tensors or randomness of its own: time is an argument, seeds come from `draw_seed`, effects are messages
to peers. The thin shell in main.py connects it to ports; the simulation in the tests connects it to fake ones.

Rights are by role, checked before anything else: a gateway submits and ends sequences it submitted, an executor reports steps of its
own model, the supervisor reports services, storage answers about models. An error in one request is answered to its sender and
changes nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from heapq import heappop, heappush

from msgspec import structs

from llmos import __version__
from llmos.codes import FinishReason, SeqState
from llmos.errors import InvalidRequest, LlmosError, NotFound, PermissionRefused, Unavailable
from llmos.microkernel import admission, report
from llmos.microkernel.lane import Lane
from llmos.microkernel.limits import SchedulerLimits
from llmos.microkernel.outbox import Outbox, Send
from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import TenantLimits
from llmos.protocol import checks
from llmos.protocol import messages as m
from llmos.protocol.codec import unpack_i32

_TENANT_FIELDS = tuple(field.name for field in fields(TenantLimits))

_ALLOWED: dict[type, frozenset[str]] = {
    m.SeqSubmit: frozenset({"gateway"}),
    m.SeqCancel: frozenset({"gateway"}),
    m.SeqFinish: frozenset({"gateway"}),
    m.SeqAck: frozenset({"gateway"}),
    m.PsGet: frozenset({"gateway", "supervisor"}),
    m.Kill: frozenset({"gateway", "supervisor"}),
    m.StatusGet: frozenset({"gateway", "supervisor"}),
    m.ModelsGet: frozenset({"gateway", "supervisor"}),
    m.Nice: frozenset({"gateway", "supervisor"}),
    m.Suspend: frozenset({"gateway", "supervisor"}),
    m.Resume: frozenset({"gateway", "supervisor"}),
    m.Explain: frozenset({"gateway", "supervisor"}),
    m.TenantsGet: frozenset({"gateway", "supervisor"}),
    m.TenantSet: frozenset({"gateway", "supervisor"}),
    m.ModelsReply: frozenset({"storage"}),
    m.ExecutorReady: frozenset({"executor"}),
    m.StepResult: frozenset({"executor"}),
    m.ServiceReport: frozenset({"supervisor"}),
    m.ServiceDown: frozenset({"supervisor"}),
}


@dataclass(frozen=True, slots=True)
class Sender:
    """Who a message came from. `peer` is never reused."""

    peer: int
    role: str
    name: str


class Kernel:
    """Sequences, lanes and services of one daemon."""

    def __init__(
        self,
        limits: SchedulerLimits,
        max_waiting: int,
        models: tuple[str, ...],
        draw_seed: Callable[[], int],
        now: float,
    ) -> None:
        self.limits = limits
        self.max_waiting = max_waiting  # per model
        self.tenant_limits: dict[str, TenantLimits] = {}
        self.lanes = {model: self._new_lane(model) for model in models}
        self.sequences: dict[int, Sequence] = {}  # live ones only
        self.services: tuple[m.ServiceStatus, ...] = ()
        self.storage: int | None = None
        self._draw_seed = draw_seed
        self._started_at = now
        self._rids = itertools.count(1)
        self._relay_ids = itertools.count(1)
        self._relayed: dict[int, tuple[int, int]] = {}  # our request to storage -> (asking peer, its req)
        self._deadlines: list[tuple[float, int]] = []  # heap; entries of ended sequences stay until they surface
        self._outbox = Outbox()
        self._handlers: dict[type, Callable[[Sender, m.Message, float], None]] = {
            m.SeqSubmit: self._submit,
            m.SeqCancel: self._cancel,
            m.SeqFinish: self._stop_string,
            m.SeqAck: self._ack,
            m.PsGet: self._ps,
            m.Kill: self._kill,
            m.StatusGet: self._status,
            m.ModelsGet: self._models_get,
            m.Nice: self._nice,
            m.Suspend: self._suspend,
            m.Resume: self._resume,
            m.Explain: self._explain,
            m.TenantsGet: self._tenants_get,
            m.TenantSet: self._tenant_set,
            m.ModelsReply: self._models_reply,
            m.ExecutorReady: self._executor_ready,
            m.StepResult: self._step_result,
            m.ServiceReport: self._service_report,
            m.ServiceDown: self._service_down,
        }

    # ------------------------------------------------------------ entry points

    def handle(self, sender: Sender, message: m.Message, now: float) -> list[Send]:
        """Apply one message. Its sender's mistakes come back as an `Error` with the message's `req`."""
        try:
            if sender.role not in _ALLOWED[type(message)]:
                raise PermissionRefused(f"role {sender.role!r} may not send {type(message).__name__}")
            self._handlers[type(message)](sender, message, now)
        except LlmosError as error:
            req = getattr(message, "req", 0)
            self._outbox.send(sender.peer, m.Error(req, int(error.code), error.message, error.field, error.rid))
        return self._outbox.drain()

    def tick(self, now: float) -> list[Send]:
        """Issue every step that can be issued now; called after each batch of messages."""
        self._expire(now)
        for lane in self.lanes.values():
            while (plan := lane.plan(now)) is not None:
                assert lane.executor is not None
                self._outbox.send(lane.executor, plan)
        return self._outbox.drain()

    # ------------------------------------------------------------ gateway

    def _submit(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.SeqSubmit)
        lane = self._lane(message.model)
        scheduler, executor = lane.up()
        tokens = unpack_i32(message.prompt)
        admission.check_prompt(tokens, executor.vocab_size)
        admission.check_params(message.params)
        checks.check_nice(message.nice)
        tenant = lane.tenants.get(message.owner)
        pages = min(tenant.limits.max_pages, executor.num_pages - lane.tenants.guaranteed_to_others(tenant))
        room = admission.longest_output(len(tokens), message.params, executor, pages)
        admission.check_queue(len(scheduler.queue), self.max_waiting)
        admission.check_tenant_queue(tenant)
        steps = room + len(tokens) // scheduler.limits.max_step_tokens
        admission.check_deadline(message.deadline_ms, steps * lane.step_s)
        params = message.params
        if params.seed is None:
            params = structs.replace(params, seed=self._draw_seed())
        rid = next(self._rids)
        seq = Sequence(
            rid=rid,
            owner=message.owner,
            model=message.model,
            gateway=sender.peer,
            client_request_id=message.client_request_id,
            tokens=tokens,
            prompt_len=len(tokens),
            max_len=len(tokens) + room,
            params=params,
            accepted_at=now,
            nice=message.nice,
            deadline=None if message.deadline_ms is None else now + message.deadline_ms / 1e3,
        )
        self.sequences[rid] = seq
        if seq.deadline is not None:
            heappush(self._deadlines, (seq.deadline, rid))
        scheduler.residents.submit(seq, now)
        self._outbox.send(sender.peer, m.SeqAccepted(message.req, rid))

    def _cancel(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.SeqCancel)
        if message.reason not in (FinishReason.CANCELLED, FinishReason.TOKENIZER_FAILED):
            raise InvalidRequest(f"reason {message.reason} is not for gateways", field="reason")
        seq = self.sequences.get(message.rid)
        if seq is not None and seq.gateway == sender.peer:  # idempotent: it may have ended meanwhile
            self._finish(seq, FinishReason(message.reason), now)

    def _stop_string(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.SeqFinish)
        seq = self.sequences.get(message.rid)
        if seq is None or seq.gateway != sender.peer:
            return
        if not 0 <= message.upto <= seq.num_output:
            raise InvalidRequest(f"upto {message.upto} is outside [0, {seq.num_output}]", field="upto", rid=seq.rid)
        self._finish(seq, FinishReason.STOP, now, num_output=message.upto)

    def _ack(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.SeqAck)
        seq = self.sequences.get(message.rid)
        if seq is not None and seq.gateway == sender.peer:
            seq.acked = max(seq.acked, min(message.upto, seq.num_output))
            scheduler = self.lanes[seq.model].scheduler
            if scheduler is not None:
                scheduler.rows.read(seq)

    # ------------------------------------------------------------ control

    def _ps(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.PsGet)
        rows = tuple(report.row(seq, now) for seq in self.sequences.values() if message.owner in (None, seq.owner))
        self._outbox.send(sender.peer, m.PsReply(message.req, rows))

    def _kill(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.Kill)
        seq, _ = self._own(message.rid, message.owner)
        self._finish(seq, FinishReason.KILLED, now)
        self._outbox.send(sender.peer, m.Killed(message.req, seq.rid))

    def _nice(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.Nice)
        checks.check_nice(message.nice)
        seq, scheduler = self._own(message.rid, message.owner)
        scheduler.residents.renice(seq, message.nice, now)
        self._outbox.send(sender.peer, m.Done(message.req, seq.rid))

    def _suspend(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.Suspend)
        seq, scheduler = self._own(message.rid, message.owner)
        scheduler.residents.suspend(seq, message.keep_pages, now)
        self._outbox.send(sender.peer, m.Done(message.req, seq.rid))

    def _resume(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.Resume)
        seq, scheduler = self._own(message.rid, message.owner)
        scheduler.residents.resume(seq, now)
        self._outbox.send(sender.peer, m.Done(message.req, seq.rid))

    def _explain(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.Explain)
        seq, _ = self._own(message.rid, message.owner)
        self._outbox.send(sender.peer, report.explain(message.req, seq, now))

    def _tenants_get(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.TenantsGet)
        self._outbox.send(sender.peer, m.TenantsReply(message.req, report.tenants(self.lanes.values(), message.owner)))

    def _tenant_set(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.TenantSet)
        checks.check_tenant_set(message)
        old = self.tenant_limits.get(message.tenant, TenantLimits())
        changes = {name: value for name in _TENANT_FIELDS if (value := getattr(message, name)) is not None}
        limits = replace(old, **changes)
        limits.check()
        for lane in self.lanes.values():
            lane.check_tenant(message.tenant, limits)
        self.tenant_limits[message.tenant] = limits
        for lane in self.lanes.values():
            lane.tenants.get(message.tenant)
            lane.tenants.refresh()
        self._outbox.send(sender.peer, m.TenantsReply(message.req, report.tenants(self.lanes.values(), message.tenant)))

    def _status(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.StatusGet)
        lanes = tuple(lane.status() for lane in self.lanes.values())
        uptime = (now - self._started_at) * 1e3
        self._outbox.send(sender.peer, m.StatusReply(message.req, __version__, uptime, lanes, self.services))

    def _models_get(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.ModelsGet)
        if self.storage is None:
            raise Unavailable("the storage service is not there")
        relay = next(self._relay_ids)
        self._relayed[relay] = (sender.peer, message.req)
        self._outbox.send(self.storage, m.ModelsGet(relay))

    def _models_reply(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.ModelsReply)
        asked = self._relayed.pop(message.req, None)
        if asked is not None:
            self._outbox.send(asked[0], m.ModelsReply(asked[1], message.models))

    # ------------------------------------------------------------ services

    def greet(self, sender: Sender) -> list[Send]:
        """A peer said hello. Storage is remembered, and told what is being served."""
        if sender.role == "storage":
            self.storage = sender.peer
            for lane in self.lanes.values():
                if lane.ready:
                    self._outbox.send(sender.peer, m.ModelState(lane.model, "serving"))
        return self._outbox.drain()

    def _executor_ready(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.ExecutorReady)
        if min(message.num_pages, message.page_size, message.max_rows, message.max_step_tokens, message.vocab_size) < 1:
            raise InvalidRequest(
                "an executor needs at least one page, row, token and vocabulary entry", field="num_pages"
            )
        lane = self.lanes.setdefault(message.model, self._new_lane(message.model))
        lane.attach(sender.peer, message, now)
        self._outbox.send(sender.peer, m.ExecutorWelcome(lane.generation))
        self._tell_storage(lane.model, "serving")

    def _step_result(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.StepResult)
        lane = next((lane for lane in self.lanes.values() if lane.executor == sender.peer), None)
        outcome = lane.take(message, now) if lane is not None else None
        if outcome is None:
            return
        self._outbox.tokens(outcome, message.logprobs)
        for seq, reason in outcome.ended:
            self._finish(seq, reason, now)

    def _service_report(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.ServiceReport)
        self.services = message.services

    def _service_down(self, sender: Sender, message: m.Message, now: float) -> None:
        assert isinstance(message, m.ServiceDown)
        if message.role == "executor":
            self._executor_down(message.name.removeprefix("executor."), now)
        elif message.role == "storage":
            self.storage = None
            for peer, req in self._relayed.values():
                error = Unavailable("the storage service died")
                self._outbox.send(peer, m.Error(req, int(error.code), error.message))
            self._relayed.clear()

    def peer_down(self, peer: int, now: float) -> list[Send]:
        """A connection is gone for good (its process was reaped): end what it submitted."""
        for seq in [seq for seq in self.sequences.values() if seq.gateway == peer]:
            self._finish(seq, FinishReason.CANCELLED, now)
        self._outbox.forget(peer)
        return self._outbox.drain()

    def _executor_down(self, model: str, now: float) -> None:
        lane = self.lanes.get(model)
        if lane is None:
            return
        for seq in lane.detach(now):
            seq.move(SeqState.FINISHED, now)
            self._end(seq, FinishReason.EXECUTOR_LOST, now)
        self._tell_storage(model, "failed")

    # ------------------------------------------------------------ helpers

    def _own(self, rid: int, owner: str | None) -> tuple[Sequence, Scheduler]:
        """A live sequence that `owner` may touch, and the scheduler it is with. A foreign one is answered like an unknown one."""
        seq = self.sequences.get(rid)
        if seq is None or owner not in (None, seq.owner):
            raise NotFound(f"no sequence {rid}", field="rid", rid=rid)
        scheduler = self.lanes[seq.model].scheduler
        assert scheduler is not None, "sequences live only in lanes that are up"
        return seq, scheduler

    def _expire(self, now: float) -> None:
        """End sequences that still wait for their first row at their deadline. One that has begun goes on, and counts as a miss."""
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = self.sequences.get(heappop(self._deadlines)[1])
            if seq is not None and seq.started_at is None:
                self._finish(seq, FinishReason.DEADLINE, now)

    def _new_lane(self, model: str) -> Lane:
        return Lane(model, self.limits, lambda name: self.tenant_limits.get(name, TenantLimits()))

    def _lane(self, model: str) -> Lane:
        lane = self.lanes.get(model)
        if lane is None:
            raise NotFound(f"no model {model!r}; served: {', '.join(sorted(self.lanes))}", field="model")
        return lane

    def _tell_storage(self, model: str, state: str) -> None:
        if self.storage is not None:
            self._outbox.send(self.storage, m.ModelState(model, state))

    def _finish(self, seq: Sequence, reason: FinishReason, now: float, num_output: int | None = None) -> None:
        """End a live sequence of a lane that is up."""
        scheduler = self.lanes[seq.model].scheduler
        assert scheduler is not None
        scheduler.residents.finish(seq, reason, now)
        self._end(seq, reason, now, num_output)

    def _end(self, seq: Sequence, reason: FinishReason, now: float, num_output: int | None = None) -> None:
        """The one terminal record of a sequence."""
        del self.sequences[seq.rid]
        usage = seq.usage(now)
        if num_output is not None:
            usage = structs.replace(usage, output_tokens=num_output)
        self._outbox.end(seq.gateway, m.SeqEnd(seq.rid, int(reason), usage))

    def check(self) -> None:
        """Assert all invariants; O(everything)."""
        for lane in self.lanes.values():
            if lane.scheduler is not None:
                lane.scheduler.residents.check()
        live = [seq for lane in self.lanes.values() if lane.scheduler for seq in lane.scheduler.residents.live()]
        assert sorted(seq.rid for seq in live) == sorted(self.sequences), "a sequence is lost or held twice"
