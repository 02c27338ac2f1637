"""The microkernel dies and comes back from its journal: nothing that anybody was told is lost or changed."""

from __future__ import annotations

import random

import pytest
from crash import Journaled
from kernel_world import CONTROL, GATEWAY, SUPERVISOR, World, params, token_at

from llmos.codes import ErrorCode, FinishReason, PageFate, SeqState
from llmos.microkernel import records
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.recovery import Fold, restore
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32


def make_world(**options: object) -> tuple[World, Journaled]:
    world = World(**options)
    journaled = Journaled(world)
    world.start_executor()
    return world, journaled


def check_all(world: World) -> None:
    for rid, stream in world.streams.items():
        assert stream.ids == stream.expected(len(stream.ids)), f"rid {rid}"


@pytest.mark.parametrize("carried", [False, True])
def test_running_waiting_and_ended_sequences_come_back(carried: bool):
    world, journaled = make_world(max_rows=3)
    rids = [world.submit([index, 2, 3], max_tokens=4 + index, seed=index) for index in range(8)]
    for _ in range(9):
        world.step()
    assert any(world.streams[rid].end for rid in rids)
    journaled.crash(carried=carried)
    world.run()
    check_all(world)
    assert [len(world.streams[rid].ids) for rid in rids] == [4 + index for index in range(8)]
    assert all(world.streams[rid].end.reason == FinishReason.LENGTH for rid in rids)


@pytest.mark.parametrize("carried", [False, True])
def test_conversations_forks_and_jobs_come_back(carried: bool):
    world, journaled = make_world()
    rid = world.spawn([1, 2, 3, 4, 5])
    world.run()
    world.continue_(rid, max_tokens=6, seed=9)
    world.run()
    kids = world.fork(rid, 2)
    world.continue_(kids[0], max_tokens=30, seed=3)
    child = world.submit([7], max_tokens=3, parent=rid, after=(kids[0],))
    world.ask(m.Suspend(world._next(), kids[1], PageFate.KEEP))
    world.ask(m.Nice(world._next(), kids[0], 5))
    for _ in range(4):
        world.step()
    world.append(rid, [8, 9])
    journaled.crash(carried=carried)
    stats = world.ask(m.Stat(world._next(), child))
    assert (stats.parent, stats.after, stats.job.job, stats.row.state) == (rid, (kids[0],), rid, SeqState.BLOCKED)
    assert world.ask(m.Stat(world._next(), kids[0])).row.nice == 5
    world.ask(m.Resume(world._next(), kids[1]))
    world.continue_(rid, max_tokens=4, seed=5)
    world.continue_(kids[1], max_tokens=4, seed=6)
    world.run()
    world.ask(m.Close(world._next(), kids[0]))
    world.run()
    check_all(world)
    assert (len(world.streams[kids[0]].ids), len(world.streams[child].ids)) == (30, 3)


def test_a_new_sequence_gets_a_new_number_and_another_seed():
    world, journaled = make_world()
    first = world.submit([1], max_tokens=2, seed=None)
    world.run()
    seed = world.kernel.state.ended[first].params.seed
    journaled.crash()
    second = world.submit([1], max_tokens=2, seed=None)
    assert second == first + 1
    assert world.kernel.state.sequences[second].params.seed != seed


def test_a_cut_turn_stays_cut():
    world, journaled = make_world()
    rid = world.spawn([1, 2, 3])
    world.continue_(rid, max_tokens=20)
    for _ in range(8):
        world.step()
    world.send(GATEWAY, m.SeqFinish(rid, 2))
    del world.streams[rid].ids[2:]
    journaled.crash()
    world.continue_(rid, max_tokens=3)
    world.run()
    assert len(world.streams[rid].prompt) == 5
    check_all(world)


def test_what_nobody_reads_again_ends_after_a_while_and_what_is_read_does_not():
    world, journaled = make_world(num_pages=200)
    lost, read = (world.submit([index], max_tokens=None, seed=index) for index in range(2))
    world.step()
    journaled._read_on = lambda: None
    journaled.crash()
    world.attach(read)
    world.now += 31.0
    world._deliver(world.kernel.tick(world.now))
    assert world.kernel.state.ended[lost].reason is FinishReason.CANCELLED
    assert read in world.kernel.state.sequences


