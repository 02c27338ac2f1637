"""What executors, storage and the supervisor say. One function per message."""

from __future__ import annotations

from dataclasses import asdict

from llmos.codes import FinishReason, SeqState
from llmos.errors import NotFound, PermissionRefused, Unavailable
from llmos.microkernel.lane import Lane
from llmos.microkernel.records import ExecutorRecord, TokensRecord
from llmos.microkernel.sender import Sender
from llmos.microkernel.sequence import NOBODY
from llmos.microkernel.state import State
from llmos.microkernel.tenants import TenantLimits
from llmos.microkernel.verb_table import VerbTable
from llmos.protocol import checks
from llmos.protocol import messages as m

EXECUTOR_VERBS = VerbTable()
STORAGE_VERBS = VerbTable()
SUPERVISOR_VERBS = VerbTable()


@EXECUTOR_VERBS.handles(m.ExecutorReady)
def executor_ready(state: State, sender: Sender, message: m.ExecutorReady, now: float) -> None:
    checks.check_executor(message)
    lane = state.lanes.get(message.model)
    if lane is None:
        raise NotFound(f"model {message.model!r} is not configured", field="model")
    if sender.name != f"executor.{message.model}":
        raise PermissionRefused(f"{sender.name!r} is not the executor of {message.model!r}", field="model")
    if state.supervisor != NOBODY and lane.doubt is not None:
        raise Unavailable(f"the executor that was there before is not dead yet, which it will be: {lane.doubt}")
    lane.attach(sender.peer, message, now, sender.pid)
    state.refit(lane, now)
    state.note(ExecutorRecord(message))
    state.outbox.send(sender.peer, m.ExecutorWelcome(lane.generation))
    _tell_storage(state, lane.model, "serving")


@EXECUTOR_VERBS.handles(m.StepResult)
def step_result(state: State, sender: Sender, message: m.StepResult, now: float) -> None:
    lane = next((lane for lane in state.lanes.values() if lane.executor == sender.peer), None)
    outcome = lane.take(message, now) if lane is not None else None
    if outcome is None:
        return
    if outcome.results:
        state.outbox.results(outcome.results)
    columns = state.outbox.tokens(outcome, message.logprobs)
    if columns:
        state.note(TokensRecord(columns))
    for seq, reason in outcome.ended:
        state.end_output(seq, reason, now)


def have_killed(state: State, lane: Lane, reason: str) -> None:
    """Of its executor nothing good is to be expected. What follows is its death, as of any other."""
    state.outbox.send(state.supervisor, m.KillService(f"executor.{lane.model}", reason))


@STORAGE_VERBS.handles(m.ModelsReply)
def models_reply(state: State, sender: Sender, message: m.ModelsReply, now: float) -> None:
    asked = state.relayed.pop(message.req, None)
    if asked is not None:
        state.outbox.send(asked[0], m.ModelsReply(asked[1], message.models))


@STORAGE_VERBS.handles(m.TenantsStored)
def tenants_stored(state: State, sender: Sender, message: m.TenantsStored, now: float) -> None:
    """Limits of earlier lives. What was set in this life is newer: storage is told. They hold, even if more is in use."""
    stored = {row.tenant: _limits(row) for row in message.tenants}
    for name, limits in state.tenant_limits.items():
        if stored.get(name) != limits:
            _store(state, name, limits)
    state.tenant_limits = stored | state.tenant_limits
    for lane in state.lanes.values():
        lane.tenants.refresh()
        lane.tenants.meet(stored)
        if lane.scheduler is not None:
            state.refit(lane, now)


def set_tenant(state: State, name: str, limits: TenantLimits) -> None:
    """New limits hold from now on, and are stored if storage is there; else when it comes."""
    state.tenant_limits[name] = limits
    for lane in state.lanes.values():
        lane.tenants.get(name)
        lane.tenants.refresh()
    if state.storage != NOBODY:
        _store(state, name, limits)


def supervisor_came(state: State, sender: Sender) -> None:
    state.supervisor = sender.peer


def storage_came(state: State, sender: Sender) -> None:
    """Storage is remembered, and told what is being served."""
    state.storage, state.storage_pid = sender.peer, sender.pid
    for lane in state.lanes.values():
        if lane.ready:
            _tell_storage(state, lane.model, "serving")


@SUPERVISOR_VERBS.handles(m.ServiceReport)
def service_report(state: State, sender: Sender, message: m.ServiceReport, now: float) -> None:
    state.services = message.services


@SUPERVISOR_VERBS.handles(m.ServiceDown)
def service_down(state: State, sender: Sender, message: m.ServiceDown, now: float) -> None:
    if message.role == "executor":
        _executor_down(state, message, now)
    elif message.role == "storage" and not _is_older(message.pid, state.storage_pid):
        state.storage = NOBODY
        error = Unavailable("the storage service died")
        for peer, req in state.relayed.values():
            state.outbox.send(peer, m.Error(req, int(error.code), error.message))
        state.relayed.clear()


@SUPERVISOR_VERBS.handles(m.Drain)
def drain(state: State, sender: Sender, message: m.Drain, now: float) -> None:
    state.draining = True
    generating = sum(
        seq.generating and seq.state is not SeqState.SUSPENDED and not seq.held_back for seq in state.sequences.values()
    )
    state.outbox.send(sender.peer, m.Draining(generating, (now - state.quiet_since) * 1e3))


def _executor_down(state: State, message: m.ServiceDown, now: float) -> None:
    model = message.name.removeprefix("executor.")
    lane = state.lanes.get(model)
    if lane is None or (lane.executor is not None and _is_older(message.pid, lane.executor_pid)):
        return
    if message.replaced:
        convicted = lane.lose(now, to_blame=not message.asked)
        if convicted is not None:
            state.finish(convicted, FinishReason.POISONED, now)
        _tell_storage(state, model, "available")
        return
    for seq in lane.give_up(now):
        seq.move(SeqState.FINISHED, now)
        state.close_record(seq, FinishReason.EXECUTOR_LOST, now)
    _tell_storage(state, model, "failed")


def _is_older(dead: int, here: int) -> bool:
    """Is the one that died the predecessor of the one that is here? A microkernel that died as well hears of deaths late."""
    return here not in (0, dead)


def _tell_storage(state: State, model: str, word: str) -> None:
    if state.storage != NOBODY:
        state.outbox.send(state.storage, m.ModelState(model, word))


def _store(state: State, name: str, limits: TenantLimits) -> None:
    state.outbox.send(state.storage, m.TenantStore(m.TenantLimitsRow(name, **asdict(limits))))


def _limits(row: m.TenantLimitsRow) -> TenantLimits:
    return TenantLimits(
        row.weight, row.max_pages, row.guaranteed_pages, row.max_running, row.max_waiting, row.tokens_per_s
    )
