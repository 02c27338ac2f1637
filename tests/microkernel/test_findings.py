"""Bugs that the simulation found, each as small as it gets."""

from __future__ import annotations

import pytest
from crash import Journaled
from kernel_world import CONTROL, GATEWAY, STORAGE, World, params

from llmos.codes import ErrorCode, FinishReason, PageFate, SeqState
from llmos.microkernel.sender import Sender
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.limits import UNLIMITED

OTHER = Sender(9, "gateway", "gateway-2")


def make_world(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def journaled_world(**options: object) -> tuple[World, Journaled]:
    world = World(**options)
    journaled = Journaled(world)
    world.start_executor()
    return world, journaled


def sequence(world: World, rid: int):
    return world.kernel.state.sequences[rid]


def lane(world: World):
    return world.kernel.state.lanes["demo"]


def set_tenant(world: World, name: str, **limits: object) -> None:
    answer = world.ask(m.TenantSet(world._next(), name, **limits))
    assert isinstance(answer, m.TenantsReply), answer


def store_tenant(
    world: World, name: str, *, max_pages: int = UNLIMITED, guaranteed: int = 0, max_running: int = UNLIMITED
):
    """Storage comes late, with limits of an earlier life."""
    world._deliver(world.kernel.greet(STORAGE, world.now))
    row = m.TenantLimitsRow(name, 1.0, max_pages, guaranteed, max_running, UNLIMITED, 0.0)
    world.send(STORAGE, m.TenantsStored((row,)))
    world.kernel.check()


def all_right(world: World, *rids: int) -> None:
    for rid in rids:
        stream = world.streams[rid]
        assert stream.ids == stream.expected(len(stream.ids))
        assert stream.end is not None
        assert stream.end.reason == FinishReason.LENGTH


# ------------------------------------------------------------ readers


def test_who_stops_reading_is_not_told_that_it_was_replaced():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=5)
    assert world.kernel.handle(GATEWAY, m.SeqDetach(rid), world.now) == []
    world.attach(rid)
    assert world.kernel.peer_down(GATEWAY.peer, world.now) == []


def test_a_gateway_that_is_gone_is_not_answered():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=5)
    assert world.kernel.handle(OTHER, m.Wait(5, rid), world.now) == []
    world.kernel.peer_down(OTHER.peer, world.now)
    assert {send.peer for send in world.kernel.handle(CONTROL, m.Kill(6, rid), world.now)} == {
        CONTROL.peer,
        GATEWAY.peer,
    }


@pytest.mark.parametrize("fate", list(PageFate))
def test_the_window_holds_however_often_a_sequence_gets_a_row(fate: PageFate):
    world = make_world(window=3, host_pages=8)
    rid = world.submit([1, 2, 3, 4, 5], max_tokens=20)
    for _ in range(4):
        world.run()
        world.ask(m.Suspend(world._next(), rid, fate))
        world.ask(m.Resume(world._next(), rid))
        world.run()
        assert len(world.streams[rid].ids) == 3
    world.send(GATEWAY, m.SeqAck(rid, 3))
    world.run()
    assert len(world.streams[rid].ids) == 6


def test_attach_tells_the_parameters_whatever_they_are():
    """Greedy with seed 0 is what an open sequence is prefilled with, too."""
    world, journaled = journaled_world()
    rid = world.submit([1, 2, 3], max_tokens=None, seed=0)
    world.step()
    journaled.crash()
    assert world.ask(m.SeqAttach(7, rid), GATEWAY).params == params(seed=0)


# ------------------------------------------------------------ results


def test_an_executor_can_not_end_a_sequence_well():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=9)
    world.executor.fail_rows[rid] = FinishReason.STOP
    world.run()
    assert world.streams[rid].end.reason == FinishReason.NUMERICAL_ERROR


@pytest.mark.parametrize("fate", list(PageFate))
def test_a_token_that_does_not_come_for_a_sequence_without_a_row_is_computed_again(fate: PageFate):
    world = make_world(steps_in_flight=3, host_pages=8)
    rid = world.submit([1, 2, 3], max_tokens=9)
    world.step()
    world.ask(m.Suspend(world._next(), rid, fate))
    for _ in range(len(world.executor.inbox)):
        lost = world.executor.run_one()
        empty = m.StepResult(lost.generation, lost.step, b"", (), b"", 1, 0)
        world.send(Sender(world.executor_peer, "executor", "executor.demo"), empty)
        world.kernel.check()
    world.ask(m.Resume(world._next(), rid))
    world.run()
    all_right(world, rid)