def test_a_gateway_that_died_leaves_its_sequences_to_the_next():
    world = World()
    world.start_executor()
    rid = world.submit([1, 2, 3], max_tokens=12)
    for _ in range(5):
        world.step()
    world._deliver(world.kernel.peer_down(GATEWAY.peer, world.now))
    world.step()
    world.attach(rid)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(12)


def test_a_model_that_is_not_served_any_more_ends_its_sequences():
    world, journaled = make_world()
    rid = world.submit([1, 2, 3], max_tokens=12)
    journaled.take()
    fold = Fold()
    for frame in journaled.frames:
        fold.add(records.decode(frame))
    kernel = Kernel(world.limits, world.kernel.state.scheduling, ("other",), 2, 0.0)
    restore(kernel.state, fold, 0.0, 0.0)
    kernel.check()
    assert kernel.state.ended[rid].reason is FinishReason.EXECUTOR_LOST


def test_the_same_request_again_finds_its_sequence_also_after_a_crash():
    world, journaled = make_world()
    submit = m.SeqSubmit(1, "demo", pack_i32([1, 2]), params(max_tokens=4), "alice", "key-1", 0, 60_000.0)
    world._pending_submits[1] = world.streams.setdefault(0, None) or type("S", (), {})()
    first = world.kernel.handle(GATEWAY, submit, 0.0)[0].message
    again = m.SeqSubmit(7, "demo", pack_i32([1, 2]), params(max_tokens=4), "alice", "key-1", 0, 59_000.0)
    assert world.kernel.handle(GATEWAY, again, 0.0)[0].message == m.SeqAccepted(7, first.rid, existing=True)
    other = m.SeqSubmit(8, "demo", pack_i32([1, 3]), params(max_tokens=4), "alice", "key-1")
    refused = world.kernel.handle(GATEWAY, other, 0.0)[0].message
    assert (refused.code, refused.field, refused.rid) == (ErrorCode.INVALID_REQUEST, "client_request_id", first.rid)
    theirs = m.SeqSubmit(9, "demo", pack_i32([1, 3]), params(max_tokens=4), "bob", "key-1")
    assert world.kernel.handle(GATEWAY, theirs, 0.0)[0].message.existing is False
    world.streams.clear()
    journaled.take()
    fold = Fold()
    for frame in journaled.frames:
        fold.add(records.decode(frame))
    kernel = Kernel(world.limits, world.kernel.state.scheduling, ("demo",), 2, 0.0)
    restore(kernel.state, fold, 0.0, 0.0)
    assert kernel.handle(GATEWAY, again, 0.0)[0].message == m.SeqAccepted(7, first.rid, existing=True)


def test_times_are_moved_to_the_clock_of_another_boot():
    world, journaled = make_world(max_rows=1)
    world.submit([1], max_tokens=50)
    rid = world.submit([2], max_tokens=3, deadline_ms=60_000.0)
    world.now = 10.0
    journaled.take()
    fold = Fold()
    for frame in journaled.frames:
        fold.add(records.decode(frame))
    kernel = Kernel(world.limits, world.kernel.state.scheduling, ("demo",), 2, 1000.0)
    restore(kernel.state, fold, 985.0, 1000.0)  # booted anew: what was 10.0 is 995.0 now
    seq = kernel.state.sequences[rid]
    assert (seq.accepted_at, seq.deadline) == (985.0, pytest.approx(985.0 + 60.0))


def test_new_work_is_refused_while_it_can_not_be_written_down():
    world, _ = make_world()
    rid = world.spawn([1, 2, 3])
    world.kernel.state.refusal = "the journal can not be written: no space"
    for message in (
        m.SeqSubmit(1, "demo", pack_i32([1]), params(), "alice"),
        m.SeqSpawn(2, "demo", pack_i32([1]), "alice"),
        m.SeqAppend(3, rid, "demo", pack_i32([1])),
        m.SeqContinue(4, rid, "demo", params()),
    ):
        assert world.ask(message, GATEWAY).code == ErrorCode.UNAVAILABLE
    assert world.ask(m.Fork(5, rid)).code == ErrorCode.UNAVAILABLE
    assert world.ask(m.Kill(6, rid)).rids == (rid,)
    assert SUPERVISOR.role != CONTROL.role


