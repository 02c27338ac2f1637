"""What each kind of event does to the world, and what must follow: refusals, ends, new readers. One function per kind.

Each gets the world, what was remembered in front of the event, its number, and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kernel_world import VOCAB, params
from msgspec import structs

from llmos.codes import ErrorCode, FinishReason, PageFate, SeqState
from llmos.microkernel.sender import Sender
from llmos.microkernel.sequence import NO_ROW, Sequence
from llmos.protocol import messages as m
from llmos.protocol.codec import encode, pack_i32, unpack_i32
from llmos.protocol.limits import MAX_FORKS, MAX_NICE, MIN_NICE
from llmos.protocol.params import SamplingParams
from simulation.ledger import INVALID, WRONG, Known, Problem
from simulation.oracles import Before
from simulation.world import World

Verb = Callable[..., None]
VERBS: dict[str, Verb] = {}
_MOST_STEP_S = 0.006  # no simulated step takes longer


def verb(function: Verb) -> Verb:
    VERBS[function.__name__.rstrip("_")] = function
    return function


def prompt_of(family: int, length: int, salt: int, extra: int) -> list[int]:
    """`length` tokens that all of a family share, then `extra` of its own."""
    return [(family * 37 + place) % VOCAB for place in range(length)] + [
        (salt * 101 + 7 * i) % VOCAB for i in range(extra)
    ]


def sequence(world: World, known: Known) -> Sequence:
    """What the microkernel knows of it."""
    state = world.kernel.state
    return state.sequences.get(known.rid) or state.ended[known.rid]


def _found(world: World, label: str | None) -> Known | None:
    return None if label is None else world.ledger.by_label.get(label)


def _all_found(world: World, labels: list[str]) -> list[Known]:
    return [known for label in labels if (known := _found(world, label)) is not None]


# ------------------------------------------------------------ what may be refused


def capacity(world: World, model: str, owner: str) -> int:
    """Most tokens that a sequence can ever have."""
    num_pages = world.shapes[model][0] - world.ledger.guaranteed_to_others(owner)
    num_pages = min(num_pages, world.ledger.limits_of(owner).max_pages)
    return min(world.setup.max_context, num_pages * world.setup.page_size)


def _queue_problems(world: World, model: str, owner: str, more: int = 1) -> set[Problem]:
    scheduler = world.scheduler(model)
    assert scheduler is not None
    full = len(scheduler.queue) + more > world.setup.max_waiting
    full |= scheduler.tenants.get(owner).waiting + more > world.ledger.limits_of(owner).max_waiting
    return {(ErrorCode.OVERLOADED, None)} if full else set()


def _deadline_problems(deadline_ms: float | None, tokens: int) -> tuple[set[Problem], set[Problem]]:
    """(must, may): what takes longer than the deadline at any rate may be refused, depending on what was measured."""
    refusal: set[Problem] = {(INVALID, "deadline_ms")}
    if deadline_ms is None:
        return set(), set()
    if deadline_ms <= 0:
        return refusal, set()
    return set(), refusal if deadline_ms < tokens * _MOST_STEP_S * 1e3 else set()


def _entry_problems(
    world: World, model: str, owner: str, nice: int, parent: Known | None, after: list[Known]
) -> set[Problem]:
    problems = _queue_problems(world, model, owner) | _refusal(world)
    if not MIN_NICE <= nice <= MAX_NICE:
        problems.add((INVALID, "nice"))
    if parent is not None:
        problems |= world.ledger.known_problems(parent, owner, "parent")
    return problems | world.ledger.after_problems(after, owner)


# ------------------------------------------------------------ new sequences


@verb
def submit(
    world: World, before: Before, number: int, *, gate: str, model: str, owner: str, prompt: list[int],
    sampling: dict[str, Any], nice: int = 0, deadline_ms: float | None = None, parent: str | None = None, after: Any = (),
    request_id: str | None = None,
) -> None:  # fmt: skip
    tokens, chosen = prompt_of(*prompt), _sampling(sampling)
    root, first = _found(world, parent), _all_found(world, after)
    if parent is not None and root is None:
        return
    sender, req = world.gates[gate], world.next_req()
    message = m.SeqSubmit(
        req, model, pack_i32(tokens), chosen, owner, request_id, nice, deadline_ms, root and root.rid,
        tuple(known.rid for known in first),
    )  # fmt: skip
    body = encode(structs.replace(message, req=0, deadline_ms=None))
    if _asked_before(world, sender, message, body):
        return
    if world.scheduler(model) is None:
        world.ask(sender, message, _unavailable(world))
        return
    room = capacity(world, model, owner) - len(tokens)
    must, may = _deadline_problems(deadline_ms, world.setup.max_context)
    must |= _entry_problems(world, model, owner, nice, root, first)
    if room < 1:
        must.add((ErrorCode.CONTEXT_TOO_LONG, "prompt"))
    answer = world.ask(sender, message, must, may)
    if answer is None:
        return
    known = _enter(world, str(number), answer.rid, owner, model, tokens, root, first, nice)
    known.reader, known.attended = sender.peer, True
    known.request = request_id and (request_id, body)
    known.deadline = None if deadline_ms is None else world.now + deadline_ms / 1e3
    known.begin(_seeded(world, known, chosen), _room(chosen, room), [], world.now)


def _asked_before(world: World, sender: Sender, message: Any, body: bytes) -> bool:
    """Was it answered with the sequence that was made for the same request, or refused for another body?"""
    known = world.ledger.requested(message.owner, message.client_request_id)
    if message.client_request_id is None or known is None:
        return False
    assert known.request is not None
    if known.request[1] != body:
        world.ask(sender, message, {(INVALID, "client_request_id")})
    else:
        assert world.ask(sender, message, set()) == m.SeqAccepted(message.req, known.rid, existing=True)
    return True


def _unavailable(world: World) -> set[Problem]:
    """No executor; and while nothing can be written down no new work is taken at all."""
    return {(ErrorCode.UNAVAILABLE, None)} if world.ledger.refusal else {(ErrorCode.UNAVAILABLE, "model")}


def _refusal(world: World) -> set[Problem]:
    return {(ErrorCode.UNAVAILABLE, None)} if world.ledger.refusal else set()


@verb
def spawn(
    world: World, before: Before, number: int, *, gate: str, model: str, owner: str, prompt: list[int], nice: int = 0,
    parent: str | None = None, after: Any = (), request_id: str | None = None,
) -> None:  # fmt: skip
    tokens = prompt_of(*prompt)
    root, first = _found(world, parent), _all_found(world, after)
    if parent is not None and root is None:
        return
    message = m.SeqSpawn(
        world.next_req(), model, pack_i32(tokens), owner, nice, root and root.rid, tuple(known.rid for known in first),
        request_id,
    )  # fmt: skip
    body = encode(structs.replace(message, req=0))
    if _asked_before(world, world.gates[gate], message, body):
        return
    if world.scheduler(model) is None:
        world.ask(world.gates[gate], message, _unavailable(world))
        return
    must = _entry_problems(world, model, owner, nice, root, first)
    if tokens and len(tokens) > capacity(world, model, owner):
        must.add((ErrorCode.CONTEXT_TOO_LONG, "prompt"))
    answer = world.ask(world.gates[gate], message, must)
    if answer is not None:
        known = _enter(world, str(number), answer.rid, owner, model, tokens, root, first, nice)
        known.is_open = True
        known.request = request_id and (request_id, body)


def _enter(
    world: World, label: str, rid: int, owner: str, model: str, tokens: list[int], root: Known | None,
    after: list[Known], nice: int,
) -> Known:  # fmt: skip
    known = Known(label, rid, owner, model, False, root.job if root else label, world.now, tokens, nice)
    known.parent = root.rid if root else None
    known.after = {other.rid for other in after if other.reason is None}
    known.touched = known.since = world.now
    known.seen = len(tokens)
    world.ledger.enter(known)
    return known


def _sampling(sampling: dict[str, Any]) -> SamplingParams:
    return params(**(sampling | {"stop_token_ids": tuple(sampling.get("stop_token_ids", ()))}))


def _room(chosen: SamplingParams, room: int) -> int:
    return room if chosen.max_tokens is None else min(chosen.max_tokens, room)


def _seeded(world: World, known: Known, asked: SamplingParams) -> SamplingParams:
    """The parameters with the seed that was drawn, which nobody else may have got."""
    found = sequence(world, known).params
    assert found.seed is not None
    assert structs.replace(found, seed=asked.seed) == asked
    if asked.seed is not None:
        assert found.seed == asked.seed
        return found
    assert world.ledger.seeds.setdefault(found.seed, known.label) == known.label, "a seed was drawn twice"
    return found


@verb
def fork(
    world: World, before: Before, number: int, *, gate: str, seq: str, count: int, owner: str | None = None
) -> None:
    known = _found(world, seq)
    if known is None:
        return
    must = world.ledger.live_problems(known, owner) | _refusal(world)
    if not 1 <= count <= MAX_FORKS:
        must.add((INVALID, "count"))
    if not must and sequence(world, known).has_work:
        must = _queue_problems(world, known.model, known.owner, count)
    answer = world.ask(world.gates[gate], m.Fork(world.next_req(), known.rid, count, owner), must)
    if answer is None:
        return
    assert len(answer.rids) == count
    seeds = {sequence(world, known).params.seed}
    for index, rid in enumerate(answer.rids):
        child = _enter(
            world, f"{number}.{index}", rid, known.owner, known.model, list(known.before), known, [], known.nice
        )
        child.is_open, child.deadline, child.after = known.is_open, known.deadline, set(known.after)
        child.parent = known.rid
        made = sequence(world, child)
        seeds.add(made.params.seed)
        head = known.output[: known.seen - len(known.before)]
        child.output, child.params, child.seen = list(head), known.params, known.seen
        if known.generating:
            room = made.max_len - len(known.before)
            assert room == sequence(world, known).max_len - len(known.before)
            child.begin(made.params, room, head, world.now)
    assert len(seeds) == count + 1, "a fork has the seed of another one"
    known.children += count


# ------------------------------------------------------------ turns and streams


@verb
def append(
    world: World, before: Before, number: int, *, gate: str, seq: str, prompt: list[int], owner: str | None = None,
    expect: int | None = None,
) -> None:  # fmt: skip
    """`expect`: how long it is, so that asking again does not append again."""
    known = _found(world, seq)
    if known is None:
        return
    tokens = prompt_of(*prompt)
    must = world.ledger.known_problems(known, owner)
    if expect is not None and not must:
        end = expect + len(tokens)
        if (known.before + known.output)[: known.seen][expect:end] == tokens:
            message = m.SeqAppend(world.next_req(), known.rid, known.model, pack_i32(tokens), owner, expect)
            assert world.ask(world.gates[gate], message, set()) == m.SeqAppended(message.req, known.rid, end)
            return
    must = _length_problems(known, expect) | world.ledger.rest_problems(known, owner) | _refusal(world)
    total = len(known.before) + len(known.output) + len(tokens)
    if not tokens:
        must.add((INVALID, "tokens"))
    elif not must and total > capacity(world, known.model, known.owner):
        must.add((ErrorCode.CONTEXT_TOO_LONG, "tokens"))
    message = m.SeqAppend(world.next_req(), known.rid, known.model, pack_i32(tokens), owner, expect)
    answer = world.ask(world.gates[gate], message, must)
    if answer is not None:
        known.before, known.output, known.last_end = known.before + known.output + tokens, [], None
        known.seen, known.touched, known.appended = total, world.now, (total - len(tokens), prompt)
        assert answer.num_tokens == total


def _length_problems(known: Known, expect: int | None) -> set[Problem]:
    return {(WRONG, "rid")} if expect not in (None, known.seen) else set()


@verb
def continue_(
    world: World, before: Before, number: int, *, gate: str, seq: str, sampling: dict[str, Any],
    deadline_ms: float | None = None, owner: str | None = None, expect: int | None = None,
) -> None:  # fmt: skip
    """`expect`: how long it is, so that asking again reads the turn that has begun."""
    known = _found(world, seq)
    if known is None:
        return
    chosen, sender = _sampling(sampling), world.gates[gate]
    must, may = _deadline_problems(deadline_ms, world.setup.max_context)
    has_begun = known.generating or (known.last_end is not None and known.output)
    message = m.SeqContinue(world.next_req(), known.rid, known.model, chosen, deadline_ms, owner, expect)
    if has_begun and expect == len(known.before):
        _read_on(world, sender, known, message, world.ledger.known_problems(known, owner))
        return
    must |= world.ledger.rest_problems(known, owner) | _refusal(world) | _length_problems(known, expect)
    total = len(known.before) + len(known.output)
    room = 0
    if known.reason is None:
        room = capacity(world, known.model, known.owner) - total
        if not total:
            must.add((WRONG, "rid"))
        if room < 1:
            must.add((ErrorCode.CONTEXT_TOO_LONG, "rid"))
        must |= _queue_problems(world, known.model, known.owner)
    answer = world.ask(sender, message, must, may)
    if answer is None:
        return
    known.before, known.output = known.before + known.output, []
    known.reader, known.read, known.touched = sender.peer, 0, world.now
    known.deadline = None if deadline_ms is None else world.now + deadline_ms / 1e3
    known.begin(_seeded(world, known, chosen), _room(chosen, room), [], world.now)
    assert (answer.prompt_tokens, answer.output, answer.end) == (total, b"", None)
    assert answer.params == known.params


@verb
def attach(world: World, before: Before, number: int, *, gate: str, seq: str, owner: str | None = None) -> None:
    known = _found(world, seq)
    if known is None:
        return
    must = world.ledger.known_problems(known, owner)
    if not must and not known.generating and known.last_end is None:
        must.add((WRONG, "rid"))
    sender = world.gates[gate]
    _read_on(world, sender, known, m.SeqAttach(world.next_req(), known.rid, owner), must)


def _read_on(world: World, sender: Sender, known: Known, message: Any, must: set[Problem]) -> None:
    """The answer is the output so far, and the rest goes to the sender."""
    answer = world.ask(sender, message, must)
    if answer is None:
        return
    output = list(unpack_i32(answer.output))
    assert (answer.prompt_tokens, answer.end) == (len(known.before), known.last_end)
    count = known.seen - len(known.before)
    assert output == known.output[:count]
    assert answer.params == known.params
    if known.generating:
        told = [(known.reader, known.rid)] if known.reader not in (0, sender.peer) else []
        assert world.replaced == told, f"{known.label}: {world.replaced} replaced, not {told}"
        world.replaced.clear()
        known.reader, known.read = sender.peer, count
        known.attended, known.orphan_since = True, None
    else:
        known.last_reader = sender.peer


@verb
def detach(world: World, before: Before, number: int, *, gate: str, seq: str) -> None:
    known = _found(world, seq)
    if known is not None:
        world.tell(world.gates[gate], m.SeqDetach(known.rid))
        if _reads(world, gate, known):
            known.reader = 0


def _reads(world: World, gate: str, known: Known) -> bool:
    return known.reason is None and known.generating and known.reader == world.gates[gate].peer


@verb
def cancel(world: World, before: Before, number: int, *, gate: str, seq: str, reason: int) -> None:
    known = _found(world, seq)
    if known is None:
        return
    message = m.SeqCancel(known.rid, reason)
    if reason not in (FinishReason.CANCELLED, FinishReason.TOKENIZER_FAILED):
        world.tell(world.gates[gate], message, {(INVALID, "reason")})
        return
    if _reads(world, gate, known):
        before.causes[known.rid] = FinishReason(reason)
    world.tell(world.gates[gate], message)


@verb
def finish(world: World, before: Before, number: int, *, gate: str, seq: str, upto: int) -> None:
    known = _found(world, seq)
    if known is None:
        return
    must: set[Problem] = set()
    reads = _reads(world, gate, known)
    late = known.reason is None and not known.generating and known.last_reader == world.gates[gate].peer
    if (reads or late) and not 0 <= upto <= known.seen - len(known.before):
        must.add((INVALID, "upto"))
    elif reads:
        before.causes[known.rid], before.cut[known.rid] = FinishReason.STOP, upto
    elif late and known.last_end is not None:
        usage = structs.replace(known.last_end.usage, output_tokens=upto)
        known.last_end = m.SeqEnd(known.rid, int(FinishReason.STOP), usage)
        del known.output[upto:]
        known.seen = len(known.before) + upto
    world.tell(world.gates[gate], m.SeqFinish(known.rid, upto), must)


@verb
def ack(world: World, before: Before, number: int, *, gate: str, seq: str, upto: int) -> None:
    known = _found(world, seq)
    if known is not None:
        if _reads(world, gate, known):
            known.acked = max(known.acked, min(upto, known.seen - len(known.before)))
        world.tell(world.gates[gate], m.SeqAck(known.rid, upto))


# ------------------------------------------------------------ what owners ask for


@verb
def kill(world: World, before: Before, number: int, *, gate: str, seq: str, owner: str | None = None) -> None:
    known = _found(world, seq)
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
    root = _found(world, job)
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
    known = _found(world, seq)
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
    known = _found(world, seq)
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
    known = _found(world, seq)
    if known is None:
        return
    must, may = _deadline_problems(deadline_ms, world.setup.max_context)
    must |= world.ledger.live_problems(known, owner)
    if known.reason is None and not known.generating:
        must.add((WRONG, "rid"))
    if _done(world, gate, m.Deadline(world.next_req(), known.rid, deadline_ms, owner), must, may):
        known.deadline = None if deadline_ms is None else world.now + deadline_ms / 1e3


@verb
def suspend(
    world: World, before: Before, number: int, *, gate: str, seq: str, pages: int, owner: str | None = None
) -> None:
    known = _found(world, seq)
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
    known = _found(world, seq)
    if known is None:
        return
    must = world.ledger.live_problems(known, owner)
    if _done(world, gate, m.Resume(world.next_req(), known.rid, owner), must):
        known.suspended = False


@verb
def after(
    world: World, before: Before, number: int, *, gate: str, seq: str, after: Any, owner: str | None = None
) -> None:
    known = _found(world, seq)
    if known is None:
        return
    first = _all_found(world, after)
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
    known = _found(world, seq)
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
