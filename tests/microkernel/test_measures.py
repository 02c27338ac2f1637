"""Histograms of what users wait for: each observation is made once, at the time that the caller's clock says."""

from __future__ import annotations

import pytest
from kernel_world import World

from llmos.codes import FinishReason
from llmos.microkernel.measures import Histogram
from llmos.protocol import messages as m

STEP_S = 0.01  # of World.step


def make_world(**shape):
    world = World(**shape)
    world.start_executor()
    return world


def measured(world):
    """({name: histogram}, {reason: count}) of the one model."""
    [lane] = world.ask(m.MeasuresGet(10**6)).lanes
    assert lane.model == "demo"
    return {row.name: row for row in lane.histograms}, {row.reason: row.count for row in lane.ended}


def test_a_value_counts_in_the_first_bucket_that_holds_it():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    histogram.add(10.0, times=3)
    assert histogram.counts == [2, 2, 4]
    assert histogram.sum == pytest.approx(7.5 + 30.0)


def test_one_request_is_one_wait_one_first_token_and_the_gaps_between_its_tokens():
    world = make_world()
    world.submit([1, 2, 3], max_tokens=6)
    world.run()
    found, ended = measured(world)
    assert sum(found["queue"].counts) == 1
    assert found["queue"].sum == 0.0  # nobody was before it
    assert sum(found["first_token"].counts) == 1
    assert found["first_token"].sum == pytest.approx(STEP_S)
    assert sum(found["between_tokens"].counts) == 5
    assert found["between_tokens"].sum == pytest.approx(5 * STEP_S)
    assert sum(found["step"].counts) == len(world.plans)
    assert ended == {FinishReason.LENGTH: 1}


def test_who_waits_for_a_row_waited_in_the_queue():
    world = make_world(max_rows=1)
    world.submit([1, 2, 3], max_tokens=4)
    world.submit([1, 2, 3], max_tokens=1)
    world.run()
    found, _ = measured(world)
    assert sum(found["queue"].counts) == 2
    assert found["queue"].sum >= 4 * STEP_S  # the first one's life
    assert found["first_token"].sum >= found["queue"].sum + 2 * STEP_S


def test_a_preempted_sequence_has_one_first_token_and_an_idle_machine_no_gaps():
    world = make_world(num_pages=8, page_size=4, prefix_cache=False)
    for _ in range(3):
        world.submit(list(range(8)), max_tokens=12)
    world.run()
    world.now += 1000.0
    world.submit([1, 2, 3], max_tokens=3)
    world.run()
    assert world.kernel.state.lanes["demo"].status().preemptions > 0
    found, _ = measured(world)
    assert sum(found["first_token"].counts) == 4
    assert found["between_tokens"].counts[-1] == 0
    assert found["between_tokens"].sum < 1000.0


def test_every_turn_is_a_request_and_killed_ones_are_counted_by_their_reason():
    world = make_world()
    rid = world.spawn([1, 2, 3])
    world.continue_(rid, max_tokens=2)
    world.run()
    world.now += 50.0  # its owner thinks
    world.continue_(rid, max_tokens=2)
    world.run()
    found, ended = measured(world)
    assert sum(found["first_token"].counts) == 2
    assert found["first_token"].sum < 50.0
    assert ended == {FinishReason.LENGTH: 2}
    other = world.submit([5, 6], max_tokens=100)
    world.step()
    world.ask(m.Kill(99, other))
    assert measured(world)[1] == {FinishReason.LENGTH: 2, FinishReason.KILLED: 1}


def test_measures_outlive_an_executor():
    world = make_world()
    world.submit([1, 2, 3], max_tokens=6)
    world.run()
    world.kill_executor()
    world.start_executor()
    world.submit([1, 2, 3], max_tokens=6)
    world.run()
    found, ended = measured(world)
    assert sum(found["first_token"].counts) == 2
    assert ended == {FinishReason.LENGTH: 2}
