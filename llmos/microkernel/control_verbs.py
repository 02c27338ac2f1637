"""What people ask through gateways: ps, kill, nice, suspend, fork, wait, tenants. One function per message.

`owner` in a message is who asks (None: an administrator); a foreign sequence is answered exactly like an unknown one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from msgspec import structs

from llmos import __version__
from llmos.codes import FinishReason, PageFate
from llmos.errors import InvalidRequest, NotFound, Unavailable, WrongState
from llmos.microkernel import admission, report, service_verbs
from llmos.microkernel.sender import Sender
from llmos.microkernel.sequence import NO_ROW, NOBODY, Sequence
from llmos.microkernel.state import State
from llmos.microkernel.tenants import TenantLimits
from llmos.microkernel.verb_table import VerbTable
from llmos.protocol import checks
from llmos.protocol import messages as m

VERBS = VerbTable()

_TENANT_FIELDS = tuple(field.name for field in fields(TenantLimits))
_MAX_NAME = 100  # of what is quoted in an error
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2**63 children differ (Weyl sequence)
_SEED_MASK = 2**63 - 1


@VERBS.handles(m.PsGet)
def ps(state: State, sender: Sender, message: m.PsGet, now: float) -> None:
    rows = tuple(report.row(seq, now) for seq in state.sequences.values() if message.owner in (None, seq.owner))
    state.outbox.send(sender.peer, m.PsReply(message.req, rows))


@VERBS.handles(m.Stat)
def stat(state: State, sender: Sender, message: m.Stat, now: float) -> None:
    seq = state.known(message.rid, message.owner)
    state.outbox.send(sender.peer, report.stats(message.req, seq, now))


@VERBS.handles(m.Explain)
def explain(state: State, sender: Sender, message: m.Explain, now: float) -> None:
    seq = state.known(message.rid, message.owner)
    lane = state.lanes[seq.model]
    state.outbox.send(sender.peer, report.explain(message.req, seq, lane.tenants.get(seq.owner), now))


@VERBS.handles(m.StatusGet)
def status(state: State, sender: Sender, message: m.StatusGet, now: float) -> None:
    lanes = tuple(lane.status() for lane in state.lanes.values())
    uptime = (now - state.started_at) * 1e3
    state.outbox.send(sender.peer, m.StatusReply(message.req, __version__, uptime, lanes, state.services))


@VERBS.handles(m.MeasuresGet)
def measures(state: State, sender: Sender, message: m.MeasuresGet, now: float) -> None:
    lanes = tuple(lane.measures.report(lane.model) for lane in state.lanes.values())
    state.outbox.send(sender.peer, m.MeasuresReply(message.req, lanes))


@VERBS.handles(m.ModelsGet)
def models(state: State, sender: Sender, message: m.ModelsGet, now: float) -> None:
    """Storage knows."""
    if state.storage == NOBODY:
        raise Unavailable("the storage service is not there")
    state.outbox.send(state.storage, m.ModelsGet(state.relay(sender.peer, message.req)))


@VERBS.handles(m.Kill)
def kill(state: State, sender: Sender, message: m.Kill, now: float) -> None:
    checks.check_kill(message)
    if message.rid is not None:
        victims = [state.live(message.rid, message.owner)[0]]
    else:
        victims = list(_selected(state, message))
    for seq in victims:
        state.finish(seq, FinishReason.KILLED, now)
    state.outbox.send(sender.peer, m.Killed(message.req, tuple(seq.rid for seq in victims)))


def _selected(state: State, message: m.Kill) -> Iterator[Sequence]:
    job = None if message.job is None else state.known(message.job, message.owner, "job").job
    for seq in state.sequences.values():
        if (
            message.owner in (None, seq.owner)
            and message.tenant in (None, seq.owner)
            and message.model in (None, seq.model)
            and job in (None, seq.job)
        ):
            yield seq


@VERBS.handles(m.Close)
def close(state: State, sender: Sender, message: m.Close, now: float) -> None:
    seq, _ = state.live(message.rid, message.owner)
    if not seq.is_open:
        raise WrongState(f"sequence {seq.rid} is not open: it ends with its output", field="rid", rid=seq.rid)
    state.finish(seq, FinishReason.CLOSED, now)
    _done(state, sender, message.req, seq.rid)


@VERBS.handles(m.Nice)
def nice(state: State, sender: Sender, message: m.Nice, now: float) -> None:
    checks.check_nice(message.nice)
    seq, scheduler = state.live(message.rid, message.owner)
    seq.nice = message.nice
    state.note_change(seq)
    scheduler.residents.reorder(seq, now)
    _done(state, sender, message.req, seq.rid)


@VERBS.handles(m.Deadline)
def deadline(state: State, sender: Sender, message: m.Deadline, now: float) -> None:
    seq, scheduler = state.live(message.rid, message.owner)
    if not seq.generating:
        raise WrongState(f"sequence {seq.rid} is not generating", field="rid", rid=seq.rid)
    left = seq.max_len - len(seq.tokens)
    admission.check_deadline(message.deadline_ms, scheduler.least_time(0, left))
    seq.deadline = None if message.deadline_ms is None else now + message.deadline_ms / 1e3
    state.note_deadline(seq)
    state.note_change(seq)
    scheduler.residents.reorder(seq, now)
    _done(state, sender, message.req, seq.rid)


@VERBS.handles(m.Suspend)
def suspend(state: State, sender: Sender, message: m.Suspend, now: float) -> None:
    checks.check_page_fate(message.pages)
    seq, scheduler = state.live(message.rid, message.owner)
    scheduler.residents.suspend(seq, PageFate(message.pages), now)
    state.note_change(seq)
    _done(state, sender, message.req, seq.rid)


@VERBS.handles(m.Resume)
def resume(state: State, sender: Sender, message: m.Resume, now: float) -> None:
    seq, scheduler = state.live(message.rid, message.owner)
    scheduler.residents.resume(seq, now)
    state.note_change(seq)
    _done(state, sender, message.req, seq.rid)


@VERBS.handles(m.Fork)
def fork(state: State, sender: Sender, message: m.Fork, now: float) -> None:
    checks.check_fork(message.count)
    state.check_accepting()
    parent, scheduler = state.live(message.rid, message.owner)
    if parent.silent:
        raise WrongState(
            f"sequence {parent.rid} generates nothing that a fork could go on with", field="rid", rid=parent.rid
        )
    tenant = state.lanes[parent.model].tenants.get(parent.owner)
    if parent.has_work:
        admission.check_queues(scheduler, state.limits.max_waiting, tenant, message.count)
    children = [_child(state, parent, now) for _ in range(message.count)]
    for child in children:
        state.enter_fork(child, parent, scheduler, now)
    state.outbox.send(sender.peer, m.Forked(message.req, tuple(child.rid for child in children)))


def _child(state: State, parent: Sequence, now: float) -> Sequence:
    """The same tokens, turn and rights; a seed of its own, so that it goes another way."""
    parent.forks += 1
    seed = parent.params.seed
    assert seed is not None
    return Sequence(
        rid=state.next_rid(),
        owner=parent.owner,
        model=parent.model,
        reader=NOBODY,
        tokens=parent.tokens[:],
        prompt_len=parent.prompt_len,
        max_len=parent.max_len,
        params=structs.replace(
            parent.params, seed=(seed + parent.forks * _SEED_STEP) & _SEED_MASK, prompt_logprobs=None
        ),
        accepted_at=now,
        job=parent.job,
        parent=parent.rid,
        is_open=parent.is_open,
        nice=parent.nice,
        deadline=parent.deadline,
        generating=parent.generating,
        wants_prefill=parent.wants_prefill,
    )


@VERBS.handles(m.Wait)
def wait(state: State, sender: Sender, message: m.Wait, now: float) -> None:
    state.wait(state.known(message.rid, message.owner), sender.peer, message.req)


@VERBS.handles(m.After)
def after(state: State, sender: Sender, message: m.After, now: float) -> None:
    checks.check_after(message.after)
    seq, scheduler = state.live(message.rid, message.owner)
    if seq.started_at is not None or seq.kept_tokens or seq.row != NO_ROW:
        raise WrongState(f"sequence {seq.rid} has begun", field="rid", rid=seq.rid)
    state.jobs.hold(seq, state.predecessors(message.after, message.owner))
    state.note_change(seq)
    scheduler.residents.hold_back(seq, now)
    scheduler.residents.wake(seq, now)
    _done(state, sender, message.req, seq.rid)


@VERBS.handles(m.TenantsGet)
def tenants(state: State, sender: Sender, message: m.TenantsGet, now: float) -> None:
    rows = report.tenants(state.lanes.values(), message.owner)
    state.outbox.send(sender.peer, m.TenantsReply(message.req, rows))


@VERBS.handles(m.TenantSet)
def tenant_set(state: State, sender: Sender, message: m.TenantSet, now: float) -> None:
    checks.check_tenant_set(message)
    changes = {name: value for name in _TENANT_FIELDS if (value := getattr(message, name)) is not None}
    limits = replace(state.limits_of(message.tenant), **changes)
    limits.check()
    for lane in state.lanes.values():
        lane.check_tenant(message.tenant, limits)
    service_verbs.set_tenant(state, message.tenant, limits)
    rows = report.tenants(state.lanes.values(), message.tenant)
    state.outbox.send(sender.peer, m.TenantsReply(message.req, rows))


@VERBS.handles(m.RestartService)
def restart_service(state: State, sender: Sender, message: m.RestartService, now: float) -> None:
    """Handed on to the supervisor. Answered before, as it may be our own process, or the asking gateway's."""
    names = sorted(service.name for service in state.services)
    if state.supervisor == NOBODY or not names:
        raise Unavailable("the supervisor is not there")
    if message.name not in names:
        raise NotFound(f"no service {message.name[:_MAX_NAME]!r}; there are: {', '.join(names)}", field="name")
    _done(state, sender, message.req, 0)
    state.outbox.send(state.supervisor, message)


@VERBS.handles(m.RecordWrite)
def record(state: State, sender: Sender, message: m.RecordWrite, now: float) -> None:
    """The shell answers this before it comes here, if it records."""
    raise InvalidRequest("the flight recorder is off (microkernel.recorder_mib)", field="recorder_mib")


def _done(state: State, sender: Sender, req: int, rid: int) -> None:
    state.outbox.send(sender.peer, m.Done(req, rid))