# ------------------------------------------------------------ pages


def test_a_page_from_which_a_copy_is_ordered_stays_until_the_copy_is_made():
    world = make_world(page_size=4, num_pages=8)
    rid = world.spawn(list(range(7)))
    world.run()
    (kid,) = world.fork(rid)
    holdings, tenants = lane(world).scheduler.holdings, lane(world).tenants
    parent, child = sequence(world, rid), sequence(world, kid)
    source = parent.page_table[1]
    holdings.copy_tail(child, tenants.get("alice"), 1)
    holdings.release(parent)
    assert holdings.pool.refs[source] == 0
    assert source not in holdings.pool.grant(holdings.pool.available)


def test_cached_input_is_not_taken_beyond_a_quota_or_the_guarantee_of_others():
    for limits in ({"name": "carol", "guaranteed_pages": 6}, {"name": "alice", "max_pages": 5}):
        world = make_world(page_size=4, num_pages=11)
        first = world.spawn(list(range(17)))  # four pages
        world.run()
        world.ask(m.Close(world._next(), first))
        busy = world.spawn([7] * 16)
        world.run()
        set_tenant(world, limits.pop("name"), **limits)
        second = world.spawn(list(range(17)))
        world.run()
        status = lane(world).status()
        assert status.blocked == 2
        assert lane(world).tenants.get("alice").pages <= 5
        assert list(sequence(world, second).page_table) == []
        world.ask(m.Close(world._next(), busy))
        world.continue_(second, max_tokens=2)
        world.run()
        all_right(world, second)


def test_a_shared_page_counts_for_who_still_holds_it():
    world = make_world(page_size=4, num_pages=10, share_prefixes=True)
    first = world.submit(list(range(17)), owner="alice", max_tokens=3)
    world.step()
    second = world.spawn(list(range(17)), owner="bob")
    world.step()
    alice, bob = (lane(world).tenants.get(name) for name in ("alice", "bob"))
    assert (alice.pages, bob.pages) == (5, 0)
    assert list(sequence(world, second).page_table) == [0, 1, 2, 3]
    world.run()
    assert world.streams[first].end is not None
    assert (alice.pages, bob.pages) == (0, 4)


def test_a_guarantee_does_not_protect_pages_that_others_counted_for():
    """Nobody could have run: bob's pages counted for alice, so he seemed to be within his guarantee and kept them."""
    world = make_world(page_size=1, num_pages=40, share_prefixes=True)
    first = world.submit(list(range(17)), owner="alice", max_tokens=2)
    world.step()
    rests = world.spawn(list(range(20)), owner="bob")
    world.run()
    set_tenant(world, "bob", guaranteed_pages=6)
    assert world.streams[first].end is not None
    large = world.submit([7] * 30, owner="carol", max_tokens=3)
    world.run()
    all_right(world, large)
    assert list(sequence(world, rests).page_table) == []


def test_host_pages_that_are_given_back_can_be_used_at_once():
    world = make_world(page_size=4, host_pages=2, prefix_cache=False)
    first, second = world.spawn(list(range(8))), world.spawn(list(range(8)))
    world.run()
    world.ask(m.Suspend(world._next(), first, PageFate.SWAP))
    world.run()
    world.ask(m.Close(world._next(), first))
    world.ask(m.Suspend(world._next(), second, PageFate.SWAP))
    assert len(sequence(world, second).host_pages) == 2


# ------------------------------------------------------------ tenants


def test_a_preempted_sequence_that_may_not_run_does_not_hold_up_other_tenants():
    world = make_world()
    slow, fast = world.submit([1], owner="slow", max_tokens=9), world.submit([2], owner="fast", max_tokens=9)
    for _ in range(3):
        world.step()
    set_tenant(world, "slow", tokens_per_s=0.001)
    world.step()
    for rid in (fast, slow):  # the newest first, as always: the oldest goes on first
        lane(world).scheduler.residents.preempt(sequence(world, rid), world.now)
    world.run()
    assert world.streams[slow].end is None
    all_right(world, fast)


