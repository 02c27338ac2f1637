"""Events of turns and streams: append, continue, attach, and how outputs end."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from llmos.codes import ErrorCode, FinishReason
from llmos.microkernel.sender import Sender
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32
from simulation.before import Before
from simulation.ledger import INVALID, WRONG, Known, Problem
from simulation.verbs import (
    capacity,
    deadline_problems,
    known_as,
    prompt_of,
    queue_problems,
    refusal,
    room_of,
    sampling_of,
    seeded,
    verb,
)
from simulation.world import World

# ------------------------------------------------------------ turns and streams


@verb
def append(
    world: World, before: Before, number: int, *, gate: str, seq: str, prompt: list[int], owner: str | None = None,
    expect: int | None = None,
) -> None:  # fmt: skip
    """`expect`: how long it is, so that asking again does not append again."""
    known = known_as(world, seq)
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
    must = _length_problems(known, expect) | world.ledger.rest_problems(known, owner) | refusal(world)
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
    known = known_as(world, seq)
    if known is None:
        return
    chosen, sender = sampling_of(sampling), world.gates[gate]
    must, may = deadline_problems(deadline_ms, world.setup.max_context)
    has_begun = known.generating or (known.last_end is not None and known.output)
    message = m.SeqContinue(world.next_req(), known.rid, known.model, chosen, deadline_ms, owner, expect)
    if has_begun and expect == len(known.before):
        _read_on(world, sender, known, message, world.ledger.known_problems(known, owner))
        return
    must |= world.ledger.rest_problems(known, owner) | refusal(world) | _length_problems(known, expect)
    total = len(known.before) + len(known.output)
    room = 0
    if known.reason is None:
        room = capacity(world, known.model, known.owner) - total
        if not total:
            must.add((WRONG, "rid"))
        if room < 1:
            must.add((ErrorCode.CONTEXT_TOO_LONG, "rid"))
        must |= queue_problems(world, known.model, known.owner)
    answer = world.ask(sender, message, must, may)
    if answer is None:
        return
    known.before, known.output = known.before + known.output, []
    known.reader, known.read, known.touched = sender.peer, 0, world.now
    known.deadline = None if deadline_ms is None else world.now + deadline_ms / 1e3
    known.begin(seeded(world, known, chosen), room_of(chosen, room), [], world.now)
    assert (answer.prompt_tokens, answer.output, answer.end) == (total, b"", None)
    assert answer.params == known.params


@verb
def attach(world: World, before: Before, number: int, *, gate: str, seq: str, owner: str | None = None) -> None:
    known = known_as(world, seq)
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
    known = known_as(world, seq)
    if known is not None:
        world.tell(world.gates[gate], m.SeqDetach(known.rid))
        if _reads(world, gate, known):
            known.reader = 0


def _reads(world: World, gate: str, known: Known) -> bool:
    return known.reason is None and known.generating and known.reader == world.gates[gate].peer


@verb
def cancel(world: World, before: Before, number: int, *, gate: str, seq: str, reason: int) -> None:
    known = known_as(world, seq)
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
    known = known_as(world, seq)
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
    known = known_as(world, seq)
    if known is not None:
        if _reads(world, gate, known):
            known.acked = max(known.acked, min(upto, known.seen - len(known.before)))
        world.tell(world.gates[gate], m.SeqAck(known.rid, upto))
