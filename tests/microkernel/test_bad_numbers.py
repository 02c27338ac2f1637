"""Logits that are not finite: computed again once, in other pages; then the sequence ends alone, and nobody finds what it computed."""

from __future__ import annotations

import pytest
from kernel_world import World

from llmos.codes import FinishReason


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_numbers_that_went_bad_once_are_computed_again_and_nobody_notices(prefix_cache: bool):
    world = World(num_pages=64, prefix_cache=prefix_cache)
    world.start_executor()
    prompt = list(range(1, 14))
    rid = world.submit(prompt, max_tokens=12, seed=3)
    for _ in range(5):
        world.step()
    world.executor.fail_rows[rid], world.executor.fail_times[rid] = FinishReason.NUMERICAL_ERROR, 1
    while not world.kernel.state.sequences[rid].bad_times:
        world.step()
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(12)
    assert world.streams[rid].end.reason == FinishReason.LENGTH
    assert world.row_add(rid).num_computed == 0, "what its pages held is not to be trusted"


def test_pages_with_bad_numbers_are_found_by_nobody():
    world = World(num_pages=64)
    world.start_executor()
    prompt = list(range(1, 14))
    rid = world.submit(prompt, max_tokens=12, seed=3)
    for _ in range(5):
        world.step()
    world.executor.fail_rows[rid] = FinishReason.NUMERICAL_ERROR
    world.run()
    assert world.streams[rid].end.reason == FinishReason.NUMERICAL_ERROR
    other = world.submit(prompt, max_tokens=3, seed=4)
    world.run()
    assert world.row_add(other).num_computed == 0
    assert world.streams[other].ids == world.streams[other].expected(3)


def test_what_others_hold_stays_theirs_when_numbers_go_bad():
    world = World(num_pages=64)
    world.start_executor()
    prompt = list(range(1, 14))
    good = world.submit(prompt, max_tokens=40, seed=1)
    for _ in range(4):
        world.step()
    bad = world.submit(prompt, max_tokens=40, seed=2)
    for _ in range(4):
        world.step()
    assert world.row_add(bad).num_computed == 12
    world.executor.fail_rows[bad] = FinishReason.NUMERICAL_ERROR
    world.run()
    assert world.streams[bad].end.reason == FinishReason.NUMERICAL_ERROR
    assert world.streams[good].ids == world.streams[good].expected(40)


def test_bad_numbers_again_and_again_end_a_sequence_also_if_it_gets_further():
    world = World(num_pages=64)
    world.start_executor()
    rid = world.submit([1, 2, 3], max_tokens=40, seed=1)
    for _ in range(60):
        world.executor.fail_rows[rid], world.executor.fail_times[rid] = FinishReason.NUMERICAL_ERROR, 1
        for _ in range(6):
            world.step()
    assert world.streams[rid].end.reason == FinishReason.NUMERICAL_ERROR
    assert world.streams[rid].ids == world.streams[rid].expected(len(world.streams[rid].ids))
    assert len(world.streams[rid].ids) >= 3
