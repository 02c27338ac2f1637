"""The fast path of a step decides what the general path decides: whole lives with and without it give the same messages."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from kernel_world import CONTROL, GATEWAY, World
from simulation.run import Life, live

from llmos.codes import FinishReason
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.outbox import Send
from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.steady import Steady
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, pack_i32, unpack_i32

Said = list[tuple[int, bytes]]
PAGE_SIZE = 4
FROM_KERNEL = Schema(m.FromKernel)


@contextmanager
def general_path_only():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steady, "begin", classmethod(lambda *args: None))
        yield


@contextmanager
def overheard():
    """Everything that kernels say, in order."""
    said: Said = []

    def spy(method: Callable[..., list[Send]]) -> Callable[..., list[Send]]:
        def wrapped(*args: object) -> list[Send]:
            effects = method(*args)
            said.extend((effect.peer, encode(effect.message)) for effect in effects)
            return effects

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("handle", "tick", "peer_down"):
            patch.setattr(Kernel, name, spy(getattr(Kernel, name)))
        yield said


def make_world(**shape: object) -> World:
    world = World(**shape)
    world.start_executor()
    return world


def scheduler(world: World) -> Scheduler:
    return world.kernel.state.lanes["demo"].scheduler


def steady_steps(life: Life) -> int:
    return sum(lane.scheduler.counters.steady_steps for lane in life.world.kernel.state.lanes.values())


def crowd(count: int, max_tokens: int, *, num_pages: int = 4000, spread: bool = False, max_rows: int = 0) -> World:
    """Rows in lockstep, or with prompts of all lengths."""
    world = make_world(num_pages=num_pages, page_size=PAGE_SIZE, max_rows=max_rows or count, max_step_tokens=10_000)
    for index in range(count):
        prompt = [index] * (5 + (index % PAGE_SIZE if spread else 0))
        world.submit(prompt, owner=f"tenant{index % 3}", max_tokens=max_tokens, seed=index)
    return world


def appends_of(world: World) -> list[int]:
    """Rows that got a page, by plan."""
    return [len(unpack_i32(plan.page_appends)) // 3 for plan in world.plans]


def assert_all_told(world: World, count: int) -> None:
    for stream in world.streams.values():
        assert stream.ids == stream.expected(count)
        assert stream.end.reason == FinishReason.LENGTH


def test_lives_are_the_same_with_and_without_it():
    steady = 0
    for seed in range(16):
        with overheard() as fast:
            life = live(seed, 350)
        with overheard() as general, general_path_only():
            other = live(seed, 350)
        assert fast == general, f"seed {seed}"
        assert steady_steps(other) == 0
        steady += steady_steps(life)
    assert steady > 200


@pytest.mark.parametrize("spread", [False, True])
def test_plans_of_rows_that_decode_together_are_the_same(spread: bool):
    """Up to sixteen rows need a page in a step: nobody gets one ahead."""
    fast = crowd(16, 60, spread=spread)
    fast.run()
    with general_path_only():
        general = crowd(16, 60, spread=spread)
        general.run()
    assert fast.plans == general.plans
    assert scheduler(fast).counters.steady_steps > 40
    assert scheduler(general).counters.steady_steps == 0
    assert_all_told(fast, 60)


def test_rows_in_lockstep_do_not_all_grow_in_the_same_step():
    world = crowd(64, 80)
    world.run()
    assert_all_told(world, 80)
    with general_path_only():
        general = crowd(64, 80)
        general.run()
    assert set(appends_of(general)) == {0, 1, 63}  # the first to come is a step ahead
    settled = appends_of(world)[3 * PAGE_SIZE : 70]
    assert set(settled) == {64 // PAGE_SIZE}
    assert sum(appends_of(world)) - sum(appends_of(general)) <= 64  # at most one page ahead


def test_token_arrays_of_rows_in_lockstep_do_not_all_grow_in_the_same_step():
    world = crowd(64, 400, num_pages=8000)
    for _ in range(300):
        world.step()
    seqs = [seq for seq in scheduler(world).rows.seqs if seq is not None]
    assert len({len(seq.tokens) for seq in seqs}) <= 2  # the first to come is a step ahead
    room = Counter(sys.getsizeof(seq.tokens) for seq in seqs)
    assert max(room.values()) <= 64 // 8
    assert sum(room.values()) == 64


def test_pages_that_are_short_are_granted_when_needed():
    """Fewer than eight free pages a row: as on the general path, page for page."""
    fast = crowd(32, 40, num_pages=32 * 9)
    fast.run()
    with general_path_only():
        general = crowd(32, 40, num_pages=32 * 9)
        general.run()
    assert fast.plans == general.plans
    assert scheduler(fast).counters.steady_steps > 20


def test_pages_that_become_short_while_rows_hold_some_ahead():
    world = crowd(32, 100, num_pages=32 * 14)
    world.run()
    assert_all_told(world, 100)
    assert scheduler(world).counters.preemptions > 0
    assert scheduler(world).counters.steady_steps > 20


def test_a_row_that_has_a_page_ahead_gets_none_in_its_first_turn():
    """The fast path ends and begins again: what was granted ahead is used up first."""
    world = crowd(64, 200)
    for count in range(60):
        world.step()
        if count % 7 in (0, 1):  # a tenant over its rate has to wait
            world.send(CONTROL, m.TenantSet(1, "tenant0", tokens_per_s=1.0 if count % 7 == 0 else 0.0))
        rows = scheduler(world).rows
        room = rows.capacity[rows.order] - rows.computed[rows.order]
        assert room.max() < 2 * PAGE_SIZE
    assert 10 < scheduler(world).counters.steady_steps < 50
    world.run()
    assert_all_told(world, 200)


def test_a_stop_token_ends_a_sequence_in_the_same_step_as_on_the_general_path():
    def told() -> World:
        world = make_world(page_size=PAGE_SIZE)
        rids = [world.submit([index, 2, 3], max_tokens=50, seed=index, ignore_eos=True) for index in range(3)]
        stop = world.streams[rids[0]].expected(30)[20]
        early = world.streams[rids[1]].expected(30)[10]
        world.submit([9, 9], max_tokens=50, seed=0, stop_token_ids=(stop, early), min_tokens=3)
        world.submit([1, 2, 3], max_tokens=50, seed=1, stop_token_ids=(early,), min_tokens=15)
        world.run()
        return world

    fast = told()
    with general_path_only():
        general = told()
    assert fast.plans == general.plans
    assert {rid: (s.ids, s.end.reason) for rid, s in fast.streams.items()} == {
        rid: (s.ids, s.end.reason) for rid, s in general.streams.items()
    }
    assert scheduler(fast).counters.steady_steps > 20


@pytest.mark.parametrize("token", [-1, 1000, 2**31 - 1])
def test_an_impossible_token_is_computed_again(token: int):
    world = crowd(4, 30)
    for _ in range(10):
        world.step()
    assert scheduler(world).in_flight[0].steady is not None
    result = world.executor.run_one()
    samples = np.frombuffer(result.samples, "<i4").copy()
    samples[5] = token
    broken = m.StepResult(result.generation, result.step, samples.tobytes(), (), b"", 10, 0)
    world.send(world._executor_sender(), broken)
    world.kernel.check()
    assert scheduler(world).counters.preemptions == 1
    world.run()
    assert_all_told(world, 30)


@pytest.mark.parametrize("field", [0, 1])
def test_a_result_for_another_row_or_position_is_not_taken(field: int):
    world = crowd(4, 30)
    for _ in range(10):
        world.step()
    result = world.executor.run_one()
    samples = np.frombuffer(result.samples, "<i4").copy()
    samples[3 + field] += 1
    world.send(
        world._executor_sender(), m.StepResult(result.generation, result.step, samples.tobytes(), (), b"", 10, 0)
    )
    world.kernel.check()
    assert scheduler(world).counters.preemptions == 1
    world.run()
    assert_all_told(world, 30)


def test_each_reader_gets_its_own_columns_and_nobody_those_of_who_is_not_read():
    world = crowd(6, 60)
    for _ in range(10):
        world.step()
    rids = sorted(world.streams)
    world.send(GATEWAY, m.SeqDetach(rids[0]))
    for rid in rids[1:3]:
        world.ask(m.SeqAttach(world._next(), rid), CONTROL)
    with overheard() as said:
        for _ in range(6):
            world.step()
    assert scheduler(world).in_flight[0].steady is not None
    got: dict[int, set[int]] = {}
    for peer, columns in _tokens_of(said):
        got.setdefault(peer, set()).update(columns[:, 0].tolist())
    assert got == {GATEWAY.peer: set(rids[3:]), CONTROL.peer: set(rids[1:3])}


def _tokens_of(said: Said) -> list[tuple[int, np.ndarray]]:
    messages = [(peer, FROM_KERNEL.decode(frame)) for peer, frame in said]
    return [
        (peer, np.frombuffer(message.columns, "<i8").reshape(-1, 3))
        for peer, message in messages
        if isinstance(message, m.SeqTokens) and message.columns
    ]


def test_a_rate_that_is_kept_is_no_reason_against_it():
    def limited() -> World:
        world = make_world(page_size=PAGE_SIZE)
        world.send(CONTROL, m.TenantSet(1, "alice", tokens_per_s=180.0))  # two rows make 200
        for index in range(2):
            world.submit([index], max_tokens=100, seed=index)
        while world.kernel.state.sequences:
            world.run()
            world.now += 0.5
            world.send(CONTROL, m.StatusGet(1))
        return world

    fast = limited()
    with general_path_only():
        general = limited()
    assert fast.plans == general.plans
    assert scheduler(fast).counters.steady_steps > 50
    assert_all_told(fast, 100)


def test_results_of_steady_steps_are_committed_by_it(monkeypatch: pytest.MonkeyPatch):
    taken: list[bool] = []
    commit = Steady.commit

    def spy(self: Steady, *args: object) -> object:
        outcome = commit(self, *args)
        taken.append(outcome is not None)
        return outcome

    monkeypatch.setattr(Steady, "commit", spy)
    world = crowd(4, 50)
    world.run()
    assert sum(taken) > 40
    assert taken[-1] is False  # all end
    assert_all_told(world, 50)


def test_offsets_have_no_gap_when_the_paths_take_turns():
    """Every fifth step something happens that only the general path can deal with."""
    world = crowd(8, 120, max_rows=9)
    for count in range(100):
        world.step()
        if count % 5 == 0:
            world.submit([500 + count], max_tokens=1, seed=count)
    world.run()
    steps = [plan.step for plan in world.plans]
    assert all(after == before + 1 for before, after in pairwise(steps))
    assert 0 < scheduler(world).counters.steady_steps < scheduler(world).counters.steps
    for stream in world.streams.values():
        assert stream.ids == stream.expected(len(stream.ids))
        assert stream.end.reason == FinishReason.LENGTH


def test_a_turn_that_is_shortened_ends_where_it_should():
    world = crowd(3, 90)
    for _ in range(10):
        world.step()
    assert scheduler(world).in_flight[0].steady is not None
    seq = world.kernel.state.sequences[min(world.streams)]
    scheduler(world).residents.shorten(seq, seq.prompt_len + 40)
    world.kernel.check()
    world.run()
    lengths = [len(world.streams[rid].ids) for rid in sorted(world.streams)]
    assert lengths == [40, 90, 90]


def test_a_prompt_finds_what_a_sequence_left_behind_that_decoded_on_the_fast_path():
    world = make_world(page_size=PAGE_SIZE)
    first = world.submit([1, 2, 3], max_tokens=30)
    world.run()
    prompt = [1, 2, 3, *world.streams[first].ids, 7]
    second = world.submit(prompt, max_tokens=1)
    world.run()
    assert world.row_add(second).num_computed == (3 + 30 - 1) // PAGE_SIZE * PAGE_SIZE
    assert world.streams[second].ids == world.streams[second].expected(1)
    assert pack_i32(prompt) == world.row_add(second).tokens
