"""nice, suspend, resume, deadlines, explain: what an owner can do to a live sequence."""

from __future__ import annotations

from array import array

import pytest
from kernel_world import CONTROL, World

from llmos.codes import ErrorCode, FinishReason, PageFate, SeqState
from llmos.protocol import messages as m


def make_world(**shape: object) -> World:
    world = World(**shape)
    world.start_executor()
    return world


def state_of(world: World, rid: int) -> SeqState:
    return world.kernel.state.sequences[rid].state


def test_suspended_with_pages_goes_on_where_it_was():
    world = make_world()
    rid = world.submit([1, 2, 3, 4, 5], max_tokens=20)
    for _ in range(6):
        world.step()
    world.send(CONTROL, m.Suspend(1, rid))
    assert world.replies.pop() == m.Done(1, rid)
    world.run()
    paused = len(world.streams[rid].ids)
    assert state_of(world, rid) is SeqState.SUSPENDED
    computed = world.executor.computed_tokens
    world.send(CONTROL, m.Resume(2, rid))
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(20)
    assert world.executor.computed_tokens - computed == 20 - paused  # nothing was computed twice
    assert world.row_add(rid).num_computed == 5 + paused - 1


def test_suspended_without_pages_gives_them_back_and_recomputes():
    world = make_world(prefix_cache=False)
    rid = world.submit([1, 2, 3, 4, 5], max_tokens=20)
    for _ in range(6):
        world.step()
    world.send(CONTROL, m.Suspend(1, rid, pages=PageFate.DROP))
    world.run()
    assert world.kernel.state.lanes["demo"].status().pages_free == 64
    world.send(CONTROL, m.Resume(2, rid))
    world.run()
    assert world.row_add(rid).num_computed == 0
    assert world.streams[rid].ids == world.streams[rid].expected(20)


def test_kept_pages_are_taken_when_somebody_else_needs_them():
    world = make_world(num_pages=8, page_size=4, prefix_cache=False)
    sleeper = world.submit(list(range(12)), max_tokens=8)
    for _ in range(3):
        world.step()
    world.send(CONTROL, m.Suspend(1, sleeper))
    world.run()
    other = world.submit(list(range(20)), max_tokens=8, seed=3)
    world.run()
    assert world.streams[other].end.usage.preemptions == 0
    assert world.kernel.state.sequences[sleeper].page_table == array("i")
    world.send(CONTROL, m.Resume(2, sleeper))
    world.run()
    assert world.streams[sleeper].ids == world.streams[sleeper].expected(8)


def test_suspend_and_resume_are_idempotent_in_every_state():
    world = make_world(max_rows=1)
    running = world.submit([1, 2, 3], max_tokens=10)
    waiting = world.submit([4, 5, 6], max_tokens=10, seed=8)
    for rid in (running, waiting, running, waiting):
        world.send(CONTROL, m.Suspend(1, rid))
    world.run()
    for rid in (waiting, running, waiting, running):
        world.send(CONTROL, m.Resume(1, rid))
    world.run()
    for rid in (running, waiting):
        assert world.streams[rid].ids == world.streams[rid].expected(10)


def test_a_suspended_sequence_can_be_killed():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=100)
    world.step()
    world.send(CONTROL, m.Suspend(1, rid))
    world.send(CONTROL, m.Kill(2, rid))
    world.run()
    assert world.streams[rid].end.reason == FinishReason.KILLED
    status = world.kernel.state.lanes["demo"].status()
    assert status.pages_free + status.pages_cached == status.pages_total


def test_suspended_sequences_survive_a_new_executor_generation():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=12)
    for _ in range(4):
        world.step()
    world.send(CONTROL, m.Suspend(1, rid))
    world.start_executor()
    assert state_of(world, rid) is SeqState.SUSPENDED
    world.send(CONTROL, m.Resume(2, rid))
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(12)


def test_better_nice_is_admitted_first_and_renice_moves_a_waiting_sequence():
    world = make_world(max_rows=1)
    world.submit([1], max_tokens=5)
    batch, normal, urgent = (world.submit([2, 20 + i], max_tokens=2, nice=i) for i in (15, 0, -20))
    last = world.submit([3], max_tokens=2, nice=19)
    world.send(CONTROL, m.Nice(1, last, -20))
    world.run()
    order = sorted((batch, normal, urgent, last), key=lambda rid: next(
        i for i, plan in enumerate(world.plans) if any(add.rid == rid for add in plan.row_adds)))  # fmt: skip
    assert order == [urgent, last, normal, batch]


