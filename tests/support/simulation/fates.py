"""What must hold of each sequence after every event: it is where it may be, its tokens are the known answer, it ended for a reason or goes
on, and the times that `explain` tells are those that were seen.
"""

from __future__ import annotations

from llmos.codes import FinishReason, SeqState
from llmos.microkernel import report
from llmos.microkernel.jobs import ended_well
from llmos.microkernel.sequence import Sequence
from llmos.protocol.messages import Explained
from simulation.before import Before
from simulation.ledger import Known
from simulation.setup import NO_WINDOW
from simulation.world import World

_NATURAL = (FinishReason.STOP, FinishReason.LENGTH)
_EPSILON = 1e-6


def check_end(world: World, known: Known, before: Before) -> None:
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


def check_live(world: World, known: Known, seq: Sequence, before: Before) -> None:
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


def is_unread(world: World, known: Known) -> bool:
    """Is its reader so far behind that it may not run on?"""
    return bool(known.reader) and known.seen - len(known.before) >= known.acked + world.setup.window
