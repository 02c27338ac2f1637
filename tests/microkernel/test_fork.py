"""Fork: shared pages, copy-on-write of the one partial page, children that go on alone. The fake executor checks every page it reads."""

from __future__ import annotations

import time

import pytest
from kernel_world import CONTROL, GATEWAY, World, params

from llmos.codes import ErrorCode, FinishReason, PageFate, SeqState
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.limits import MAX_FORKS


def make_world(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def sequence(world: World, rid: int):
    return world.kernel.state.sequences[rid]


def pool(world: World):
    return world.kernel.state.lanes["demo"].scheduler.pool


def used_pages(world: World) -> int:
    return int((pool(world).refs > 0).sum())


def finish_all(world: World, rids: tuple[int, ...]) -> None:
    """Read all sequences to their ends and check every token."""
    for rid in rids:
        world.attach(rid)
    world.run()
    for rid in rids:
        stream = world.streams[rid]
        assert stream.ids == stream.expected(len(stream.ids))
        assert stream.end is not None


def test_children_at_rest_share_all_pages_and_copy_one_when_they_write():
    world = make_world(page_size=4)
    rid = world.spawn(list(range(10)))  # nine computed ahead: pages 0, 1 full, 2 has one token
    world.run()
    assert list(sequence(world, rid).page_table) == [0, 1, 2]
    kids = world.fork(rid, 3)
    assert [list(sequence(world, kid).page_table) for kid in kids] == [[0, 1, 2]] * 3
    assert pool(world).refs[:3].tolist() == [4, 4, 4]
    assert used_pages(world) == 3
    world.continue_(kids[0], max_tokens=2)
    assert world.plans[-2].copies == pack_i32([2, 3]) or world.plans[-1].copies == pack_i32([2, 3])
    world.run()
    assert list(sequence(world, kids[0]).page_table) == [0, 1, 3]
    for rid_ in (rid, *kids[1:]):
        world.continue_(rid_, max_tokens=5)
    world.run()
    status = world.kernel.state.lanes["demo"].status()
    assert status.pages_copied == world.executor.pages_copied == 3  # the last one writes in place
    for each in (rid, *kids):
        stream = world.streams[each]
        assert stream.ids == stream.expected(len(stream.ids))
        assert stream.end.reason == FinishReason.LENGTH


def test_a_fork_computes_nothing_again():
    world = make_world(page_size=4, num_pages=64)
    rid = world.spawn(list(range(30)))
    world.run()
    computed = world.executor.computed_tokens
    assert computed == 29
    for kid in world.fork(rid, 4):
        world.continue_(kid, max_tokens=1)
    world.run()
    assert world.executor.computed_tokens == computed + 4


def test_a_running_sequence_is_forked_in_the_middle_and_both_go_on():
    world = make_world()
    rid = world.submit([5, 6, 7], max_tokens=30, seed=11)
    for _ in range(9):
        world.step()
    got = len(world.streams[rid].ids)
    assert got > 3
    kids = world.fork(rid, 2)
    assert all(sequence(world, kid).generating for kid in kids)
    finish_all(world, kids)
    outputs = [tuple(world.streams[each].ids) for each in (rid, *kids)]
    assert len(set(outputs)) == 3, "children have seeds of their own"
    assert len({output[:got] for output in outputs}) == 1
    assert {len(output) for output in outputs} == {30}


def test_a_fork_during_prefill_waits_for_what_the_parent_computes():
    world = make_world(max_step_tokens=8, num_pages=64, page_size=4)
    rid = world.spawn(list(range(40)))
    world.step()
    kids = world.fork(rid, 4)
    for kid in kids:
        world.continue_(kid, max_tokens=3)
        assert sequence(world, kid).state is SeqState.BLOCKED
    world.run()
    assert world.executor.computed_tokens == 39 + 4 * 3  # the prompt once, then each its own three
    for kid in kids:
        assert world.streams[kid].ids == world.streams[kid].expected(3)


@pytest.mark.parametrize("verb", ["kill", "suspend", "preempt", "executor"])
def test_heirs_go_on_when_the_parent_does_not(verb: str):
    world = make_world(max_step_tokens=8, num_pages=64, page_size=4)
    rid = world.spawn(list(range(40)))
    world.step()
    (kid,) = world.fork(rid)
    world.continue_(kid, max_tokens=3)
    scheduler = world.kernel.state.lanes["demo"].scheduler
    if verb == "kill":
        world.ask(m.Kill(world._next(), rid))
    elif verb == "suspend":
        world.ask(m.Suspend(world._next(), rid, PageFate.DROP))
    elif verb == "preempt":
        scheduler.residents.preempt(sequence(world, rid), world.now)
    else:
        world.start_executor()
    world.run()
    assert world.streams[kid].ids == world.streams[kid].expected(3)
    assert world.streams[kid].end.reason == FinishReason.LENGTH


def test_64_forks_of_10000_tokens_take_less_than_1_15_of_its_pages():
    world = make_world(num_pages=1000, page_size=16, max_rows=100, max_step_tokens=2048, max_context=20_000)
    world.executor._read = lambda row, upto: b""  # contents are checked elsewhere; reading is quadratic here
    rid = world.spawn([1] * 10_005)
    world.run()
    before = used_pages(world)
    assert before == 626
    kids = world.fork(rid, 64)
    assert used_pages(world) == before
    assert world.kernel.state.lanes["demo"].tenants.get("alice").pages == before
    for kid in kids:
        world.continue_(kid, max_tokens=10)
    most = 0
    while world.step():
        most = max(most, used_pages(world))
    assert most == before + 64  # each copies the last page before it writes there
    assert most < 1.15 * before
    assert all(len(world.streams[kid].ids) == 10 for kid in kids)


def test_a_fork_copies_no_kv_however_long_the_sequence():
    world = make_world(num_pages=2100, page_size=16, max_step_tokens=2048, max_context=40_000)
    world.executor._read = lambda row, upto: b""
    rid = world.spawn([1] * 32_768)
    world.run()
    started = time.perf_counter()
    world.fork(rid, 1)
    assert time.perf_counter() - started < 1.0  # bench/scheduler.py measures it; this only catches copies of contents
    assert not world.kernel.state.lanes["demo"].scheduler.holdings.copies
    assert world.executor.pages_copied == 0


def test_forks_under_a_full_pool_end_right():
    world = make_world(num_pages=14, page_size=2, max_rows=4)
    rid = world.spawn([1, 2, 3, 4, 5])
    world.run()
    kids = world.fork(rid, 6)
    for kid in kids:
        world.continue_(kid, max_tokens=12)
    world.run()
    for kid in kids:
        assert world.streams[kid].ids == world.streams[kid].expected(12)
    assert world.kernel.state.lanes["demo"].status().preemptions > 0


def test_a_sequence_that_fills_the_pool_goes_on_though_its_tail_is_shared():
    """It would need one page more for the copy than there is: it computes its tail again instead."""
    world = make_world(num_pages=3, page_size=2)
    rid = world.spawn([1, 2, 3, 4])  # three computed: pages 0 and half of 1
    world.run()
    (kid,) = world.fork(rid)
    world.continue_(kid, max_tokens=2)
    world.run()
    assert world.streams[kid].ids == world.streams[kid].expected(2)
    world.continue_(rid, max_tokens=2)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(2)


def test_forks_of_suspended_and_waiting_sequences():
    world = make_world(max_rows=1)
    first = world.submit([1, 2, 3], max_tokens=8)
    second = world.submit([4, 5, 6], max_tokens=8, seed=3)
    world.step()
    (of_waiting,) = world.fork(second)
    world.ask(m.Suspend(world._next(), first))
    (of_suspended,) = world.fork(first)
    assert sequence(world, of_suspended).state in (SeqState.WAITING, SeqState.RUNNING)
    finish_all(world, (of_waiting, of_suspended))
    assert sequence(world, first).state is SeqState.SUSPENDED


def test_what_can_not_be_forked_is_refused():
    world = make_world(max_rows=1, max_waiting=3)
    rid = world.submit([1, 2, 3], max_tokens=2)
    world.run()
    ended = world.ask(m.Fork(1, rid))
    assert (ended.code, ended.message) == (ErrorCode.WRONG_STATE, f"sequence {rid} has ended (length)")
    assert world.ask(m.Fork(2, 99)).code == ErrorCode.NOT_FOUND
    live = world.submit([1, 2, 3], max_tokens=50)
    assert world.ask(m.Fork(3, live, 1, "bob")) == m.Error(3, ErrorCode.NOT_FOUND, f"no sequence {live}", "rid", live)
    for count in (0, -1, MAX_FORKS + 1):
        error = world.ask(m.Fork(4, live, count))
        assert (error.code, error.field) == (ErrorCode.INVALID_REQUEST, "count")
    assert world.ask(m.Fork(5, live, 4)).code == ErrorCode.OVERLOADED
    assert len(world.kernel.state.sequences) == 1


def test_a_cut_turn_does_not_touch_what_a_child_shares():
    """A stop string takes tokens back; the parent then writes where the child still reads."""
    world = make_world(page_size=4)
    rid = world.spawn([1, 2, 3])
    world.run()
    world.continue_(rid, max_tokens=20, seed=5)
    for _ in range(12):
        world.step()
    (kid,) = world.fork(rid)
    world.send(GATEWAY, m.SeqFinish(rid, 2))
    stream = world.streams[rid]
    del stream.ids[2:]
    assert sequence(world, rid).state is SeqState.BLOCKED
    assert list(sequence(world, rid).tokens) == [*stream.prompt, *stream.ids]
    world.continue_(rid, max_tokens=20, seed=6)
    finish_all(world, (kid,))
    assert world.streams[rid].ids == world.streams[rid].expected(20)


def test_a_child_has_its_parents_terms():
    world = make_world(max_rows=1)
    world.submit([9], max_tokens=500)
    rid = world.submit([1, 2, 3], max_tokens=5, nice=7, deadline_ms=60_000.0)
    (kid,) = world.fork(rid)
    stats = world.ask(m.Stat(1, kid))
    assert (stats.parent, stats.job.job, stats.job.sequences, stats.row.nice) == (rid, rid, 2, 7)
    assert stats.deadline_ms == pytest.approx(60_000.0)
    assert world.ask(m.Stat(2, rid)).children == 1
    assert unpack_i32(pack_i32(sequence(world, kid).tokens)) == sequence(world, rid).tokens
    assert params().seed is not None
    assert CONTROL.role == "gateway"