@pytest.mark.parametrize("seed", range(12))
def test_a_crash_after_any_event_of_a_random_life(seed: int):
    """Every few events the microkernel is killed; half the times from a carried segment, half from all records."""
    rng = random.Random(seed)
    world, journaled = make_world(
        num_pages=40, page_size=rng.choice([1, 2, 4]), max_rows=rng.randint(1, 6), host_pages=rng.choice([0, 20]),
        steps_in_flight=rng.randint(1, 3), prefix_cache=rng.random() < 0.7,
    )  # fmt: skip
    for _ in range(250):
        _event(world, rng)
        if rng.random() < 0.08:
            journaled.crash(carried=rng.random() < 0.5)
    for _ in range(60):
        world.run()
        for rid, seq in list(world.kernel.state.sequences.items()):
            end = m.Close if seq.is_open and not seq.generating else m.Resume
            world.ask(end(world._next(), rid))
    check_all(world)
    assert not any(seq.generating for seq in world.kernel.state.sequences.values())


def _event(world: World, rng: random.Random) -> None:
    live = [seq for seq in world.kernel.state.sequences.values()]
    seq = rng.choice(live) if live else None
    kind = rng.random()
    if kind < 0.10 and len(live) < 12:
        after = tuple(other.rid for other in live[:1]) if rng.random() < 0.2 else ()
        world.submit([rng.randrange(50)] * rng.randint(1, 6), max_tokens=rng.randint(1, 20), seed=rng.randrange(9),
                     after=after, parent=seq.rid if seq and rng.random() < 0.3 else None)  # fmt: skip
    elif kind < 0.14 and len(live) < 12:
        world.spawn([rng.randrange(50) for _ in range(rng.randint(0, 8))])
    elif kind < 0.20 and seq and seq.is_open and not seq.generating and len(seq.tokens) < 25:
        world.append(seq.rid, [rng.randrange(50)])
    elif kind < 0.28 and seq and seq.is_open and not seq.generating and 0 < len(seq.tokens) < 25:
        world.continue_(seq.rid, max_tokens=rng.randint(1, 8), seed=rng.randrange(9))
    elif kind < 0.32 and seq and len(live) < 12:
        for kid in world.fork(seq.rid, rng.randint(1, 2)):
            if world.kernel.state.sequences[kid].generating:
                world.attach(kid)
    elif kind < 0.36 and seq:
        world.ask(m.Suspend(world._next(), seq.rid, rng.choice(list(PageFate))))
    elif kind < 0.42 and seq:
        world.ask(m.Resume(world._next(), seq.rid))
    elif kind < 0.44 and seq:
        world.ask(m.Kill(world._next(), seq.rid))
    elif kind < 0.46 and seq and seq.generating and world.streams[seq.rid].ids:
        upto = rng.randint(0, len(world.streams[seq.rid].ids))
        world.send(GATEWAY, m.SeqFinish(seq.rid, upto))
        del world.streams[seq.rid].ids[upto:]
    else:
        world.step()


@pytest.mark.parametrize("stop", [False, True])
def test_an_end_that_was_not_written_any_more_follows_from_the_tokens(stop: bool):
    """Killed in the middle of a write: the last token is in the journal, its end is not."""
    world, journaled = make_world()
    ids = [token_at(3, 2 + at) for at in range(6)]
    rid = world.submit([1, 2], max_tokens=20 if stop else 6, seed=3, stop_token_ids=(ids[5],) if stop else ())
    world.run()
    journaled.take()
    fold = Fold()
    for frame in journaled.frames:
        if not isinstance(record := records.decode(frame), records.EndRecord):
            fold.add(record)
    kernel = Kernel(world.limits, world.kernel.state.scheduling, ("demo",), 2, world.now)
    restore(kernel.state, fold, 0.0, world.now)
    kernel.check()
    seq = kernel.state.ended[rid]
    assert seq.reason is (FinishReason.STOP if stop else FinishReason.LENGTH)
    assert list(seq.tokens[2:]) == ids
    assert seq.end.usage.output_tokens == 6


def test_who_waited_for_one_that_ended_badly_ends_if_it_was_not_told():
    world, journaled = make_world()
    first = world.submit([1, 2], max_tokens=20)
    second = world.submit([3], max_tokens=5, after=(first,))
    world.ask(m.Kill(world._next(), first))
    journaled.take()
    fold = Fold()
    for frame in journaled.frames:
        record = records.decode(frame)
        if not (isinstance(record, records.EndRecord) and record.rid == second):
            fold.add(record)
    kernel = Kernel(world.limits, world.kernel.state.scheduling, ("demo",), 2, world.now)
    restore(kernel.state, fold, 0.0, world.now)
    kernel.check()
    assert kernel.state.ended[second].reason is FinishReason.DEPENDENCY
