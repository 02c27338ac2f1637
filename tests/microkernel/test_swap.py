"""Swapping to host pages: when, what moves, and that nothing is changed by it. The fake executor moves and checks contents."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from kernel_world import World

from llmos.codes import PageFate, SeqState
from llmos.microkernel.pacing import Costs, WorkingSet
from llmos.microkernel.rows import RowTable
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32


def make_world(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def sequence(world: World, rid: int):
    return world.kernel.state.sequences[rid]


def status(world: World) -> m.LaneStatus:
    return world.kernel.state.lanes["demo"].status()


def crowd(world: World, count: int = 4) -> list[int]:
    return [world.submit([index, 2, 3, 4], max_tokens=20, seed=index) for index in range(count)]


def check_all(world: World, rids: list[int]) -> None:
    for rid in rids:
        assert world.streams[rid].ids == world.streams[rid].expected(20)
        assert len(world.streams[rid].ids) == 20


def test_suspended_to_the_host_goes_on_from_other_pages():
    world = make_world(num_pages=12, page_size=4, host_pages=10, prefix_cache=False)
    rid = world.submit(list(range(10)), max_tokens=6)
    for _ in range(3):
        world.step()
    assert list(sequence(world, rid).page_table) == [0, 1, 2, 3]
    world.ask(m.Suspend(1, rid, PageFate.SWAP))
    assert (sequence(world, rid).page_table, list(sequence(world, rid).host_pages)) == (array("i"), [0, 1, 2, 3])
    computed = world.executor.computed_tokens
    world.run()
    assert next(plan.swap_out for plan in world.plans if plan.swap_out) == pack_i32([0, 0, 1, 1, 2, 2, 3, 3])
    other = world.submit(list(range(100, 110)), max_tokens=3)
    world.run()
    world.ask(m.Resume(2, rid))
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(6)
    assert world.executor.computed_tokens <= computed + 10 + 3 + 6  # nothing twice
    assert len(world.streams[other].ids) == 3
    assert (status(world).swaps_out, status(world).swaps_in, status(world).host_pages_free) == (1, 1, 10)


def test_preemption_swaps_where_copying_is_cheaper():
    world = make_world(num_pages=14, page_size=2, host_pages=40, prefix_cache=False)
    rids = crowd(world)
    swapped = 0
    while world.step():
        swapped = max(swapped, sum(seq.state is SeqState.SWAPPED for seq in world.kernel.state.sequences.values()))
    check_all(world, rids)
    assert swapped > 0
    assert status(world).swaps_out == status(world).preemptions > 0
    assert world.executor.computed_tokens == 4 * (4 + 19)  # recomputed nothing
    assert status(world).host_pages_free == 40


def test_preemption_recomputes_where_that_is_cheaper():
    world = make_world(num_pages=14, page_size=2, host_pages=40, swap_us=1e6, prefix_cache=False)
    rids = crowd(world)
    world.run()
    check_all(world, rids)
    assert (status(world).swaps_out, status(world).preemptions > 0) == (0, True)


def test_a_full_host_pool_drops_instead():
    world = make_world(num_pages=14, page_size=2, host_pages=5, prefix_cache=False)
    rids = crowd(world)
    world.run()
    check_all(world, rids)
    assert status(world).preemptions > status(world).swaps_out


def test_what_rests_is_swapped_when_its_pages_are_needed():
    world = make_world(num_pages=8, page_size=4, host_pages=8, prefix_cache=False)
    rid = world.spawn(list(range(16)))
    world.run()
    other = world.submit(list(range(100, 120)), max_tokens=5)
    world.run()
    assert len(world.streams[other].ids) == 5
    assert len(sequence(world, rid).host_pages) == 4
    computed = world.executor.computed_tokens
    world.continue_(rid, max_tokens=3)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(3)
    assert world.executor.computed_tokens == computed + 3


def test_killed_in_the_host_pool_gives_its_pages_back():
    world = make_world(num_pages=12, page_size=4, host_pages=4, prefix_cache=False)
    for _ in range(3):  # again and again: a leak would use the four pages up
        rid = world.submit(list(range(10)), max_tokens=6)
        world.step()
        world.ask(m.Suspend(1, rid, PageFate.SWAP))
        assert len(sequence(world, rid).host_pages) == 3
        world.ask(m.Kill(2, rid))
        world.run()
        world.submit([1], max_tokens=1)
        world.run()
        assert status(world).host_pages_free == 4


def test_append_to_what_is_in_the_host_pool():
    world = make_world(num_pages=12, page_size=4, host_pages=6, prefix_cache=False)
    rid = world.spawn(list(range(10)))
    world.run()
    world.ask(m.Suspend(1, rid, PageFate.SWAP))
    world.append(rid, [5, 6, 7])
    world.ask(m.Resume(2, rid))
    world.run()
    world.continue_(rid, max_tokens=2)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(2)
    assert world.executor.computed_tokens == 9 + 3 + 2


@pytest.mark.parametrize(
    ("tokens", "pages", "freed", "host_free", "prefill_s", "fate"),
    [
        (64, 4, 4, 4, 0.001, PageFate.SWAP),  # 64 ms against 8 ms
        (64, 4, 4, 3, 0.001, PageFate.DROP),  # no room
        (64, 4, 1, 9, 0.001, PageFate.DROP),  # most pages stay with others
        (7, 4, 4, 4, 0.001, PageFate.DROP),  # 7 ms against 8 ms
        (64, 4, 4, 4, 0.0, PageFate.SWAP),  # not measured yet
    ],
)
def test_fate_by_cost(tokens: int, pages: int, freed: int, host_free: int, prefill_s: float, fate: PageFate):
    costs = Costs(swap_s=0.001)
    costs.prefill_s = prefill_s
    assert costs.fate(tokens, pages, freed, host_free) is fate
    assert Costs(swap_s=0.0).fate(tokens, pages, freed, host_free) is PageFate.DROP


def test_costs_tell_prefill_from_decode():
    costs = Costs(0.0)
    costs.note(0.010, 8, 0)
    costs.note(0.110, 8, 100)
    assert (costs.decode_s, costs.prefill_s) == (0.010, pytest.approx(0.001))
    assert costs.prefill_budget(2048, 8, 0.050, 16) == 40  # 10 ms + 40 tokens of 1 ms
    assert costs.prefill_budget(2048, 8, 0.005, 16) == 16  # prompts keep moving
    assert costs.prefill_budget(2048, 0, 0.050, 16) == 2048  # nobody waits for a token
    assert costs.prefill_budget(2048, 8, 0.0, 16) == 2048


def test_long_prompts_beside_streams_are_cut_to_the_target():
    world = make_world(num_pages=200, page_size=4, max_step_tokens=64, target_step_s=0.010)
    costs = world.kernel.state.lanes["demo"].scheduler.residents.costs
    world.submit([1], max_tokens=40)
    for _ in range(5):
        world.step()
    costs.decode_s, costs.prefill_s = 0.002, 0.001
    costs.note = lambda *_: None
    world.submit(list(range(60)), max_tokens=2)
    world.run()
    chunks = [length for plan in world.plans for length in memoryview(plan.prefill).cast("i").tolist()[2::4]]
    assert max(chunks) == 8
    assert sum(chunks) == 61


def test_the_working_set_grows_with_preemptions_and_shrinks_in_calm():
    rows = RowTable(8, 100)
    working_set = WorkingSet(num_pages=1000, page_size=4)
    assert working_set.reserve(rows) == 0
    rows.order = np.arange(3)
    rows.max_len[:3], rows.known[:3] = 100, (0, 50, 98)
    assert working_set.reserve(rows) == 3
    working_set.preempted()
    assert working_set.reserve(rows) == (4 + 4 + 2) // 4
    for _ in range(10):
        working_set.preempted()
    assert working_set.reserve(rows) == (100 + 50 + 2) // 4
    rows.throttled[0] = True
    assert working_set.reserve(rows) == (50 + 2) // 4
    for _ in range(256 * 13):
        working_set.step()
    assert working_set.reserve(rows) == 3


def test_less_is_computed_twice_with_the_working_set_than_without():
    def wasted(feedback: bool) -> int:
        world = make_world(num_pages=40, page_size=4, max_rows=16, prefix_cache=False)
        if not feedback:
            world.kernel.state.lanes["demo"].scheduler.residents.working_set.preempted = lambda: None
        for index in range(40):
            world.submit([index, 2, 3, 4], max_tokens=40, seed=index)
        world.run()
        return world.executor.computed_tokens - 40 * 43

    assert wasted(True) < 0.6 * wasted(False)
