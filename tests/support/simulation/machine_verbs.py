"""Events of the machine: steps and their faults, executors that come and go, crashes, gateways that are lost, storage, time."""

from __future__ import annotations

from typing import Any

from kernel_world import VOCAB

from llmos.codes import ErrorCode, FinishReason
from llmos.microkernel.sender import Sender
from llmos.microkernel.tenants import TenantLimits
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32
from simulation.before import Before
from simulation.verbs import capacity, verb
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
def fail(world: World, before: Before, number: int, *, seq: str, reason: int, times: int = 2) -> None:
    """The numbers of a sequence go bad at its next token: once, which nobody notices, or again when it is computed again."""
    known = world.ledger.by_label.get(seq)
    if known is not None and known.model in world.mirrors:
        executor = world.mirrors[known.model].executor
        executor.fail_rows[known.rid], executor.fail_times[known.rid] = reason, times


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
