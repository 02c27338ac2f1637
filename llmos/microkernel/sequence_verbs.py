"""What gateways ask for sequences: submit, spawn, append, continue, attach, and how streams end. One function per message."""

from __future__ import annotations

from hashlib import blake2b

from msgspec import structs

from llmos.codes import FinishReason
from llmos.errors import InvalidRequest, WrongState
from llmos.microkernel import admission
from llmos.microkernel.records import AppendRecord, TurnRecord
from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.sender import Sender
from llmos.microkernel.sequence import GENERATES, NOBODY, PREFILL_ONLY, Sequence
from llmos.microkernel.state import State
from llmos.microkernel.verb_table import VerbTable
from llmos.protocol import checks
from llmos.protocol import messages as m
from llmos.protocol.codec import encode, pack_i32, unpack_i32
from llmos.protocol.params import SamplingParams

VERBS = VerbTable()


@VERBS.handles(m.SeqSubmit)
def submit(state: State, sender: Sender, message: m.SeqSubmit, now: float) -> None:
    """A one-shot sequence."""
    if _is_known(state, sender, message):
        return
    state.check_accepting()
    lane = state.lane(message.model)
    scheduler, executor = lane.up()
    tokens = unpack_i32(message.prompt)
    admission.check_prompt(tokens, executor.vocab_size)
    admission.check_names(message.owner, message.client_request_id)
    checks.check_nice(message.nice)
    checks.check_after(message.after)
    tenant = lane.tenants.get(message.owner)
    admission.check_params(message.params)
    admission.check_kind(message.model, executor, message.second_at, len(tokens))
    room = admission.room_for_output(len(tokens), message.params, message.second_at, executor, lane.pages_for(tenant))
    admission.check_queues(scheduler, state.limits.max_waiting, tenant)
    admission.check_deadline(message.deadline_ms, scheduler.least_time(len(tokens), room))
    predecessors = state.predecessors(message.after, message.owner)
    rid = state.next_rid()
    job = state.job_for(rid, message.owner, message.parent)
    seq = Sequence(
        rid=rid,
        owner=message.owner,
        model=message.model,
        reader=sender.peer,
        tokens=tokens,
        prompt_len=len(tokens),
        max_len=len(tokens) + room,
        params=_seeded(state, message.params),
        accepted_at=now,
        job=job,
        parent=message.parent,
        client_request_id=message.client_request_id,
        request_digest=_digest(message),
        nice=message.nice,
        deadline=_moment(message.deadline_ms, now),
        generating=True,
        attended=True,
        second_at=message.second_at,
    )
    state.enter(seq, scheduler, predecessors, now)
    state.outbox.send(sender.peer, m.SeqAccepted(message.req, rid))


@VERBS.handles(m.SeqSpawn)
def spawn(state: State, sender: Sender, message: m.SeqSpawn, now: float) -> None:
    """An open sequence."""
    if _is_known(state, sender, message):
        return
    state.check_accepting()
    lane = state.lane(message.model)
    scheduler, executor = lane.up()
    tokens = unpack_i32(message.prompt)
    admission.check_names(message.owner, message.client_request_id)
    checks.check_nice(message.nice)
    checks.check_after(message.after)
    tenant = lane.tenants.get(message.owner)
    admission.check_kind(message.model, executor, GENERATES, len(tokens))
    if tokens:
        admission.check_prompt(tokens, executor.vocab_size)
        admission.check_length(len(tokens), executor, lane.pages_for(tenant))
    admission.check_queues(scheduler, state.limits.max_waiting, tenant)
    predecessors = state.predecessors(message.after, message.owner)
    rid = state.next_rid()
    seq = Sequence(
        rid=rid,
        owner=message.owner,
        model=message.model,
        reader=NOBODY,
        tokens=tokens,
        prompt_len=len(tokens),
        max_len=len(tokens),
        params=PREFILL_ONLY,
        accepted_at=now,
        job=state.job_for(rid, message.owner, message.parent),
        parent=message.parent,
        client_request_id=message.client_request_id,
        request_digest=_digest(message),
        nice=message.nice,
        is_open=True,
        wants_prefill=len(tokens) > 1,
    )
    state.enter(seq, scheduler, predecessors, now)
    state.outbox.send(sender.peer, m.SeqAccepted(message.req, rid))


