"""A sequence that kills executors fails alone, after few deaths; chance deaths convict nobody."""

from __future__ import annotations

import math

import pytest
from kernel_world import CONTROL, SUPERVISOR, World

from llmos.codes import FinishReason
from llmos.protocol import messages as m
from llmos.protocol.codec import unpack_i32

POISON = 666


def make_world(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def die(world: World) -> None:
    world.executor = None
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True))
    world.start_executor()


def computes_poison(world: World) -> bool:
    """Would the next plan compute the poisonous token?"""
    assert world.executor is not None
    plan = world.executor.inbox[0]
    added = {add.row: unpack_i32(add.tokens) for add in plan.row_adds}
    rows = {row: entry.tokens for row, entry in world.executor.rows.items()} | added
    prefill = unpack_i32(plan.prefill)
    spans = [(row, start, start + length) for row, start, length in zip(*(prefill[place::4] for place in range(3)))]
    return any(POISON in rows[row][start:end] for row, start, end in spans)


def run(world: World, most: int = 5000) -> int:
    """Until all is done; the executor dies of poison. Returns how often."""
    deaths = 0
    for _ in range(most):
        if world.executor is None or not world.executor.inbox:
            return deaths
        if computes_poison(world):
            deaths += 1
            die(world)
        else:
            world.step()
    raise AssertionError("does not come to rest")


@pytest.mark.parametrize("others", [0, 1, 3, 7, 8, 31, 63])
def test_one_poisonous_sequence_fails_alone_after_few_deaths(others: int):
    world = make_world(num_pages=400, max_rows=64, max_step_tokens=512)
    innocent = [world.submit([index, 2, 3], max_tokens=30, seed=index) for index in range(others)]
    for _ in range(4):
        world.step()
    culprit = world.submit([1, POISON, 3], max_tokens=10)
    deaths = run(world)
    assert world.streams[culprit].end.reason == FinishReason.POISONED
    for rid in innocent:
        assert world.streams[rid].end.reason == FinishReason.LENGTH
        assert world.streams[rid].ids == world.streams[rid].expected(30)
    assert deaths <= math.ceil(math.log2(others + 1)) + 3
    assert not world.kernel.state.lanes["demo"].trial.is_watching


def test_two_culprits_are_both_found():
    world = make_world(num_pages=400, max_rows=64, max_step_tokens=512)
    rids = [world.submit([index, POISON if index in (2, 9) else 5, 3], max_tokens=6, seed=index) for index in range(12)]
    run(world)
    ends = [world.streams[rid].end.reason for rid in rids]
    assert [index for index, reason in enumerate(ends) if reason == FinishReason.POISONED] == [2, 9]
    assert set(ends) == {FinishReason.POISONED, FinishReason.LENGTH}


def test_deaths_by_chance_convict_nobody():
    world = make_world(num_pages=400, max_rows=64, max_step_tokens=512)
    rids = [world.submit([index, 2, 3], max_tokens=40, seed=index) for index in range(5)]
    for _ in range(30):
        for _ in range(4):
            world.step()
        if world.kernel.state.sequences:
            die(world)
    world.run()
    assert all(len(world.streams[rid].ids) == 40 for rid in rids)


def test_two_deaths_in_a_row_try_halves_and_then_everybody_goes_on():
    world = make_world(num_pages=400, max_rows=64)
    rids = [world.submit([index, 2, 3], max_tokens=10, seed=index) for index in range(4)]
    world.step()
    die(world)
    die(world)
    running = {seq.rid for seq in world.kernel.state.lanes["demo"].scheduler.rows.seqs if seq is not None}
    assert running == set(rids[:2])
    late = world.submit([9], max_tokens=3)
    world.run()
    assert all(world.streams[rid].end.reason == FinishReason.LENGTH for rid in (*rids, late))


@pytest.mark.parametrize("verb", ["suspend", "kill", "limit"])
def test_a_suspect_that_can_not_run_holds_nobody_up(verb: str):
    world = make_world(num_pages=400, max_rows=64)
    suspect = world.submit([1, 2, 3], max_tokens=10)
    die(world)
    die(world)
    other = world.submit([4], max_tokens=3, owner="bob")
    if verb == "suspend":
        world.ask(m.Suspend(1, suspect))
    elif verb == "kill":
        world.ask(m.Kill(1, suspect))
    else:
        world.ask(m.Suspend(1, suspect))
        world.ask(m.TenantSet(2, "alice", max_running=0))
        world.ask(m.Resume(3, suspect))
    world.run()
    assert len(world.streams[other].ids) == 3


def test_an_open_sequence_is_convicted_too():
    world = make_world()
    rid = world.spawn([1, POISON, 3])
    run(world)
    assert world.ask(m.Wait(1, rid)).reason == FinishReason.POISONED


def test_nobody_waits_for_a_suspect_that_may_not_run():
    world = make_world(num_pages=400)
    slow, other = world.submit([1, 2], owner="slow", max_tokens=9), world.submit([3, 4], owner="fast", max_tokens=9)
    world.ask(m.TenantSet(7, "slow", tokens_per_s=0.001))
    for _ in range(2):
        die(world)
    run(world)
    assert world.streams[slow].end is None
    assert world.streams[other].end.reason == FinishReason.LENGTH
    assert world.kernel.state.lanes["demo"].trial.is_watching
    assert not world.kernel.state.lanes["demo"].trial.is_on


def test_a_suspect_that_was_let_out_is_convicted_when_it_strikes_again():
    world = make_world(num_pages=400)
    culprit = world.submit([1, POISON], owner="slow", max_tokens=9)
    others = [world.submit([3, index], owner="fast", max_tokens=60) for index in range(4)]
    world.ask(m.TenantSet(7, "slow", tokens_per_s=1.0))
    deaths = 0
    for _ in range(400):
        world.now += 0.05
        world.send(CONTROL, m.TenantsGet(0))  # time passes
        if world.executor.inbox and computes_poison(world):
            deaths += 1
            die(world)
        elif world.executor.inbox:
            world.step()
    assert world.streams[culprit].end.reason == FinishReason.POISONED
    assert deaths <= 7
    assert all(world.streams[rid].end.reason == FinishReason.LENGTH for rid in others)
