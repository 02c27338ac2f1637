"""Tenants: shares, quotas, guarantees, rates; the bound of the virtual token counter as a property."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_world import CONTROL, World

from llmos.codes import ErrorCode, FinishReason
from llmos.protocol import messages as m
from llmos.protocol.limits import UNLIMITED


def make_world(**shape: object) -> World:
    world = World(retention_s=0.1, **shape)  # thousands of sequences: every check looks at all records
    world.start_executor()
    return world


def set_tenant(world: World, name: str, **limits: object) -> m.Message:
    world.send(CONTROL, m.TenantSet(1, name, **limits))
    return world.replies.pop()


def tokens_of(world: World, name: str) -> int:
    return world.kernel.state.lanes["demo"].tenants.get(name).tokens


def keep_backlog(world: World, owners: tuple[str, ...], depth: int, prompt: int, output: int) -> None:
    """Every owner has `depth` sequences waiting."""
    for owner in owners:
        tenant = world.kernel.state.lanes["demo"].tenants.get(owner)
        while tenant.waiting < depth:
            world.submit([len(world.streams) % 1000] * prompt, owner=owner, max_tokens=output, seed=len(world.streams))


def test_weights_1_to_3_under_backlog_share_tokens_1_to_3():
    world = make_world(num_pages=64, max_rows=4, prefix_cache=False)
    set_tenant(world, "small", weight=1.0)
    set_tenant(world, "large", weight=3.0)
    for _ in range(10_000):
        keep_backlog(world, ("small", "large"), 2, prompt=3, output=5)
        world.step()
    assert tokens_of(world, "large") / tokens_of(world, "small") == pytest.approx(3.0, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=4),
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=4, max_size=4),
    rows=st.integers(1, 4),
)
def test_backlogged_tenants_never_drift_apart(weights, shapes, rows):
    """Sheng et al. 2024: while two tenants are backlogged, their normalised service differs by a constant, whatever they ask for.

    The constant is what admission can hand out before counters catch up: one sequence per row, at its full cost, for the lighter one.
    """
    world = make_world(num_pages=256, max_rows=rows, prefix_cache=False)
    names = tuple(f"t{index}" for index in range(len(weights)))
    for name, weight in zip(names, weights):
        set_tenant(world, name, weight=weight)
    for _ in range(150):
        for name, (prompt, output) in zip(names, shapes):
            keep_backlog(world, (name,), rows + 1, prompt, output)  # more than one step can admit
        world.step()
        served = [tokens_of(world, name) / weight for name, weight in zip(names, weights)]
        bound = 2 * (rows + 1) * max((prompt + output) / weight for (prompt, output), weight in zip(shapes, weights))
        assert max(served) - min(served) <= bound


def test_a_tenant_that_was_idle_gets_no_credit_for_it():
    world = make_world(max_rows=2, prefix_cache=False)
    for _ in range(200):
        keep_backlog(world, ("busy",), 2, 3, 5)
        world.step()
    before = tokens_of(world, "busy")
    for _ in range(200):
        keep_backlog(world, ("busy", "late"), 2, 3, 5)
        world.step()
    assert tokens_of(world, "late") == pytest.approx(tokens_of(world, "busy") - before, rel=0.1)


def test_a_flood_leaves_the_guarantee_of_another_tenant_untouched():
    world = make_world(num_pages=32, page_size=4, max_rows=8)
    set_tenant(world, "quiet", guaranteed_pages=12)
    for index in range(40):
        world.submit([index, 1, 2, 3, 4, 5], owner="flood", max_tokens=30, seed=index)
    for _ in range(20):
        world.step()
        assert world.kernel.state.lanes["demo"].tenants.get("flood").pages <= 20
    rid = world.submit(list(range(20)), owner="quiet", max_tokens=20, seed=77)  # 10 pages, within its guarantee
    world.run()
    assert world.streams[rid].end.usage.preemptions == 0
    assert world.streams[rid].end.usage.queue_ms < 400.0  # it waited for a row, not for pages


def test_quiet_tenants_first_token_is_at_most_twice_as_late_in_a_flood():
    def steps_to_first_token(flood: int) -> int:
        world = make_world(num_pages=128, page_size=4, max_rows=8, max_step_tokens=64)
        set_tenant(world, "quiet", guaranteed_pages=16)
        set_tenant(world, "flood", max_running=7)
        for index in range(flood):
            world.submit([index] * 24, owner="flood", max_tokens=20, seed=index)
        for _ in range(10):
            world.step()
        rid = world.submit(list(range(30)), owner="quiet", max_tokens=4)
        count = 0
        while not world.streams[rid].ids:
            world.step()
            count += 1
        return count

    assert steps_to_first_token(100) <= 2 * steps_to_first_token(1)


def test_quotas_hold_and_one_tenants_limit_does_not_block_another():
    world = make_world(max_rows=8)
    set_tenant(world, "capped", max_running=2, max_pages=6, max_waiting=5)
    rids = [world.submit([index, 1], owner="capped", max_tokens=12, seed=index) for index in range(5)]
    free = world.submit([9], owner="other", max_tokens=12, seed=50)
    capped = world.kernel.state.lanes["demo"].tenants.get("capped")
    seen = 0
    while world.step():
        seen = max(seen, capped.running)
        assert capped.running <= 2
        assert capped.pages <= 6
    assert seen == 2
    for rid in (*rids, free):
        assert world.streams[rid].ids == world.streams[rid].expected(12)
    assert world.streams[free].end.usage.queue_ms <= 20.0  # the two steps that were in flight


def test_too_many_waiting_of_one_tenant_is_overloaded_for_it_alone():
    world = make_world(max_rows=1)
    set_tenant(world, "capped", max_waiting=1)
    world.submit([1], owner="capped", max_tokens=20)
    world.submit([2], owner="capped", max_tokens=20)
    with pytest.raises(AssertionError, match="capped are waiting"):
        world.submit([3], owner="capped", max_tokens=20)
    world.submit([3], owner="other", max_tokens=20)


def test_token_rate_slows_its_tenant_down_and_nobody_else():
    world = make_world(num_pages=256, max_rows=4)
    set_tenant(world, "slow", tokens_per_s=20.0)  # a step is 0.01 s: one token in five steps
    slow = world.submit([1], owner="slow", max_tokens=400, seed=1)
    fast = world.submit([2], owner="fast", max_tokens=400, seed=2)
    for _ in range(300):
        world.step()
    assert len(world.streams[fast].ids) >= 298
    assert 20 <= len(world.streams[slow].ids) <= 20 * 4 + 2  # a burst of one second, then 20 a second


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"weight": 0.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": 1e9}, "weight"),
        ({"max_pages": -1}, "max_pages"),
        ({"guaranteed_pages": 100, "max_pages": 50}, "guaranteed_pages"),
        ({"guaranteed_pages": 65}, "guaranteed_pages"),  # the pool has 64
        ({"max_running": 0}, "max_running"),  # one runs
        ({"max_pages": 1}, "max_pages"),  # it holds two
        ({"tokens_per_s": -1.0}, "tokens_per_s"),
    ],
)
def test_impossible_limits_are_refused_by_name(limits, field):
    world = make_world()
    world.submit([1, 2, 3, 4], owner="alice", max_tokens=30)
    error = set_tenant(world, "alice", **limits)
    assert isinstance(error, m.Error)
    assert (error.code, error.field) == (ErrorCode.INVALID_REQUEST, field)
    world.run()
    assert world.streams[1].end.reason == FinishReason.LENGTH


def test_limits_are_reported_with_use():
    world = make_world()
    world.submit([1, 2, 3, 4], owner="alice", max_tokens=30)
    reply = set_tenant(world, "alice", weight=2.5)
    (row,) = reply.tenants
    assert (row.tenant, row.model, row.weight, row.max_pages) == ("alice", "demo", 2.5, UNLIMITED)
    assert (row.pages, row.running, row.waiting) == (2, 1, 0)
    world.send(CONTROL, m.TenantsGet(2, "bob"))
    assert world.replies.pop() == m.TenantsReply(2, ())