def test_ageing_bounds_how_long_a_batch_job_waits():
    world = make_world(max_rows=1, ageing_s=0.05)
    world.submit([1], max_tokens=2)
    batch = world.submit([2], max_tokens=2, nice=19)
    for index in range(60):  # urgent work never ends; every step is 0.01 s
        world.submit([3, index], max_tokens=2, nice=-20, seed=index)
    for _ in range(60):
        world.step()
    assert world.streams[batch].end is not None  # 4 classes x 0.05 s, then its turn by arrival among the urgent


def test_nice_out_of_range_is_refused():
    world = make_world()
    rid = world.submit([1], max_tokens=50)
    world.send(CONTROL, m.Nice(4, rid, 20))
    error = world.replies.pop()
    assert (error.code, error.field) == (ErrorCode.INVALID_REQUEST, "nice")


def test_the_victim_is_the_worst_class_not_the_newest():
    world = make_world(num_pages=12, page_size=4)
    humble = world.submit([1, 2, 3], max_tokens=40, nice=19)
    urgent = [world.submit([seed, 2, 3], max_tokens=40, seed=seed, nice=-20) for seed in range(2)]
    world.run()
    assert world.streams[humble].end.usage.preemptions > 0
    assert world.streams[urgent[0]].end.usage.preemptions == 0


def test_deadline_ends_who_still_waits_and_spares_who_has_begun():
    world = make_world(max_rows=1)
    runs = world.submit([1], max_tokens=30, deadline_ms=50.0)
    waits = world.submit([2], max_tokens=30, deadline_ms=60.0)
    world.run()
    assert world.streams[runs].end.reason == FinishReason.LENGTH
    assert world.streams[waits].end.reason == FinishReason.DEADLINE
    assert world.streams[waits].ids == []
    assert world.kernel.state.lanes["demo"].scheduler.counters.deadline_misses == 2


def test_earlier_deadline_first_within_a_tenant():
    world = make_world(max_rows=1)
    world.submit([1], max_tokens=5)
    late = world.submit([2], max_tokens=2, deadline_ms=60_000.0)
    soon = world.submit([3], max_tokens=2, deadline_ms=30_000.0)
    world.run()
    adds = [add.rid for plan in world.plans for add in plan.row_adds]
    assert adds.index(soon) < adds.index(late)


def test_a_deadline_that_can_not_be_met_is_refused():
    world = make_world()
    world.submit([1], max_tokens=5)
    world.run()
    world.kernel.state.lanes["demo"].scheduler.residents.costs.step_s = 0.01  # as measured: 10 ms a step
    with pytest.raises(AssertionError, match="deadline_ms"):
        world.submit([1], max_tokens=100, deadline_ms=500.0)
    world.submit([1], max_tokens=100, deadline_ms=5000.0)


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("inf"), float("nan")])
def test_nonsense_deadlines_are_refused(deadline):
    world = make_world()
    with pytest.raises(AssertionError, match="deadline_ms"):
        world.submit([1], max_tokens=2, deadline_ms=deadline)


def test_explain_adds_up_to_the_age():
    world = make_world(max_rows=1, window=6)
    first = world.submit([1, 2, 3], max_tokens=6)
    rid = world.submit([4, 5, 6], max_tokens=30)
    world.run()  # the first ends, the second stalls on its unread window
    world.now += 1.0
    world.send(CONTROL, m.Suspend(1, rid))
    world.now += 2.0
    world.send(CONTROL, m.Explain(2, rid))
    found = world.replies.pop()
    parts = (found.queue_ms, found.prefill_ms, found.decode_ms, found.preempted_ms, found.suspended_ms, found.client_ms)
    assert sum(parts) == pytest.approx(found.age_ms)
    assert found.suspended_ms == pytest.approx(2000.0)
    assert found.client_ms == pytest.approx(1000.0, abs=20.0)
    assert found.queue_ms == pytest.approx(world.streams[first].end.usage.total_ms, abs=10.0)
    assert (found.suspensions, found.preemptions) == (1, 0)


@pytest.mark.parametrize(
    "verb",
    [m.Nice(7, 1, 0, "bob"), m.Suspend(7, 1, PageFate.KEEP, "bob"), m.Resume(7, 1, "bob"), m.Explain(7, 1, "bob")],
)
def test_a_foreign_sequence_answers_like_an_unknown_one(verb):
    world = make_world()
    assert world.submit([1, 2, 3], max_tokens=5) == 1
    world.send(CONTROL, verb)
    assert world.replies.pop() == m.Error(7, ErrorCode.NOT_FOUND, "no sequence 1", "rid", 1)
