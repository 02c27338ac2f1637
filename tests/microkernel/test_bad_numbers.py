"""Logits that are not finite: computed again once, in other pages; then the sequence ends alone, and nobody finds what it computed."""

from __future__ import annotations

import pytest
from kernel_world import World, token_at

from llmos.codes import FinishReason
from llmos.protocol.params import Grammar


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


@pytest.mark.parametrize("has_grammar", [True, False])
def test_a_grammar_that_leads_nowhere_ends_its_sequence_at_once(has_grammar: bool):
    """Computing it again would find the same. Without a grammar the executor's word for that is taken as bad numbers."""
    world = World(num_pages=64)
    world.start_executor()
    prompt = list(range(1, 14))
    grammar = Grammar("regex", "a+") if has_grammar else None
    rid = world.submit(prompt, max_tokens=12, seed=3, grammar=grammar)
    for _ in range(5):
        world.step()
    world.executor.fail_rows[rid], world.executor.fail_times[rid] = FinishReason.GRAMMAR_FAILED, 1
    world.run()
    stream = world.streams[rid]
    assert stream.end.reason == (FinishReason.GRAMMAR_FAILED if has_grammar else FinishReason.LENGTH)
    assert FinishReason.GRAMMAR_FAILED.is_failure
    if has_grammar:
        other = world.submit(prompt, max_tokens=3, seed=4)
        world.run()
        assert world.row_add(other).num_computed == 12, "its pages are as good as any"


def test_an_output_with_a_grammar_may_end_before_min_tokens():
    world = World(num_pages=64)
    world.start_executor()
    for grammar, length in ((Grammar("regex", "a+"), 3), (None, 6)):
        tokens = [token_at(3, 3 + at) for at in range(6)]
        rid = world.submit([1, 2, 3], max_tokens=6, min_tokens=6, seed=3, stop_token_ids=(tokens[2],), grammar=grammar)
        world.run()
        assert world.streams[rid].ids == tokens[:length]
        assert (world.streams[rid].end.reason == FinishReason.STOP) == (grammar is not None)
