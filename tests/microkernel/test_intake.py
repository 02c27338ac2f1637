"""Who starts, with which pages; and what `explain` says of the wait."""

from __future__ import annotations

import pytest
from kernel_world import GATEWAY, World

from llmos.codes import SeqState
from llmos.protocol import messages as m
from llmos.protocol.codec import unpack_i32


def make_world(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def explain(world: World, rid: int) -> m.Explained:
    answer = world.ask(m.Explain(world._next(), rid))
    assert isinstance(answer, m.Explained)
    return answer


@pytest.mark.parametrize(("prompt_len", "pages"), [(3, 1), (4, 2), (5, 2)])
def test_a_start_comes_with_a_place_for_the_first_token_that_it_makes(prompt_len: int, pages: int):
    world = make_world(page_size=4)
    rid = world.submit(list(range(prompt_len)), max_tokens=2)
    assert len(unpack_i32(world.row_add(rid).pages)) == pages
    rid = world.spawn(list(range(50, 50 + prompt_len)))
    world.run()
    assert len(unpack_i32(world.row_add(rid).pages)) == -(-prompt_len // 4)  # it makes none


def test_who_waits_for_pages_is_not_overtaken_by_smaller_ones():
    world = make_world(num_pages=10, page_size=4)
    runs = world.submit([1] * 20, max_tokens=8, owner="alice")
    large = world.submit([2] * 24, max_tokens=2, owner="bob", seed=2)
    small = world.submit([3], max_tokens=2, owner="carol", seed=3)
    world.step()
    states = [world.kernel.state.sequences[rid].state for rid in (runs, large, small)]
    assert states == [SeqState.RUNNING, SeqState.WAITING, SeqState.WAITING]
    world.run()
    order = [add.rid for plan in world.plans for add in plan.row_adds]
    assert order == [runs, large, small]


def test_time_that_a_tenants_own_limits_cost_is_its_quota():
    world = make_world(max_rows=2)
    world.ask(m.TenantSet(world._next(), "alice", max_running=1))
    first = world.submit([1], max_tokens=20, owner="alice")
    rid = world.submit([2], max_tokens=20, owner="alice", seed=2)
    for _ in range(10):
        world.step()
    waits = explain(world, rid)
    assert waits.quota_ms + waits.queue_ms == pytest.approx(100.0)
    assert waits.queue_ms <= 10.001  # until it was looked at: two steps were in flight when it came
    world.run()
    ended = explain(world, rid)
    whole = world.streams[first].end.usage.total_ms
    assert ended.quota_ms + ended.queue_ms == pytest.approx(whole)
    assert ended.queue_ms == pytest.approx(waits.queue_ms)


def test_time_in_which_there_is_no_row_is_not_its_quota():
    world = make_world(max_rows=1)
    world.submit([1], max_tokens=20, owner="alice")
    rid = world.submit([2], max_tokens=2, owner="bob", seed=2)
    for _ in range(10):
        world.step()
    assert (explain(world, rid).quota_ms, explain(world, rid).queue_ms) == (0.0, pytest.approx(100.0))
    world.run()
    assert explain(world, rid).quota_ms == 0.0


def test_a_cut_turn_is_not_found_by_what_it_was():
    """Its pages are written anew: whoever asks for what they held once must not find them."""
    world = make_world(page_size=4, num_pages=14)
    rid = world.spawn([1, 2, 3])
    world.run()
    world.continue_(rid, max_tokens=20, seed=5)
    for _ in range(15):
        world.step()
    stream = world.streams[rid]
    once = [*stream.prompt, *stream.ids]
    assert len(once) >= 13
    world.send(GATEWAY, m.SeqFinish(rid, 1))
    del stream.ids[1:]
    world.run()
    filler = world.submit(list(range(100, 148)), max_tokens=1)  # what was cached is evicted
    world.run()
    world.continue_(rid, max_tokens=20, seed=6)
    world.run()
    assert stream.ids == stream.expected(20)
    asked = world.submit([*once, 9], max_tokens=3, seed=7)
    world.run()
    assert world.streams[asked].ids == world.streams[asked].expected(3)
    assert world.streams[asked].end.usage.cached_tokens == 4  # its first page is the same still
    assert world.streams[filler].end is not None


def rested(world: World, owner: str, num_tokens: int, first: int) -> int:
    """An open sequence at rest, with its pages."""
    rid = world.spawn(list(range(first, first + num_tokens)), owner=owner)
    world.run()
    return rid


def pages_of(world: World, rid: int) -> int:
    return len(world.kernel.state.sequences[rid].page_table)


def test_pages_are_taken_from_who_keeps_them_longest_but_not_within_a_guarantee():
    world = make_world(num_pages=16, page_size=4, prefix_cache=False)
    safe, old, new = (rested(world, owner, 16, 100 * place) for place, owner in enumerate(("safe", "old", "new")))
    world.ask(m.TenantSet(world._next(), "safe", guaranteed_pages=4))
    rid = world.submit([1] * 20, max_tokens=2, owner="dave")
    world.run()
    assert [pages_of(world, each) for each in (safe, old, new)] == [4, 0, 4]
    assert len(world.streams[rid].ids) == 2


def test_who_is_at_its_quota_takes_pages_only_from_itself():
    world = make_world(num_pages=32, page_size=4, prefix_cache=False)
    other, own = rested(world, "bob", 16, 0), rested(world, "alice", 16, 100)
    world.ask(m.TenantSet(world._next(), "alice", max_pages=6))
    rid = world.submit([1] * 12, max_tokens=2, owner="alice")
    world.run()
    assert [pages_of(world, each) for each in (other, own)] == [4, 0]
    assert len(world.streams[rid].ids) == 2