@VERBS.handles(m.SeqAppend)
def append(state: State, sender: Sender, message: m.SeqAppend, now: float) -> None:
    """More input for an open sequence at rest; it is computed ahead of the next turn."""
    tokens = unpack_i32(message.tokens)
    if message.expect is not None:
        seq = state.known(message.rid, message.owner)
        end = message.expect + len(tokens)
        if seq.tokens[message.expect : end] == tokens:
            state.outbox.send(sender.peer, m.SeqAppended(message.req, seq.rid, end))
            return
        _check_length(seq, message.expect)
    state.check_accepting()
    seq, scheduler = _at_rest(state, message.rid, message.owner, message.model)
    lane = state.lane(seq.model)
    _, executor = lane.up()
    admission.check_prompt(tokens, executor.vocab_size, field="tokens")
    pages = lane.pages_for(lane.tenants.get(seq.owner))
    admission.check_length(len(seq.tokens) + len(tokens), executor, pages, field="tokens")
    scheduler.residents.rest(seq, now)
    seq.append(tokens)
    state.note(AppendRecord(seq.rid, message.tokens))
    scheduler.residents.wake(seq, now)
    state.touch(seq, now)
    state.outbox.send(sender.peer, m.SeqAppended(message.req, seq.rid, len(seq.tokens)))


@VERBS.handles(m.SeqContinue)
def continue_(state: State, sender: Sender, message: m.SeqContinue, now: float) -> None:
    """An open sequence at rest begins a turn, and the sender reads."""
    if message.expect is not None:
        seq = state.known(message.rid, message.owner)
        has_begun = seq.generating or (seq.end is not None and seq.num_output > 0)
        if has_begun and seq.prompt_len == message.expect:
            attach(state, sender, m.SeqAttach(message.req, seq.rid, message.owner), now)
            return
        _check_length(seq, message.expect)
    state.check_accepting()
    seq, scheduler = _at_rest(state, message.rid, message.owner, message.model)
    if not seq.tokens:
        raise WrongState(f"sequence {seq.rid} has no tokens to go on from", field="rid", rid=seq.rid)
    lane = state.lane(seq.model)
    _, executor = lane.up()
    tenant = lane.tenants.get(seq.owner)
    admission.check_params(message.params)
    if message.params.prompt_logprobs is not None:
        text = "prompt_logprobs: not for an open sequence, whose tokens are computed already"
        raise InvalidRequest(text, field="prompt_logprobs", rid=seq.rid)
    room = admission.longest_output(len(seq.tokens), message.params, executor, lane.pages_for(tenant), field="rid")
    admission.check_queues(scheduler, state.limits.max_waiting, tenant)
    admission.check_deadline(message.deadline_ms, scheduler.least_time(len(seq.tokens) - seq.kept_tokens, room))
    params = _seeded(state, message.params)
    scheduler.residents.rest(seq, now)
    seq.begin_turn(params, room, sender.peer, now)
    seq.deadline = _moment(message.deadline_ms, now)
    state.note_deadline(seq)
    state.note(TurnRecord(seq.rid, params, seq.max_len, seq.deadline, now))
    scheduler.residents.wake(seq, now)
    state.touch(seq, now)
    attached = m.SeqAttached(message.req, seq.rid, seq.model, seq.prompt_len, params, b"")
    state.outbox.send(sender.peer, attached)


@VERBS.handles(m.SeqAttach)
def attach(state: State, sender: Sender, message: m.SeqAttach, now: float) -> None:
    """The sender reads a sequence from now on, and gets its output so far."""
    seq = state.known(message.rid, message.owner)
    if seq.generating:
        state.read_by(seq, sender.peer, now)
    elif seq.end is None:
        raise WrongState(f"sequence {seq.rid} has no output yet", field="rid", rid=seq.rid)
    else:
        seq.last_reader = sender.peer  # it may have a stop string to find in it yet
    output = pack_i32(seq.tokens[seq.prompt_len :])
    end = None if seq.generating else seq.end
    attached = m.SeqAttached(
        message.req, seq.rid, seq.model, seq.prompt_len, seq.params, output, end, seq.result.tobytes()
    )
    state.outbox.send(sender.peer, attached)


@VERBS.handles(m.SeqDetach)
def detach(state: State, sender: Sender, message: m.SeqDetach, now: float) -> None:
    """The sender does not read any more; the sequence goes on. Idempotent."""
    seq = _read_by(state, message.rid, sender)
    if seq is not None:
        state.read_by(seq, NOBODY, now)


