"""What each kind of event does to the world, and what must follow: refusals, ends, new readers. One function per kind.

Each gets the world, what was remembered in front of the event, its number, and its arguments. They are entered in `VERBS` by kind; this
file has what they share, and those of sequences' beginnings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernel_world import VOCAB, params
from msgspec import structs

from llmos.codes import ErrorCode
from llmos.microkernel.sender import Sender
from llmos.microkernel.sequence import Sequence
from llmos.protocol import messages as m
from llmos.protocol.codec import encode, pack_i32
from llmos.protocol.limits import MAX_FORKS, MAX_NICE, MIN_NICE
from llmos.protocol.params import SamplingParams
from simulation.before import Before
from simulation.ledger import INVALID, Known, Problem
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


def _beginning(world: World, again: list[Any] | None) -> list[int]:
    """The first tokens of what another sequence was asked and answered, as a client sends a conversation anew: [label, how many]."""
    known = known_as(world, again[0]) if again else None
    return (known.before + known.output)[: min(again[1], known.seen)] if again and known is not None else []


def sequence(world: World, known: Known) -> Sequence:
    """What the microkernel knows of it."""
    state = world.kernel.state
    return state.sequences.get(known.rid) or state.ended[known.rid]


def known_as(world: World, label: str | None) -> Known | None:
    return None if label is None else world.ledger.by_label.get(label)


def all_known_as(world: World, labels: list[str]) -> list[Known]:
    return [known for label in labels if (known := known_as(world, label)) is not None]


# ------------------------------------------------------------ what may be refused


def capacity(world: World, model: str, owner: str) -> int:
    """Most tokens that a sequence can ever have."""
    num_pages = world.shapes[model][0] - world.ledger.guaranteed_to_others(owner)
    num_pages = min(num_pages, world.ledger.limits_of(owner).max_pages)
    return min(world.setup.max_context, num_pages * world.setup.page_size)


def queue_problems(world: World, model: str, owner: str, more: int = 1) -> set[Problem]:
    scheduler = world.scheduler(model)
    assert scheduler is not None
    full = len(scheduler.queue) + more > world.setup.max_waiting
    full |= scheduler.tenants.get(owner).waiting + more > world.ledger.limits_of(owner).max_waiting
    return {(ErrorCode.OVERLOADED, None)} if full else set()


def deadline_problems(deadline_ms: float | None, tokens: int) -> tuple[set[Problem], set[Problem]]:
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
    problems = queue_problems(world, model, owner) | refusal(world)
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
    request_id: str | None = None, again: list[Any] | None = None,
) -> None:  # fmt: skip
    tokens, chosen = _beginning(world, again) + prompt_of(*prompt), sampling_of(sampling)
    root, first = known_as(world, parent), all_known_as(world, after)
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
    must, may = deadline_problems(deadline_ms, world.setup.max_context)
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
    known.begin(seeded(world, known, chosen), room_of(chosen, room), [], world.now)


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


def refusal(world: World) -> set[Problem]:
    return {(ErrorCode.UNAVAILABLE, None)} if world.ledger.refusal else set()


@verb
def spawn(
    world: World, before: Before, number: int, *, gate: str, model: str, owner: str, prompt: list[int], nice: int = 0,
    parent: str | None = None, after: Any = (), request_id: str | None = None, again: list[Any] | None = None,
) -> None:  # fmt: skip
    tokens = _beginning(world, again) + prompt_of(*prompt)
    root, first = known_as(world, parent), all_known_as(world, after)
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


def sampling_of(sampling: dict[str, Any]) -> SamplingParams:
    return params(**(sampling | {"stop_token_ids": tuple(sampling.get("stop_token_ids", ()))}))


def room_of(chosen: SamplingParams, room: int) -> int:
    return room if chosen.max_tokens is None else min(chosen.max_tokens, room)


def seeded(world: World, known: Known, asked: SamplingParams) -> SamplingParams:
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
    known = known_as(world, seq)
    if known is None:
        return
    must = world.ledger.live_problems(known, owner) | refusal(world)
    if not 1 <= count <= MAX_FORKS:
        must.add((INVALID, "count"))
    if not must and sequence(world, known).has_work:
        must = queue_problems(world, known.model, known.owner, count)
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
