"""Events that owners and administrators ask for: kill, nice, suspend, after, wait, tenants' limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmos.codes import FinishReason, PageFate, SeqState
from llmos.microkernel.sequence import NO_ROW
from llmos.protocol import messages as m
from llmos.protocol.limits import MAX_NICE, MIN_NICE
from simulation.before import Before
from simulation.ledger import INVALID, WRONG, Problem
from simulation.verbs import all_known_as, deadline_problems, known_as, sequence, verb
from simulation.world import World

# ------------------------------------------------------------ what owners ask for


@verb
def kill(world: World, before: Before, number: int, *, gate: str, seq: str, owner: str | None = None) -> None:
    known = known_as(world, seq)
    if known is None:
        return
    must = world.ledger.live_problems(known, owner)
    if not must:
        before.causes[known.rid] = FinishReason.KILLED
    answer = world.ask(world.gates[gate], m.Kill(world.next_req(), known.rid, owner), must)
    assert answer is None or answer.rids == (known.rid,)


@verb
def kill_many(
    world: World, before: Before, number: int, *, gate: str, tenant: str | None = None, job: str | None = None,
    model: str | None = None, owner: str | None = None,
) -> None:  # fmt: skip
    root = known_as(world, job)
    if job is not None and root is None:
        return
    must = world.ledger.known_problems(root, owner, "job") if root is not None else set()
    if tenant is job is model is None:
        must.add((INVALID, "rid"))
    victims = [
        known.rid
        for known in world.ledger.live.values()
        if owner in (None, known.owner) and tenant in (None, known.owner) and model in (None, known.model)
        and (root is None or known.job == root.job)
    ]  # fmt: skip
    if not must:
        before.causes |= dict.fromkeys(victims, FinishReason.KILLED)
    message = m.Kill(world.next_req(), None, owner, tenant, root and root.rid, model)
    answer = world.ask(world.gates[gate], message, must)
    assert answer is None or sorted(answer.rids) == sorted(victims)


def _done(world: World, gate: str, message: Any, must: set[Problem], may: set[Problem] = frozenset()) -> bool:
    answer = world.ask(world.gates[gate], message, must, may)
    assert answer is None or answer == m.Done(message.req, message.rid)
    return answer is not None


@verb
def close(world: World, before: Before, number: int, *, gate: str, seq: str, owner: str | None = None) -> None:
    known = known_as(world, seq)
    if known is None:
        return
    must = world.ledger.live_problems(known, owner)
    if not must and not known.is_open:
        must.add((WRONG, "rid"))
    if not must:
        before.causes[known.rid] = FinishReason.CLOSED
    _done(world, gate, m.Close(world.next_req(), known.rid, owner), must)


@verb
def nice(
    world: World, before: Before, number: int, *, gate: str, seq: str, nice: int, owner: str | None = None
) -> None:
    known = known_as(world, seq)
    if known is None:
        return
    must = world.ledger.live_problems(known, owner)
    if not MIN_NICE <= nice <= MAX_NICE:
        must.add((INVALID, "nice"))
    if _done(world, gate, m.Nice(world.next_req(), known.rid, nice, owner), must):
        known.nice = nice


@verb
def deadline(
    world: World,
    before: Before,
    number: int,
    *,
    gate: str,
    seq: str,
    deadline_ms: float | None,
    owner: str | None = None,
) -> None:
    known = known_as(world, seq)
    if known is None:
        return
    must, may = deadline_problems(deadline_ms, world.setup.max_context)
    must |= world.ledger.live_problems(known, owner)
    if known.reason is None and not known.generating:
        must.add((WRONG, "rid"))
    if _done(world, gate, m.Deadline(world.next_req(), known.rid, deadline_ms, owner), must, may):
        known.deadline = None if deadline_ms is None else world.now + deadline_ms / 1e3


@verb
def suspend(
    world: World, before: Before, number: int, *, gate: str, seq: str, pages: int, owner: str | None = None
) -> None:
    known = known_as(world, seq)
    if known is None:
        return
    must = world.ledger.live_problems(known, owner)
    if pages not in set(PageFate):
        must.add((INVALID, "pages"))
    if _done(world, gate, m.Suspend(world.next_req(), known.rid, pages, owner), must):
        known.suspended = True
        if pages != PageFate.KEEP:
            assert not sequence(world, known).page_table, f"{known.label} was to give its pages back"


@verb
def resume(world: World, before: Before, number: int, *, gate: str, seq: str, owner: str | None = None) -> None:
    known = known_as(world, seq)
    if known is None:
        return
    must = world.ledger.live_problems(known, owner)
    if _done(world, gate, m.Resume(world.next_req(), known.rid, owner), must):
        known.suspended = False


@verb
def after(
    world: World, before: Before, number: int, *, gate: str, seq: str, after: Any, owner: str | None = None
) -> None:
    known = known_as(world, seq)
    if known is None:
        return
    first = all_known_as(world, after)
    must = world.ledger.live_problems(known, owner)
    if not must:
        found = sequence(world, known)
        if found.started_at is not None or found.kept_tokens or found.row != NO_ROW:
            must.add((WRONG, "rid"))
        must |= world.ledger.after_problems(first, owner)
        if world.ledger.would_wait_for_itself(known, first):
            must.add((INVALID, "after"))
    message = m.After(world.next_req(), known.rid, tuple(other.rid for other in first), owner)
    if _done(world, gate, message, must):
        known.after = {other.rid for other in first if other.reason is None}
        assert not known.after or sequence(world, known).state in (SeqState.BLOCKED, SeqState.SUSPENDED)


@verb
def wait(world: World, before: Before, number: int, *, gate: str, seq: str, owner: str | None = None) -> None:
    known = known_as(world, seq)
    if known is None:
        return
    must, sender = world.ledger.known_problems(known, owner), world.gates[gate]
    message = m.Wait(world.next_req(), known.rid, owner)
    if not must:
        world.waits[sender.peer, message.req] = known
    world.ask(sender, message, must)


@verb
def tenant(world: World, before: Before, number: int, *, gate: str, name: str, change: dict[str, Any]) -> None:
    limits = replace(world.ledger.limits_of(name), **change)
    must: set[Problem] = set()
    if limits.guaranteed_pages > limits.max_pages:
        must.add((INVALID, "guaranteed_pages"))
    for model in world.setup.models:
        must |= _limit_problems(world, model, name, limits)
    answer = world.ask(world.gates[gate], m.TenantSet(world.next_req(), name, **change), must)
    if answer is None:
        return
    world.ledger.limits[name] = limits
    before.limits_changed = True
    assert {(row.tenant, row.model) for row in answer.tenants} == {(name, model) for model in world.setup.models}
    assert all(getattr(row, field) == value for row in answer.tenants for field, value in vars_of(limits).items())


def vars_of(limits: Any) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in limits.__dataclass_fields__}


def _limit_problems(world: World, model: str, name: str, limits: Any) -> set[Problem]:
    """Why new limits contradict what lives on a model."""
    scheduler = world.scheduler(model)
    if scheduler is None:
        return set()
    problems: set[Problem] = set()
    old, tenant = world.ledger.limits_of(name), scheduler.tenants.get(name)
    num_pages, others = world.shapes[model][0], world.ledger.guaranteed_to_others(name)
    more = limits.guaranteed_pages > old.guaranteed_pages
    if more and limits.guaranteed_pages + others > num_pages:
        problems.add((INVALID, "guaranteed_pages"))
    problems |= {(INVALID, "max_running")} if limits.max_running < min(old.max_running, tenant.running) else set()
    problems |= {(INVALID, "max_pages")} if limits.max_pages < min(old.max_pages, tenant.pages) else set()
    if not more and limits.max_pages >= old.max_pages:
        return problems
    for known in world.ledger.live.values():
        if known.model == model:
            need = scheduler.holdings.pages_for(sequence(world, known).max_len)
            if known.owner == name and need > min(limits.max_pages, num_pages - others):
                problems.add((INVALID, "max_pages"))
            left = world.ledger.guaranteed_to_others(known.owner) - old.guaranteed_pages
            if known.owner != name and need > num_pages - left - limits.guaranteed_pages:
                problems.add((INVALID, "guaranteed_pages"))
    return problems