@VERBS.handles(m.SeqCancel)
def cancel(state: State, sender: Sender, message: m.SeqCancel, now: float) -> None:
    """Idempotent: it may have ended meanwhile."""
    if message.reason not in (FinishReason.CANCELLED, FinishReason.TOKENIZER_FAILED):
        raise InvalidRequest(f"reason {message.reason} is not for gateways", field="reason")
    seq = _read_by(state, message.rid, sender)
    if seq is not None:
        state.end_output(seq, FinishReason(message.reason), now)


@VERBS.handles(m.SeqFinish)
def stop_string(state: State, sender: Sender, message: m.SeqFinish, now: float) -> None:
    """The text ends before output token `upto`. It may come when the turn is over, but not after new input."""
    seq = state.sequences.get(message.rid)
    if seq is None or sender.peer != (seq.reader if seq.generating else seq.last_reader):
        return
    if not 0 <= message.upto <= seq.num_output:
        raise InvalidRequest(f"upto {message.upto} is outside [0, {seq.num_output}]", field="upto", rid=seq.rid)
    if seq.generating:
        state.end_output(seq, FinishReason.STOP, now, message.upto)
    elif seq.end is not None:
        state.cut_output(seq, message.upto, now)


@VERBS.handles(m.SeqAck)
def ack(state: State, sender: Sender, message: m.SeqAck, now: float) -> None:
    """The client has read output below `upto`."""
    seq = _read_by(state, message.rid, sender)
    scheduler = state.lanes[seq.model].scheduler if seq is not None else None
    if seq is not None and scheduler is not None:
        seq.acked = max(seq.acked, min(message.upto, seq.num_output))
        scheduler.residents.note_read(seq, now)


def _is_known(state: State, sender: Sender, message: m.SeqSubmit | m.SeqSpawn) -> bool:
    """Was this asked before under the same id? Then the answer is the sequence that was made for it."""
    known = state.requested(message.owner, message.client_request_id)
    if known is None:
        return False
    if known.request_digest != _digest(message):
        text = f"client_request_id: {message.client_request_id!r} was used for another request (sequence {known.rid})"
        raise InvalidRequest(text, field="client_request_id", rid=known.rid)
    state.outbox.send(sender.peer, m.SeqAccepted(message.req, known.rid, existing=True))
    return True


def _digest(message: m.SeqSubmit | m.SeqSpawn) -> bytes:
    """Of everything that was asked for, but for the sender's own number and the time that is left."""
    if message.client_request_id is None:
        return b""
    asked = structs.replace(message, req=0)
    if isinstance(asked, m.SeqSubmit):
        asked = structs.replace(asked, deadline_ms=None)
    return blake2b(encode(asked), digest_size=16).digest()


def _seeded(state: State, params: SamplingParams) -> SamplingParams:
    """With a seed. Nothing may be refused after it was drawn: the journal counts seeds by what was made with them."""
    return params if params.seed is not None else structs.replace(params, seed=state.draw_seed())


def _moment(deadline_ms: float | None, now: float) -> float | None:
    return None if deadline_ms is None else now + deadline_ms / 1e3


def _at_rest(state: State, rid: int, owner: str | None, model: str) -> tuple[Sequence, Scheduler]:
    """An open sequence of `model` that does not generate."""
    seq, scheduler = state.live(rid, owner)
    if not seq.is_open:
        raise WrongState(f"sequence {rid} is not open: it ends with its output", field="rid", rid=rid)
    if seq.generating:
        raise WrongState(f"sequence {rid} is generating", field="rid", rid=rid)
    if seq.model != model:
        raise InvalidRequest(f"sequence {rid} is of model {seq.model!r}, not {model!r}", field="model", rid=rid)
    return seq, scheduler


def _check_length(seq: Sequence, expect: int) -> None:
    """What is asked for again can only be done if nothing else was done meanwhile."""
    if len(seq.tokens) != expect:
        raise WrongState(f"sequence {seq.rid} has {len(seq.tokens)} tokens, not {expect}", field="rid", rid=seq.rid)


def _read_by(state: State, rid: int, sender: Sender) -> Sequence | None:
    """A live sequence that generates for this sender; anything else is late news."""
    seq = state.sequences.get(rid)
    return seq if seq is not None and seq.generating and seq.reader == sender.peer else None
