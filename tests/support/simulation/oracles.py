"""What must hold after every event, whatever it was.

`Before` is what has to be remembered from in front of an event. `check` compares the microkernel with the ledger: each sequence is where
it may be, what ended had a reason to, what did not end had none, tokens are the known answer, times add up, limits hold, and if an
executor is idle then nobody could have run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmos.codes import FinishReason, SeqState
from llmos.microkernel import report
from llmos.microkernel.jobs import ended_well
from llmos.microkernel.sequence import QUEUED, Sequence
from llmos.protocol.messages import Explained
from simulation.ledger import Known
from simulation.setup import NO_WINDOW
from simulation.world import World

_NATURAL = (FinishReason.STOP, FinishReason.LENGTH)
_EPSILON = 1e-6


@dataclass
class Before:
    """`causes`: what the event must end, and why. `stepped`: models of which it brought a result. `failed`: rids whose rows failed."""

    pages: dict[tuple[str, str], tuple[int, int]]
    covered: dict[str, bool]
    causes: dict[int, FinishReason] = field(default_factory=dict)
    cut: dict[int, int] = field(default_factory=dict)  # rid -> output tokens that count
    stepped: set[str] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    in_flight: set[int] = field(default_factory=set)  # when the executor died
    limits_changed: bool = False
    ended_badly: set[int] = field(default_factory=set)


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
            _check_end(world, known, before)
        else:
            _check_live(world, known, seq, before)
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


# ------------------------------------------------------------ sequences


def _check_end(world: World, known: Known, before: Before) -> None:
    """The sequence is gone: with a record, for a reason, after one end to its reader."""
    record = world.kernel.state.ended[known.rid]
    reason = record.reason
    assert reason is not None
    turn = FinishReason(record.end.reason) if known.generating and record.end is not None else None
    if turn is not None:
        _check_turn_end(world, known, record, turn, before)
    if turn is not reason:  # an open sequence may end at the same moment, but for another reason
        assert known.is_open
        assert known.rid not in world.ends
        _check_reason(world, known, record, reason, before)
        before.causes.pop(known.rid, None)
    assert list(record.tokens) == known.before + known.output, f"{known.label}: its record has other tokens"
    known.move("FINISHED", world.now)
    check_times(world, known, record)
    if not ended_well(reason):
        before.ended_badly.add(known.rid)
    world.ledger.end(known, reason, world.now)


def _check_turn_end(world: World, known: Known, seq: Sequence, reason: FinishReason, before: Before) -> None:
    _check_reason(world, known, seq, reason, before)
    before.causes.pop(known.rid, None)
    count = before.cut.pop(known.rid, None)
    if reason in _NATURAL and count is None:
        count = len(known.output)
    reader, end = world.ends.pop(known.rid, (0, seq.end))
    assert end is not None
    assert reader == known.reader, f"{known.label}: its end went to {reader}, {known.reader} reads it"
    assert end.reason == reason, f"{known.label}: {FinishReason(end.reason).name} and {reason.name}"
    usage = end.usage
    if count is None:  # whatever it had then
        count = usage.output_tokens
        assert known.seen - len(known.before) <= count <= len(known.output)
    if known.reader:
        assert known.read >= count, f"{known.label}: {count} tokens, its reader got {known.read}"
    assert (usage.prompt_tokens, usage.output_tokens) == (len(known.before), count)
    assert abs(usage.total_ms - (world.now - known.turn_at) * 1e3) < _EPSILON
    assert usage.queue_ms <= usage.total_ms + _EPSILON
    if known.started:
        assert seq.started_at is not None
    known.last_end = end
    known.end_turn(count)
    known.touched = world.now
    assert list(seq.tokens) == known.before + known.output, f"{known.label}: other tokens after its turn"


def _check_reason(world: World, known: Known, seq: Sequence, reason: FinishReason, before: Before) -> None:
    text = f"{known.label} ended with {reason.name.lower()}"
    if known.rid in before.causes:
        assert reason == before.causes[known.rid], f"{text}, not {before.causes[known.rid].name.lower()}"
    elif reason in _NATURAL:
        assert known.model in before.stepped, text
        assert reason == known.natural, f"{text}, not {known.natural.name.lower()}"
    elif reason is FinishReason.CANCELLED:
        assert known.orphan_since is not None, f"{text}, but its reader did not die"
        assert known.orphan_since <= world.now - world.setup.linger_s + _EPSILON, f"{text} too early"
    elif reason is FinishReason.NUMERICAL_ERROR:
        assert known.rid in before.failed, text
    elif reason is FinishReason.POISONED:
        assert known.rid in before.in_flight, f"{text}, but it was not running"
        assert known.deaths >= 2, f"{text} after {known.deaths} deaths of an executor"
    elif reason is FinishReason.DEADLINE:
        assert known.deadline is not None, text
        assert known.deadline <= world.now + _EPSILON, f"{text} before it passed"
        assert seq.started_at is None, f"{text}, but it had begun"
        assert known.seen - len(known.before) <= known.inherited, f"{text}, but it had begun in an earlier process"
    elif reason is FinishReason.IDLE:
        assert known.is_open, text
        assert not known.generating, text
        assert world.now - known.touched >= world.setup.idle_timeout_s - _EPSILON, f"{text} too early"
    elif reason is FinishReason.DEPENDENCY:
        assert known.after & before.ended_badly or any(
            (other := world.kernel.state.ended.get(rid)) is not None and not ended_well(other.reason)
            for rid in known.after
        ), text
    else:
        raise AssertionError(f"{text} for no reason")


def _check_live(world: World, known: Known, seq: Sequence, before: Before) -> None:
    label = known.label
    if known.generating and not seq.generating:
        assert known.is_open
        assert seq.end is not None
        _check_turn_end(world, known, seq, FinishReason(seq.end.reason), before)
    assert known.generating == seq.generating, f"{label}: generating is {seq.generating}"
    assert known.rid not in before.causes, f"{label} should have ended"
    count, num_before = len(seq.tokens), len(known.before)
    if count != known.seen:
        assert count > known.seen, f"{label}: committed tokens went away"
        assert known.generating, f"{label}: tokens while it does not generate"
        assert count < num_before + len(known.output), f"{label}: complete, but it goes on"
        for place in range(known.seen, count):
            assert seq.tokens[place] == known.output[place - num_before], f"{label}: a wrong token at {place}"
        known.seen = count
        if seq.state is SeqState.RUNNING and known.where == "prefill" and count > known.row_tokens:
            known.move("decode", world.now)
    assert seq.reader == known.reader, f"{label}: {seq.reader} reads it, not {known.reader}"
    if known.generating:
        num_output = count - num_before
        if known.reader:
            assert known.read == num_output, f"{label}: its reader got {known.read} of {num_output} tokens"
            assert num_output <= max(known.unread, known.acked + world.setup.window), f"{label}: over its window"
        else:
            known.unread = num_output + world.setup.steps_in_flight
        assert known.deadline is None or known.deadline > world.now or seq.started_at is not None, f"{label}: late"
    if known.orphan_since is not None:
        assert known.orphan_since > world.now - world.setup.linger_s - _EPSILON, f"{label} is an orphan for too long"
    assert known.suspended == (seq.state is SeqState.SUSPENDED), f"{label}: {seq.state.name}"
    assert known.deadline == seq.deadline
    if seq.state is not SeqState.RUNNING:
        where = "client" if seq.state is SeqState.BLOCKED and seq.awaits_reader else seq.state.name
        if where != known.where:
            known.move(where, world.now)
    if seq.awaits_reader:
        behind = count + seq.num_pending - num_before - known.acked  # also what is on its way
        assert known.reader, f"{label} waits for a reader that it does not have"
        assert behind >= world.setup.window, f"{label} waits for its reader, who waits for it"
    resting = known.is_open and not seq.has_work and not seq.held_back
    if not resting:
        known.resting_since = None
    elif known.resting_since is None:
        known.resting_since = world.now
    else:
        assert world.now - max(known.resting_since, known.touched) < world.setup.idle_timeout_s + _EPSILON, (
            f"{label}: idle for too long"
        )


def check_times(world: World, known: Known, seq: Sequence) -> None:
    """`explain` adds up to the age, and agrees with what was seen from outside."""
    tenant = world.kernel.state.lanes[known.model].tenants.get(known.owner)
    said = report.explain(0, seq, tenant, world.now)
    age = (world.now if seq.ended_at is None else seq.ended_at) - known.born
    spent = dict(known.spent)
    if known.where != "FINISHED":
        spent[known.where] = spent.get(known.where, 0.0) + world.now - known.since
    if not known.times_lost:
        _compare_times(world, known, said, spent)
    whole = sum(getattr(said, f"{cause}_ms") for cause in _CAUSES)
    assert abs(whole - said.age_ms) < _EPSILON * (1 + said.age_ms), f"{known.label}: {whole} ms of {said.age_ms}"
    assert abs(said.age_ms - age * 1e3) < _EPSILON * (1 + said.age_ms)


_CAUSES = ("queue", "quota", "prefill", "decode", "client", "preempted", "swapped", "suspended", "blocked")


def _compare_times(world: World, known: Known, said: Explained, spent: dict[str, float]) -> None:
    seconds = {cause: getattr(said, f"{cause}_ms") / 1e3 for cause in _CAUSES}
    pairs = [
        (seconds["queue"] + seconds["quota"], spent.get("WAITING", 0.0), "waiting"),
        (seconds["preempted"], spent.get("PREEMPTED", 0.0), "preempted"),
        (seconds["swapped"], spent.get("SWAPPED", 0.0), "swapped"),
        (seconds["suspended"], spent.get("SUSPENDED", 0.0), "suspended"),
        (seconds["blocked"], spent.get("BLOCKED", 0.0), "blocked"),
    ]
    prefill, decode, client = (spent.get(where, 0.0) for where in ("prefill", "decode", "client"))
    if world.setup.window == NO_WINDOW:
        pairs += [(seconds["prefill"], prefill, "prefill"), (seconds["decode"], decode, "decode")]
    else:
        running = seconds["prefill"] + seconds["decode"] + seconds["client"]
        pairs.append((running, prefill + decode + client, "in a row"))
    for told, seen, cause in pairs:
        assert abs(told - seen) < _EPSILON * (1 + seen), f"{known.label}: {told} s {cause}, it were {seen}"
    assert min(seconds.values()) > -_EPSILON, f"{known.label}: {seconds}"


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
            unread += _is_unread(world, known)
            assert _is_unread(world, known) or tenant.over_rate(now), f"{known.label} has a row, the executor is idle"
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


def _is_unread(world: World, known: Known) -> bool:
    """Is its reader so far behind that it may not run on?"""
    return bool(known.reader) and known.seen - len(known.before) >= known.acked + world.setup.window


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
