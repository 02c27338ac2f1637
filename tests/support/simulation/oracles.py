"""What must hold after every event, whatever it was: each sequence is where it may be (fates.py), nobody ended without a reason, limits
hold, and if an executor is idle then nobody could have run.
"""

from __future__ import annotations

from llmos.codes import SeqState
from llmos.microkernel.sequence import QUEUED
from simulation.before import Before
from simulation.fates import check_end, check_live, check_times, is_unread
from simulation.ledger import Known
from simulation.world import World


def remember(world: World) -> Before:
    """In front of an event."""
    pages = {
        (model, tenant.name): (tenant.pages, tenant.running)
        for model, lane in world.kernel.state.lanes.items()
        for tenant in lane.tenants.all
    }
    return Before(pages, {model: _is_covered(world, model) for model in world.setup.models})


def check(world: World, before: Before, number: int) -> None:
    """Behind an event."""
    world.kernel.check()
    world.journal.compare(world.ledger.live)
    for known in list(world.ledger.live.values()):
        seq = world.kernel.state.sequences.get(known.rid)
        if seq is None:
            check_end(world, known, before)
        else:
            check_live(world, known, seq, before)
    for known in world.ledger.live.values():
        assert not known.after & before.ended_badly, f"{known.label} lives on, though one it waited for ended badly"
        known.after &= world.ledger.live.keys()
        assert known.after == world.kernel.state.sequences[known.rid].waits_for
    assert not before.causes, f"did not end: {before.causes}"
    assert not world.ends, f"ends of nothing: {world.ends}"
    assert not world.replaced, f"replaced readers: {world.replaced}"
    assert len(world.kernel.state.sequences) == len(world.ledger.live)
    world.ledger.forget_old(world.now)
    assert world.kernel.state.ended.keys() == world.ledger.kept.keys(), "records are kept for the retention time"
    assert not any(waited.reason is not None for waited in world.waits.values()), "a Wait was not answered"
    _check_tenants(world, before)
    _check_storage(world)
    for model in world.mirrors:
        _check_progress(world, model)
    if world.ledger.live:
        rids = list(world.ledger.live)
        rid = rids[number % len(rids)]
        check_times(world, world.ledger.live[rid], world.kernel.state.sequences[rid])


# ------------------------------------------------------------ tenants, storage


def _is_covered(world: World, model: str) -> bool:
    """Is there a page for all that tenants are guaranteed and do not use?"""
    lane = world.kernel.state.lanes[model]
    if lane.scheduler is None or not lane.tenants.has_guarantees:
        return True
    owed = sum(max(0, tenant.limits.guaranteed_pages - tenant.pages) for tenant in lane.tenants.all)
    return owed <= lane.scheduler.pool.available + lane.scheduler.pool.num_quarantined


def _check_tenants(world: World, before: Before) -> None:
    for model, lane in world.kernel.state.lanes.items():
        for tenant in lane.tenants.all:
            pages, running = before.pages.get((model, tenant.name), (0, 0))
            limits = world.ledger.limits_of(tenant.name)
            assert tenant.limits == limits, f"{tenant.name}: {tenant.limits}, should be {limits}"
            if not world.setup.share_prefixes:  # else one may have to pay for what another one let go
                assert tenant.pages <= max(pages, limits.max_pages), f"{tenant.name}: {tenant.pages}, over its quota"
            assert tenant.running <= max(running, limits.max_running), f"{tenant.name}: {tenant.running} run"
            charged = world.charged.get((model, tenant.name), [0])[0]
            assert tenant.tokens == charged, f"{tenant.name}: charged {tenant.tokens} tokens, computed {charged}"
        if before.covered[model] and not before.limits_changed and not world.setup.share_prefixes:
            assert _is_covered(world, model), f"{model}: a guarantee was given away"


def _check_storage(world: World) -> None:
    state, storage = world.kernel.state, world.storage
    assert state.storage == storage.peer
    if storage.peer and storage.synced:
        missing = {name for name, limits in state.tenant_limits.items() if storage.table.get(name) != limits}
        assert not missing, f"storage does not know the limits of {missing}"


# ------------------------------------------------------------ progress


def _check_progress(world: World, model: str) -> None:
    """If the executor has nothing to do then nobody could run."""
    scheduler = world.scheduler(model)
    if scheduler is None or world.mirrors[model].executor.inbox:
        return
    now, tenants = world.now, scheduler.tenants
    stuck: list[Known] = []
    num_rows, unread = len(scheduler.rows), 0
    for known in world.ledger.live.values():
        seq = world.kernel.state.sequences[known.rid]
        if known.model != model or not seq.has_work:
            continue
        tenant = tenants.get(known.owner)
        if seq.state is SeqState.RUNNING:
            unread += is_unread(world, known)
            assert is_unread(world, known) or tenant.over_rate(now), f"{known.label} has a row, the executor is idle"
        elif seq.state in QUEUED:
            if not tenant.over_rate(now) and tenant.running < tenant.limits.max_running:
                stuck.append(known)
        else:
            held = known.after or seq.heir_of is not None or seq.awaits_reader
            assert known.suspended or held, f"{known.label} is blocked for no reason"
            assert seq.heir_of is None or seq.heir_of.state in (SeqState.RUNNING, *QUEUED), f"{known.label}: no legator"
    if not stuck:
        return
    assert num_rows, f"nobody runs, but {[known.label for known in stuck]} could"
    if num_rows >= world.setup.max_rows:
        assert not unread, f"{[known.label for known in stuck]} wait for rows of sequences that wait for their readers"
        return
    could = [known for known in stuck if _would_fit(world, known)]
    assert len(could) < len(stuck), f"{[known.label for known in could]} could start beside those that wait for clients"


def _would_fit(world: World, known: Known) -> bool:
    """Are there pages for it without taking any from anybody?"""
    scheduler = world.scheduler(known.model)
    assert scheduler is not None
    seq = world.kernel.state.sequences[known.rid]
    tenant = scheduler.tenants.get(known.owner)
    need = scheduler.holdings.pages_for(len(seq.tokens) + 1) + 1
    reserve = scheduler.residents.working_set.reserve(scheduler.rows)
    return (
        tenant.pages + need <= tenant.limits.max_pages
        and need + reserve <= scheduler.holdings.grantable(tenant)
        and not seq.num_pending
    )
