"""Jobs: parent, after, what follows from an end, and order inside a tenant."""

from __future__ import annotations

import pytest
from kernel_world import GATEWAY, World

from llmos.codes import ErrorCode, FinishReason, SeqState
from llmos.protocol import messages as m


def make_world(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def state_of(world: World, rid: int) -> SeqState:
    return world.kernel.state.sequences[rid].state


def started(world: World) -> list[int]:
    """Sequences in the order in which they got rows."""
    return [add.rid for plan in world.plans for add in plan.row_adds]


def test_after_waits_for_all_and_then_runs():
    world = make_world()
    first, second = world.submit([1], max_tokens=3), world.submit([2], max_tokens=9)
    third = world.submit([3], max_tokens=2, after=(first, second))
    while state_of(world, third) is SeqState.BLOCKED:
        assert world.step()
    assert second not in world.kernel.state.sequences
    world.run()
    assert world.streams[third].ids == world.streams[third].expected(2)
    explained = world.ask(m.Explain(1, third))
    assert explained.blocked_ms > 0
    assert explained.blocked_ms + explained.queue_ms + explained.prefill_ms + explained.decode_ms == pytest.approx(
        explained.age_ms
    )


def test_an_end_that_is_not_good_ends_those_that_waited_for_it():
    world = make_world(max_waiting=10_000)
    first = world.submit([1], max_tokens=50)
    chain = [world.submit([2], max_tokens=2, after=(first,))]
    for _ in range(1500):  # deeper than recursion would carry
        chain.append(world.submit([3], max_tokens=2, after=(chain[-1],)))
    world.ask(m.Kill(1, first))
    assert {world.streams[rid].end.reason for rid in chain} == {FinishReason.DEPENDENCY}
    assert world.kernel.state.sequences == {}


def test_after_something_that_has_ended():
    world = make_world()
    good, bad = world.submit([1], max_tokens=1), world.submit([2], max_tokens=50)
    world.step()
    world.ask(m.Kill(1, bad))
    world.run()
    rid = world.submit([3], max_tokens=2, after=(good,))
    world.run()
    assert world.streams[rid].end.reason == FinishReason.LENGTH
    with pytest.raises(AssertionError, match="has ended with killed"):
        world.submit([3], max_tokens=2, after=(bad,))


def test_a_cycle_is_refused_however_long():
    world = make_world(max_rows=1)
    world.submit([0], max_tokens=500)
    rids = [world.submit([1], max_tokens=2)]
    for _ in range(5):
        rids.append(world.submit([1], max_tokens=2, after=(rids[-1],)))
    for victim in (rids[0], rids[2], rids[5]):
        answer = world.ask(m.After(1, rids[0], (victim,)))
        assert (answer.code, answer.field) == (ErrorCode.INVALID_REQUEST, "after")
        assert "would wait for itself" in answer.message
    assert world.ask(m.After(2, rids[5], ())) == m.Done(2, rids[5])
    assert world.ask(m.After(3, rids[0], (rids[5],))) == m.Done(3, rids[0])
    assert (state_of(world, rids[0]), state_of(world, rids[5])) == (SeqState.BLOCKED, SeqState.WAITING)
    world.run()
    order = started(world)
    assert order.index(rids[5]) < order.index(rids[0]) < order.index(rids[1]) < order.index(rids[4])


def test_after_can_not_be_changed_once_it_runs():
    world = make_world()
    rid, other = world.submit([1], max_tokens=50), world.submit([2], max_tokens=50)
    answer = world.ask(m.After(1, rid, (other,)))
    assert answer.code == ErrorCode.WRONG_STATE
    assert world.ask(m.After(2, rid, tuple(range(1000)))).field == "after"


def test_a_fork_waits_for_what_its_parent_waits_for():
    world = make_world()
    first = world.submit([1], max_tokens=9)
    second = world.submit([2], max_tokens=2, after=(first,))
    (kid,) = world.fork(second)
    assert world.ask(m.Stat(1, kid)).after == (first,)
    world.attach(kid)
    world.run()
    assert world.streams[kid].end.reason == FinishReason.LENGTH


def test_a_job_is_accounted_together():
    world = make_world(max_rows=1, num_pages=64)
    root = world.submit([1, 2, 3], max_tokens=4)
    child = world.submit([1, 2, 3, 4], max_tokens=4, parent=root)
    grandchild = world.submit([5], max_tokens=4, parent=child)
    job = world.ask(m.Stat(1, grandchild)).job
    assert (job.job, job.sequences, job.live) == (root, 3, 3)
    assert world.ask(m.Stat(2, child)).parent == root
    world.run()
    job = world.ask(m.Stat(3, root)).job
    assert (job.sequences, job.live, job.pages) == (3, 0, 0)
    assert job.tokens == world.executor.computed_tokens


def test_inside_a_tenant_a_job_queues_with_its_arrival():
    world = make_world(max_rows=1)
    root = world.submit([1], max_tokens=2)
    others = [world.submit([2], max_tokens=2) for _ in range(3)]
    step = world.submit([3], max_tokens=2, parent=root)
    world.run()
    assert started(world) == [root, step, *others]


def test_suspended_while_it_waits_for_others():
    world = make_world()
    first = world.submit([1], max_tokens=5)
    second = world.submit([2], max_tokens=2, after=(first,))
    world.ask(m.Suspend(1, second))
    world.run()
    world.ask(m.Resume(2, second))
    world.run()
    assert world.streams[second].ids == world.streams[second].expected(2)
    third = world.submit([2], max_tokens=2, after=(world.submit([1], max_tokens=5),))
    world.ask(m.Suspend(3, third))
    world.ask(m.Resume(4, third))
    assert state_of(world, third) is SeqState.BLOCKED
    world.send(GATEWAY, m.SeqCancel(third, FinishReason.CANCELLED))
    world.run()
    assert world.streams[third].end.reason == FinishReason.CANCELLED