def test_stored_limits_below_use_are_no_violation():
    world = make_world(max_rows=4)
    rids = [world.submit([index], max_tokens=9, seed=index) for index in range(3)]
    store_tenant(world, "alice", max_running=1)
    world.run()
    all_right(world, *rids)
    assert lane(world).tenants.get("alice").limits.max_running == 1
    set_tenant(world, "alice", weight=2.0)  # other limits can be changed all the same


def test_stored_guarantees_hold_before_their_tenant_comes():
    world = make_world(num_pages=10, page_size=4)
    store_tenant(world, "quiet", guaranteed=6)
    rid = world.submit([1], max_tokens=None)
    world.run()
    assert len(world.streams[rid].ids) == 15
    quiet = world.submit([2], owner="quiet", max_tokens=None)
    world.run()
    all_right(world, rid, quiet)


def test_who_does_not_fit_any_more_ends_instead_of_waiting_for_ever():
    world = make_world(num_pages=10, page_size=4)
    rids = [world.submit([index] * 3, max_tokens=30, seed=index) for index in range(2)]
    rests = world.spawn([1] * 20)
    for _ in range(8):
        world.step()
    had = len(world.streams[rids[0]].ids)
    store_tenant(world, "quiet", guaranteed=7)  # leaves three pages to alice: twelve tokens
    world.run()
    assert 4 < had < 9
    for rid in rids:
        assert len(world.streams[rid].ids) == 9
        assert world.streams[rid].end.reason == FinishReason.LENGTH
    world.shape = (5, *world.shape[1:])  # less than the guarantee
    late = world.submit([1], owner="quiet", max_tokens=40)
    world.step()
    world.start_executor()
    world.run()
    assert len(world.streams[late].ids) == 19
    answer = world.ask(m.SeqContinue(9, rests, "demo", params()), GATEWAY)
    assert answer.code == ErrorCode.CONTEXT_TOO_LONG
    assert world.ask(m.Close(10, rests)) == m.Done(10, rests)


# ------------------------------------------------------------ after a crash


def test_after_a_crash_a_sequence_still_waits_for_one_that_came_later():
    world, journaled = journaled_world(max_rows=1)
    running = world.submit([0], max_tokens=20)
    first, second = world.submit([1], max_tokens=2), world.submit([2], max_tokens=2)
    assert world.ask(m.After(world._next(), first, (second,))) == m.Done(world._req, first)
    journaled.crash()
    assert sequence(world, first).waits_for == {second}
    world.run()
    all_right(world, running, first, second)


def test_after_a_crash_records_are_kept_for_their_time():
    world, journaled = journaled_world(retention_s=10.0)
    long, short = world.submit([1], max_tokens=9), world.submit([2], max_tokens=1)
    for _ in range(3):
        world.step()
    assert short in world.kernel.state.ended
    world.now += 5.0
    world.run()
    journaled.crash()
    world.now += 6.0
    world._deliver(world.kernel.tick(world.now))
    assert long in world.kernel.state.ended
    assert short not in world.kernel.state.ended


def test_after_a_crash_a_deadline_spares_who_has_begun():
    world, journaled = journaled_world()
    rid = world.submit([1], max_tokens=20, deadline_ms=500.0)
    for _ in range(3):
        world.step()
    journaled.crash()
    world.now += 1.0
    world.run()
    all_right(world, rid)


def test_after_a_crash_no_seed_is_drawn_again_though_requests_were_refused():
    world, journaled = journaled_world(num_pages=4)
    for _ in range(3):
        answer = world.ask(m.SeqSubmit(world._next(), "demo", pack_i32([1] * 99), params(seed=None), "alice"), GATEWAY)
        assert answer.code == ErrorCode.CONTEXT_TOO_LONG
    seeds = []
    for crash in (False, True, False, True, False):
        rid = world.submit([1], max_tokens=1, seed=None)
        seeds.append(sequence(world, rid).params.seed)
        if crash:
            journaled._read_on = lambda: None
            journaled.crash()
    assert len(set(seeds)) == 5


def test_who_gave_way_does_not_run_any_more():
    """What those that run may still grow by is kept for them, but not for one that has just yielded its row."""
    world = make_world(num_pages=100, page_size=1, window=4)
    unread = world.submit([1] * 5, max_tokens=50)
    world.run()
    whole_pool = world.submit([2] * 99, max_tokens=1)
    assert sequence(world, unread).state is SeqState.BLOCKED
    world.run()
    all_right(world, whole_pool)
