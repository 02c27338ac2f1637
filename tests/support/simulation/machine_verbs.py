"""Events of the machine: steps and their faults, executors that come and go, gateways that are lost, storage, time; and looking."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_world import VOCAB, params

from llmos.codes import ErrorCode, FinishReason, SeqState
from llmos.microkernel.sender import Sender
from llmos.microkernel.sequence import QUEUED
from llmos.microkernel.tenants import TenantLimits
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32
from simulation.ledger import INVALID, NOT_FOUND, Known
from simulation.oracles import Before, check_times
from simulation.verbs import capacity, sequence, verb
from simulation.world import SUPERVISOR, World

# ------------------------------------------------------------ executors


@verb
def step(
    world: World, before: Before, number: int, *, model: str, busy_us: int = 10, fault: str = "", place: int = 0
) -> None:
    """The executor finishes a step. `fault`: what is wrong with its result, or with one that it sends in front of it."""
    mirror = world.mirrors.get(model)
    if mirror is None or not mirror.executor.inbox:
        return
    executor, sender = mirror.executor, world.executor_sender(model)
    result = executor.run_one()
    samples = unpack_i32(result.samples)
    triples = list(zip(samples[0::3], samples[1::3], samples[2::3]))
    right = {"busy_us": busy_us, "logprobs": _logprobs(world, executor.rows, triples)}
    if fault in _STRAY:
        _stray(world, sender, result, fault)
    elif fault and triples:
        triples = _damaged(triples, fault, place)
    failed = unpack_i32(result.failed)
    before.failed.update(executor.rows[row].rid for row in failed[0::2])
    before.stepped.add(model)
    mirror.done(result.step)
    flat = [value for triple in triples for value in triple]
    fields = {name: getattr(result, name) for name in result.__struct_fields__}
    world.tell(sender, m.StepResult(**(fields | right | {"samples": pack_i32(flat)})))


def _logprobs(world: World, rows: Any, triples: list[tuple[int, int, int]]) -> tuple[m.RowLogprobs, ...]:
    """For the sequences that asked for them."""
    return tuple(
        m.RowLogprobs(row, position, m.TokenLogprobs(-1.0))
        for row, position, _ in triples
        if (chosen := world.ledger.by_rid[rows[row].rid].params) is not None and chosen.logprobs is not None
    )


_STRAY = ("old generation", "old step", "next step", "odd blob")


def _stray(world: World, sender: Sender, result: m.StepResult, fault: str) -> None:
    """A result that is not the next one: dropped, and counted if it is well-formed."""
    lane = world.kernel.state.lanes[sender.name.removeprefix("executor.")]
    fields = {name: getattr(result, name) for name in result.__struct_fields__}
    dropped, before = lane.results_dropped, world.digest()
    if fault == "odd blob":
        world.send(sender, m.StepResult(**(fields | {"samples": b"12345"})))
        assert world.replies.pop()[1].code == ErrorCode.PROTOCOL
    else:
        change = {
            "old generation": {"generation": result.generation - 1},
            "old step": {"step": result.step - 1},
            "next step": {"step": result.step + 1},
        }
        world.tell(sender, m.StepResult(**(fields | change[fault])))
        assert lane.results_dropped == dropped + 1
    assert world.digest() == before, "a result that does not count changed something"


def _damaged(triples: list[tuple[int, int, int]], fault: str, place: int) -> list[tuple[int, int, int]]:
    place %= len(triples)
    row, position, token = triples[place]
    rest = triples[:place] + triples[place + 1 :]
    return {
        "lack": rest,
        "lack all": [],
        "negative": [*rest, (row, position, -1)],
        "impossible": [(row, position, VOCAB), *rest],
        "position": [*rest, (row, position + 1, token)],
        "extra": [*triples, (97, position, token)],
        "reversed": triples[::-1],
    }[fault]


@verb
def fail(world: World, before: Before, number: int, *, seq: str, reason: int) -> None:
    """The numbers of a sequence go bad at its next token."""
    known = world.ledger.by_label.get(seq)
    if known is not None and known.model in world.mirrors:
        world.mirrors[known.model].executor.fail_rows[known.rid] = reason


@verb
def ready(
    world: World,
    before: Before,
    number: int,
    *,
    model: str,
    num_pages: int | None = None,
    host_pages: int | None = None,
) -> None:
    """An executor registers: a new one, or in place of the old. It may have other pages than the one before."""
    shape = world.shapes[model]
    world.shapes[model] = (num_pages or shape[0], shape[1] if host_pages is None else host_pages)
    _refit(world, before, model)
    world.start_executor(model)
    before.limits_changed = True


def _refit(world: World, before: Before, model: str) -> None:
    """Who can not have the room any more that it was told ends earlier, at once if it is too long already."""
    for known in world.ledger.live.values():
        room = capacity(world, model, known.owner) - len(known.before)
        if known.model == model and known.generating and room < len(known.output):
            count = known.seen - len(known.before)
            if room <= count:
                before.causes[known.rid], before.cut[known.rid] = FinishReason.LENGTH, count
            else:
                del known.output[room:]
                known.natural = FinishReason.LENGTH


@verb
def down(world: World, before: Before, number: int, *, model: str, replaced: bool = False, asked: bool = False) -> None:
    """The executor is dead and reaped. `replaced`: another one is to come, its sequences wait for that. `asked`: it was told to end."""
    mirror = world.mirrors.pop(model, None)
    if mirror is not None and replaced and not asked:
        before.in_flight = mirror.in_flight & world.ledger.live.keys()
        for known in (world.ledger.live[rid] for rid in before.in_flight):
            known.deaths = known.deaths + 1 if known.length_at_death == known.seen else 1
            known.length_at_death = known.seen
    if not replaced:
        before.causes |= world.lost_executor(model)
    world.tell(SUPERVISOR, m.ServiceDown("executor", f"executor.{model}", 1, replaced, asked))


@verb
def crash(world: World, before: Before, number: int) -> None:
    """The microkernel dies and comes back from its journal; executors, gateways and storage have yet to greet it."""
    world.mirrors.clear()
    world.waits.clear()
    world.charged.clear()
    world.storage.peer, world.storage.asked = 0, []
    world.ledger.limits = {}
    before.limits_changed = True
    before.pages = {}
    for name in world.gates:
        world.gates[name] = Sender(world.new_peer(), "gateway", name)
    for known in world.ledger.live.values():
        known.reader, known.acked, known.times_lost = 0, 0, True
        known.started &= known.seen - len(known.before) > known.inherited
        known.touched = world.now
        if known.generating:  # what it was told first holds again
            known.give_room(world.journal.fold.sequences[known.rid].max_len - len(known.before))
        known.attended = world.journal.fold.sequences[known.rid].attended  # who read it is not written down
        known.orphan_since = world.now if known.attended and not known.is_open else None
        known.last_reader, known.resting_since = 0, None
    for known in world.ledger.kept.values():
        known.times_lost = True
    world.recover()


@verb
def journal(world: World, before: Before, number: int, *, works: bool) -> None:
    """It can not be written, or can again."""
    world.ledger.refusal = not works
    world.kernel.state.refusal = None if works else "the journal can not be written"


# ------------------------------------------------------------ gateways, storage, time


@verb
def lost(world: World, before: Before, number: int, *, gate: str) -> None:
    """A gateway is gone; another one takes its place under a new number."""
    old = world.gates[gate]
    world.gates[gate] = Sender(world.new_peer(), "gateway", gate)
    for known in world.ledger.live.values():
        if known.reader == old.peer:
            known.reader = 0
            known.orphan_since = None if known.is_open else world.now
    world.storage.asked = [(req, peer) for req, peer in world.storage.asked if peer != old.peer]
    for key in [key for key in world.waits if key[0] == old.peer]:
        del world.waits[key]
    world.deliver(world.kernel.peer_down(old.peer, world.now))


@verb
def storage_up(world: World, before: Before, number: int, *, synced: bool = True) -> None:
    storage = world.storage
    if storage.peer:
        return
    storage.peer, storage.synced = world.new_peer(), synced
    sender = Sender(storage.peer, "storage", "storage")
    world.deliver(world.kernel.greet(sender, world.now))
    if not synced:
        return
    rows = tuple(
        m.TenantLimitsRow(name, **{field: getattr(limits, field) for field in TenantLimits.__dataclass_fields__})
        for name, limits in storage.table.items()
    )
    world.ledger.limits = dict(storage.table) | world.ledger.limits
    before.limits_changed = True
    for model in world.setup.models:
        if world.scheduler(model) is not None:
            _refit(world, before, model)
    world.tell(sender, m.TenantsStored(rows))


@verb
def storage_down(world: World, before: Before, number: int) -> None:
    world.storage.peer = 0
    asked, world.storage.asked = world.storage.asked, []
    count = len(world.replies)
    world.send(SUPERVISOR, m.ServiceDown("storage", "storage", 1))
    answers = [answer for _, answer in world.replies[count:]]
    assert len(answers) == len(asked)
    assert all(answer.code == ErrorCode.UNAVAILABLE for answer in answers)


@verb
def models(world: World, before: Before, number: int, *, gate: str) -> None:
    """Asked of storage, through the microkernel."""
    message = m.ModelsGet(world.next_req())
    if not world.storage.peer:
        world.ask(world.gates[gate], message, {(ErrorCode.UNAVAILABLE, None)})
        return
    world.asking = world.gates[gate].peer
    world.tell(world.gates[gate], message)
    if number % 3:
        sender = Sender(world.storage.peer, "storage", "storage")
        count = len(world.replies)
        world.send(sender, m.ModelsReply(world.storage.asked.pop()[0], ()))
        assert world.replies[count:] == [(world.gates[gate].peer, m.ModelsReply(message.req, ()))]


@verb
def time(world: World, before: Before, number: int) -> None:
    """Nothing happens for a while."""


# ------------------------------------------------------------ looking


@verb
def look(
    world: World, before: Before, number: int, *, gate: str, what: str, seq: str = "", owner: str | None = None
) -> None:
    sender, req = world.gates[gate], world.next_req()
    if what == "ps":
        rows = world.ask(sender, m.PsGet(req, owner), set()).rows
        expected = {known.rid for known in world.ledger.live.values() if owner in (None, known.owner)}
        assert len(rows) == len(expected)
        assert {row.rid for row in rows} == expected
    elif what == "status":
        for lane in world.ask(sender, m.StatusGet(req), set()).lanes:
            _check_status(world, lane)
    elif what == "tenants":
        rows = world.ask(sender, m.TenantsGet(req, owner), set()).tenants
        assert all(owner in (None, row.tenant) for row in rows)
    elif (known := world.ledger.by_label.get(seq)) is not None:
        must = world.ledger.known_problems(known, owner)
        kind = {"stat": m.Stat, "explain": m.Explain}[what]
        answer = world.ask(sender, kind(req, known.rid, owner), must)
        if isinstance(answer, m.Stats):
            _check_stats(world, known, answer)
        elif answer is not None:
            check_times(world, known, sequence(world, known))


def _check_status(world: World, lane: m.LaneStatus) -> None:
    live = [sequence(world, known) for known in world.ledger.live.values() if known.model == lane.model]
    counts = [sum(seq.state in states for seq in live) for states in (
        (SeqState.RUNNING,), QUEUED, (SeqState.BLOCKED,), (SeqState.SUSPENDED,))]  # fmt: skip
    assert [lane.running, lane.waiting, lane.blocked, lane.suspended] == counts
    assert lane.ready == (lane.model in world.mirrors)
    if lane.ready:
        held = sum(len(seq.host_pages) for seq in live)
        assert lane.host_pages_free <= lane.host_pages_total - held
        assert lane.pages_free + lane.pages_cached <= lane.pages_total


def _check_stats(world: World, known: Known, stats: m.Stats) -> None:
    row = stats.row
    assert (row.owner, row.model, row.nice, row.is_open) == (known.owner, known.model, known.nice, known.is_open)
    assert stats.parent == known.parent
    assert stats.children == known.children
    assert stats.after == tuple(sorted(known.after))
    assert stats.reason == (known.reason or 0)
    assert (row.prompt_tokens, stats.num_tokens) == (len(known.before), known.seen)
    job = [other for other in world.ledger.by_label.values() if other.job == known.job]
    assert stats.job.live == sum(other.reason is None for other in job)
    if not any(other.times_lost for other in job):
        assert stats.job.sequences == len(job)
    if known.deadline is not None and known.reason is None:
        assert stats.deadline_ms == pytest.approx((known.deadline - world.now) * 1e3)


# ------------------------------------------------------------ what is always refused


def _nonsense(world: World, req: int, what: str) -> tuple[Sender, Any, tuple[ErrorCode, str | None]]:
    """A request that is wrong in itself, who sends it, and the refusal."""
    gate, model = world.gates["g1"], world.setup.models[0]
    prompt, one = pack_i32([1]), params(max_tokens=1)
    executor = Sender(9_999_999, "executor", f"executor.{model}")
    nobody = 10**9
    return {
        "model": (gate, m.SeqSubmit(req, "nope", prompt, one, "alice"), (NOT_FOUND, "model")),
        "empty": (gate, m.SeqSubmit(req, model, b"", one, "alice"), (INVALID, "prompt")),
        "blob": (gate, m.SeqSubmit(req, model, b"123", one, "alice"), (ErrorCode.PROTOCOL, None)),
        "vocabulary": (gate, m.SeqSubmit(req, model, pack_i32([VOCAB]), one, "alice"), (INVALID, "prompt")),
        "negative": (gate, m.SeqSpawn(req, model, pack_i32([-1]), "alice"), (INVALID, "prompt")),
        "params": (gate, m.SeqSubmit(req, model, prompt, params(top_p=0.0), "alice"), (INVALID, "top_p")),
        "incomplete": (gate, m.SeqSubmit(req, model, prompt, params(top_k=None), "alice"), (INVALID, "top_k")),
        "after": (gate, m.SeqSubmit(req, model, prompt, one, "alice", None, 0, None, None, (1,) * 257), (INVALID, "after")),
        "unknown after": (gate, m.SeqSpawn(req, model, prompt, "alice", 0, None, (nobody,)), (NOT_FOUND, "after")),
        "unknown parent": (gate, m.SeqSpawn(req, model, prompt, "alice", 0, nobody), (NOT_FOUND, "parent")),
        "attach": (gate, m.SeqAttach(req, nobody), (NOT_FOUND, "rid")),
        "append": (gate, m.SeqAppend(req, nobody, model, prompt), (NOT_FOUND, "rid")),
        "kill": (gate, m.Kill(req, nobody, "alice"), (NOT_FOUND, "rid")),
        "kill both": (gate, m.Kill(req, nobody, None, "alice"), (INVALID, "rid")),
        "job": (gate, m.Kill(req, None, None, job=nobody), (NOT_FOUND, "job")),
        "wait": (gate, m.Wait(req, nobody), (NOT_FOUND, "rid")),
        "weight": (gate, m.TenantSet(req, "alice", weight=0.0), (INVALID, "weight")),
        "pages": (gate, m.TenantSet(req, "alice", max_pages=-1), (INVALID, "max_pages")),
        "rate": (gate, m.TenantSet(req, "alice", tokens_per_s=float("nan")), (INVALID, "tokens_per_s")),
        "name": (gate, m.TenantSet(req, "", weight=1.0), (INVALID, "tenant")),
        "record": (gate, m.RecordWrite(req), (INVALID, "recorder_mib")),
        "role": (executor, m.Kill(req, 1), (ErrorCode.PERMISSION, None)),
        "supervisor": (SUPERVISOR, m.SeqAttach(req, 1), (ErrorCode.PERMISSION, None)),
        "executor": (gate, m.ServiceDown("executor", f"executor.{model}", 1), (ErrorCode.PERMISSION, None)),
        "ready": (executor, m.ExecutorReady(model, 0, 4, 1, 1, 9, VOCAB, "", ""), (INVALID, "num_pages")),
        "host": (executor, m.ExecutorReady(model, 9, 4, 1, 1, 9, VOCAB, "", "", -1), (INVALID, "num_pages")),
    }[what]  # fmt: skip


NONSENSE = (
    "model", "empty", "blob", "vocabulary", "negative", "params", "incomplete", "after", "unknown after", "unknown parent",
    "attach", "append", "kill", "kill both", "job", "wait", "weight", "pages", "rate", "name", "record", "role", "supervisor",
    "executor", "ready", "host",
)  # fmt: skip


@verb
def nonsense(world: World, before: Before, number: int, *, what: str) -> None:
    sender, message, refusal = _nonsense(world, world.next_req(), what)
    if isinstance(message, (m.SeqSubmit, m.SeqSpawn, m.SeqAppend)):
        if world.ledger.refusal:
            refusal = (ErrorCode.UNAVAILABLE, None)
        elif what not in ("model", "append") and world.scheduler(message.model) is None:
            refusal = (ErrorCode.UNAVAILABLE, "model")
    if hasattr(message, "req"):
        world.ask(sender, message, {refusal}, {(ErrorCode.OVERLOADED, None), (ErrorCode.CONTEXT_TOO_LONG, "prompt")})
    else:
        world.tell(sender, message, {refusal})
