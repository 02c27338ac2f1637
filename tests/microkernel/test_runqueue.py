"""Order in the queue: what comes back to it, and what changes its place."""

from __future__ import annotations

from array import array

from kernel_world import World, params

from llmos.microkernel.jobs import Job
from llmos.microkernel.policy import FairShare
from llmos.microkernel.runqueue import RunQueue
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import Tenant
from llmos.protocol import messages as m


def sequence(rid: int, owner: str = "alice") -> Sequence:
    return Sequence(rid, owner, "demo", 0, array("i", [1]), 1, 9, params(), 0.0, Job(rid, owner))


def make_world(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def started(world: World) -> list[int]:
    return [add.rid for plan in world.plans for add in plan.row_adds]


def test_of_the_preempted_the_oldest_goes_on_first_and_each_tenant_has_one():
    queue = RunQueue(FairShare(), 30.0)
    for rid, owner in ((9, "bob"), (7, "alice"), (5, "bob"), (3, "alice")):  # victims come newest first
        queue.push_front(sequence(rid, owner))
    queue.push(sequence(1), Tenant("alice"), 0.0)
    assert [seq.rid for seq in queue.heads()] == [3, 5, 1]
    assert len(queue) == 5


def test_a_place_that_was_given_up_does_not_count():
    """Its heap still has the old place, in front of everybody."""
    world = make_world(max_rows=1)
    world.submit([1], max_tokens=5)
    moved = world.submit([2], max_tokens=2, deadline_ms=10_000.0)
    other = world.submit([3], max_tokens=2, deadline_ms=20_000.0)
    assert world.ask(m.Deadline(world._next(), moved, 30_000.0)) == m.Done(world._req, moved)
    world.run()
    assert started(world)[1:] == [other, moved]


def test_an_idle_tenant_saves_up_one_second_of_its_rate_and_no_more():
    world = make_world(num_pages=256)
    world.ask(m.TenantSet(world._next(), "alice", tokens_per_s=20.0))
    world.submit([1], max_tokens=1)
    world.run()
    world.now += 100.0
    rid = world.submit([2], max_tokens=200)
    for _ in range(60):
        if not world.step():
            world.now += 0.01
            world._deliver(world.kernel.tick(world.now))
    assert 20 <= len(world.streams[rid].ids) <= 20 + 12 + 2  # a second's worth, what 0.6 s earn, and what is in flight
