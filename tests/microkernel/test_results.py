"""Texts for encoders, and prompts that are scored: sequences whose answer is not, or not only, tokens."""

from __future__ import annotations

import random
from array import array

import pytest
from crash import Journaled
from kernel_world import CONTROL, GATEWAY, SUPERVISOR, World, params, records_of, vector_of

from llmos.codes import ErrorCode, FinishReason, PageFate, SeqState
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32

SIZE = 3


def encoder(**options: object) -> World:
    world = World(**{"output_size": SIZE, "max_context": 40} | options)
    world.start_executor()
    return world


def decoder(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def text(length: int, first: int = 0) -> list[int]:
    return [(first + index) % 1000 for index in range(length)]


def vector(prompt: list[int], second_at: int = 0) -> bytes:
    return vector_of(array("i", prompt), second_at, SIZE)


def records(prompt: list[int], top: int) -> bytes:
    return records_of(array("i", prompt), top).tobytes()


def ended(world: World, rid: int) -> FinishReason:
    end = world.streams[rid].end
    assert end is not None, f"sequence {rid} has not ended"
    return FinishReason(end.reason)


def explain(world: World, message: m.Message) -> m.Error:
    answer = world.ask(message, GATEWAY if isinstance(message, (m.SeqSubmit, m.SeqSpawn)) else CONTROL)
    assert isinstance(answer, m.Error), answer
    return answer


# ---------------------------------------------------------------- encoders


def test_texts_of_differing_length_are_encoded_in_one_step():
    world = encoder(steps_in_flight=1)
    prompts = [text(length, length) for length in (1, 17, 4, 10)]
    rids = [world.submit(prompt, second_at=0) for prompt in prompts]
    assert world.run() == 2  # the first was on its way when the others came
    for rid, prompt in zip(rids, prompts):
        assert world.streams[rid].result == vector(prompt)
        assert world.streams[rid].ids == []
        assert ended(world, rid) is FinishReason.STOP
        assert world.streams[rid].end.usage.prompt_tokens == len(prompt)
    assert world.kernel.state.lanes["demo"].status().pages_free == 64


def test_where_the_second_text_begins_reaches_the_executor():
    world = encoder()
    rid = world.submit(text(9), second_at=4)
    world.run()
    assert world.streams[rid].result == vector(text(9), 4)


def test_a_text_is_never_cut_and_one_over_the_budget_goes_alone():
    world = encoder(max_step_tokens=16, steps_in_flight=1)
    lengths = (10, 10, 3, 39, 5)
    rids = [world.submit(text(length, length), second_at=0) for length in lengths]
    world.run()
    for rid, length in zip(rids, lengths):
        assert world.streams[rid].result == vector(text(length, length))
    chunks = [list(zip(*[iter(array("i", plan.prefill))] * 4)) for plan in world.plans if plan.prefill]
    assert [[length for _, _, length, _ in step] for step in chunks] == [[10], [10, 3], [39], [5]]


def test_as_long_as_the_context_fits_and_longer_is_refused():
    world = encoder(num_pages=10)  # of 4 tokens
    rid = world.submit(text(40), second_at=0)
    world.run()
    assert world.streams[rid].result == vector(text(40))
    error = explain(world, m.SeqSubmit(99, "demo", pack_i32(text(41)), params(), "alice", second_at=0))
    assert error.code == ErrorCode.CONTEXT_TOO_LONG


def test_a_model_of_the_other_kind_refuses_by_name():
    world = encoder()
    for message in (
        m.SeqSubmit(90, "demo", pack_i32([1]), params(), "alice"),
        m.SeqSpawn(91, "demo", pack_i32([1]), "alice"),
    ):
        error = explain(world, message)
        assert (error.code, error.field) == (ErrorCode.INVALID_REQUEST, "model")
        assert "'demo' is an encoder" in error.message
    error = explain(decoder(), m.SeqSubmit(92, "demo", pack_i32([1]), params(), "alice", second_at=0))
    assert (error.code, error.field) == (ErrorCode.INVALID_REQUEST, "model")
    error = explain(world, m.SeqSubmit(93, "demo", pack_i32([1, 2]), params(), "alice", second_at=2))
    assert error.field == "second_at"


def test_what_the_executor_takes_with_it_is_encoded_again():
    world = encoder(max_rows=2)
    rids = [world.submit(text(5, index), second_at=0) for index in range(6)]
    world.step()
    assert any(world.streams[rid].end for rid in rids)
    assert not all(world.streams[rid].end for rid in rids)
    world.executor = None
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True))
    world.start_executor()
    world.run()
    for index, rid in enumerate(rids):
        assert world.streams[rid].result == vector(text(5, index))
        assert world.streams[rid].repeated == 0


def test_suspended_while_it_is_encoded_it_is_encoded_again():
    world = encoder()
    rid = world.submit(text(9), second_at=0)
    world.send(CONTROL, m.Suspend(1, rid, PageFate.KEEP))
    world.run()
    assert world.streams[rid].result == b""
    assert world.kernel.state.sequences[rid].state is SeqState.SUSPENDED
    assert world.kernel.state.lanes["demo"].status().pages_free == 64
    world.send(CONTROL, m.Resume(2, rid))
    world.run()
    assert world.streams[rid].result == vector(text(9))
    assert world.row_add(rid).num_computed == 0


def test_killed_and_cancelled_before_their_turn():
    world = encoder(max_rows=1, steps_in_flight=1)
    first, second, third = (world.submit(text(4, index), second_at=0) for index in range(3))
    world.send(CONTROL, m.Kill(1, second))
    world.send(GATEWAY, m.SeqCancel(third, FinishReason.CANCELLED))
    world.run()
    assert [ended(world, rid) for rid in (first, second, third)] == [
        FinishReason.STOP, FinishReason.KILLED, FinishReason.CANCELLED,
    ]  # fmt: skip
    assert world.streams[second].result == world.streams[third].result == b""


def test_bad_numbers_are_tried_again_once():
    world = encoder()
    once, always, good = (world.submit(text(6, index), second_at=0) for index in range(3))
    world.executor.fail_rows = {once: 6, always: 6}
    world.executor.fail_times = {once: 1}
    world.run()
    assert world.streams[once].result == vector(text(6, 0))
    assert ended(world, always) is FinishReason.NUMERICAL_ERROR
    assert world.streams[good].result == vector(text(6, 2))


def test_an_executor_that_gives_no_vector_is_doubted():
    world = encoder()
    rid = world.submit(text(6), second_at=0)
    world.executor.loses_results = True
    world.step()
    assert world.streams[rid].end is None
    world.executor.loses_results = False
    world.run()
    assert world.streams[rid].result == vector(text(6))
    assert world.streams[rid].repeated == 0


def test_a_text_that_kills_executors_fails_alone():
    world = encoder()
    bad, *good = (world.submit(text(4, index), second_at=0) for index in range(5))
    deaths = 0
    while any(stream.end is None for stream in world.streams.values()):
        plan = world.executor.inbox[0]
        if any(add.rid == bad for add in plan.row_adds):
            deaths += 1
            world.executor = None
            world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True))
            world.start_executor()
        else:
            world.step()
    assert ended(world, bad) is FinishReason.POISONED
    assert deaths <= 5
    assert [world.streams[rid].result for rid in good] == [vector(text(4, index)) for index in range(1, 5)]


def test_fork_and_the_prefix_cache_have_no_business_with_texts():
    world = encoder(max_rows=1, steps_in_flight=1)
    first, second = (world.submit(text(20), second_at=0) for _ in range(2))
    error = explain(world, m.Fork(7, second, 1))
    assert error.code == ErrorCode.WRONG_STATE
    world.run()
    assert world.streams[first].result == world.streams[second].result == vector(text(20))
    assert world.kernel.state.lanes["demo"].status().prefix_hit_tokens == 0


def test_who_comes_late_gets_the_vector():
    world = encoder()
    rid = world.submit(text(6), second_at=0)
    world.run()
    answer = world.ask(m.SeqAttach(50, rid), GATEWAY)
    assert (answer.result, answer.output, answer.end.reason) == (vector(text(6)), b"", FinishReason.STOP)


@pytest.mark.parametrize("carried", [False, True])
def test_the_microkernel_dies_before_and_after_the_vector(carried: bool):
    world = encoder(max_rows=1, steps_in_flight=1)
    journaled = Journaled(world)
    world.kill_executor()
    world.start_executor()
    rids = [world.submit(text(5, index), second_at=index) for index in range(4)]
    world.step()
    world.step()
    before = {rid: world.streams[rid].result for rid in rids if world.streams[rid].end}
    assert 0 < len(before) < 4
    journaled.crash(carried=carried)
    world.run()
    for index, rid in enumerate(rids):
        assert world.streams[rid].result == vector(text(5, index), index)
        answer = world.ask(m.SeqAttach(world._next(), rid), GATEWAY)
        assert answer.result == world.streams[rid].result


# ---------------------------------------------------------------- scored prompts


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("length", [1, 2, 8, 33, 100])
def test_records_come_once_in_pieces_and_before_tokens(length: int, max_tokens: int):
    world = decoder(max_step_tokens=8)
    rid = world.submit(text(length), max_tokens=max_tokens, prompt_logprobs=2)
    while world.step() and not world.streams[rid].ids:
        pass
    assert world.streams[rid].result == records(text(length), 2)
    world.run()
    stream = world.streams[rid]
    assert (stream.result, stream.repeated) == (records(text(length), 2), 0)
    assert stream.ids == stream.expected(max_tokens)
    assert ended(world, rid) is FinishReason.LENGTH
    assert world.kernel.state.lanes["demo"].status().pages_free + _cached(world) == 64


def _cached(world: World) -> int:
    return world.kernel.state.lanes["demo"].status().pages_cached


def test_a_cached_prefix_is_computed_all_the_same_and_found_by_others():
    world = decoder()
    world.submit(text(20), max_tokens=1)
    world.run()
    scored = world.submit(text(20), max_tokens=0, prompt_logprobs=0)
    world.run()
    assert world.streams[scored].result == records(text(20), 0)
    assert world.row_add(scored).num_computed == 0
    other = world.submit(text(20), max_tokens=1)
    world.run()
    assert world.row_add(other).num_computed == 16


def test_the_prompt_may_fill_the_whole_pool():
    world = decoder(num_pages=8)
    rid = world.submit(text(32), max_tokens=0, prompt_logprobs=0)
    world.run()
    assert world.streams[rid].result == records(text(32), 0)


@pytest.mark.parametrize("max_tokens", [0, 30])
def test_preempted_and_moved_to_another_executor_nothing_comes_twice(max_tokens: int):
    world = decoder(max_step_tokens=8, num_pages=24)
    rids = [world.submit(text(30, index), max_tokens=max_tokens, prompt_logprobs=1, seed=index) for index in range(5)]
    for _ in range(5):
        world.step()
    world.executor = None
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True))
    world.start_executor()
    world.run()
    for index, rid in enumerate(rids):
        stream = world.streams[rid]
        assert (stream.result, stream.repeated) == (records(text(30, index), 1), 0)
        assert stream.ids == stream.expected(max_tokens)
    if max_tokens:
        assert world.kernel.state.lanes["demo"].status().preemptions > 5


@pytest.mark.parametrize("fate", list(PageFate))
@pytest.mark.parametrize("steps", range(1, 6))
def test_suspended_in_the_middle_of_the_prompt(fate: PageFate, steps: int):
    world = decoder(max_step_tokens=8, host_pages=16)
    rid = world.submit(text(30), max_tokens=0, prompt_logprobs=1)
    for _ in range(steps):
        world.step()
    if world.streams[rid].end is not None:
        return
    world.send(CONTROL, m.Suspend(1, rid, fate))
    world.run()
    world.send(CONTROL, m.Resume(2, rid))
    world.run()
    assert (world.streams[rid].result, world.streams[rid].repeated) == (records(text(30), 1), 0)
    assert ended(world, rid) is FinishReason.LENGTH


def test_a_missing_piece_has_the_prompt_computed_again():
    world = decoder(max_step_tokens=8)
    rid = world.submit(text(30), max_tokens=2, prompt_logprobs=1)
    world.step()
    world.executor.loses_results = True
    world.step()
    world.executor.loses_results = False
    world.run()
    stream = world.streams[rid]
    assert (stream.result, stream.repeated, stream.ids) == (records(text(30), 1), 0, stream.expected(2))


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("steps", range(2, 9))
def test_the_microkernel_dies_at_any_step(carried: bool, steps: int):
    world = decoder(max_step_tokens=8)
    journaled = Journaled(world)
    world.kill_executor()
    world.start_executor()
    scored = world.submit(text(30), max_tokens=0, prompt_logprobs=1)
    going_on = world.submit(text(20, 5), max_tokens=3, prompt_logprobs=0)
    for _ in range(steps):
        world.step()
    journaled.crash(carried=carried)
    world.run()
    for rid, prompt, top, count in ((scored, text(30), 1, 0), (going_on, text(20, 5), 0, 3)):
        stream = world.streams[rid]
        assert (stream.result, stream.ids) == (records(prompt, top), stream.expected(count))
        assert world.ask(m.SeqAttach(world._next(), rid), GATEWAY).result == records(prompt, top)


@pytest.mark.parametrize("seed", range(10))
def test_lives_of_scored_prompts_texts_and_others_in_a_pool_that_is_too_small(seed: int):
    """Whatever happens to them, each record comes once, and everybody ends with all of them."""
    rng = random.Random(seed)
    world = encoder(num_pages=20) if seed % 5 == 0 else decoder(max_step_tokens=8, num_pages=26, host_pages=10)
    wanted: dict[int, tuple[list[int], int | None, int]] = {}
    asleep: set[int] = set()
    for _ in range(120):
        act = rng.random()
        if act < 0.15:
            prompt, top, count = (
                text(rng.randint(1, 35), rng.randrange(900)),
                rng.choice([None, 0, 3]),
                rng.randint(0, 9),
            )
            if world.output_size:
                rid = world.submit(prompt, second_at=0)
            else:
                top, count = (top, count) if top is not None else (None, max(1, count))
                rid = world.submit(prompt, max_tokens=count, prompt_logprobs=top, seed=seed)
            wanted[rid] = (prompt, top, count)
        elif act < 0.22 and world.kernel.state.sequences:
            rid = rng.choice(sorted(world.kernel.state.sequences))
            asleep.add(rid)
            world.send(CONTROL, m.Suspend(world._next(), rid, rng.choice(list(PageFate))))
        elif act < 0.3 and asleep:
            world.send(CONTROL, m.Resume(world._next(), asleep.pop()))
        elif act < 0.32:
            world.executor = None
            world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True, asked=True))
            world.start_executor()
        else:
            world.step()
    for rid in asleep & set(world.kernel.state.sequences):
        world.send(CONTROL, m.Resume(world._next(), rid))
    world.run()
    for rid, (prompt, top, count) in wanted.items():
        stream = world.streams[rid]
        if world.output_size:
            assert (stream.result, ended(world, rid)) == (vector(prompt), FinishReason.STOP)
        else:
            assert stream.result == (b"" if top is None else records(prompt, top))
            assert (stream.ids, ended(world, rid)) == (stream.expected(count), FinishReason.LENGTH)
        assert stream.repeated == 0


def test_a_fork_does_not_repeat_its_parents_scores():
    world = decoder()
    rid = world.submit(text(10), max_tokens=20, prompt_logprobs=1)
    world.step()
    world.step()
    [child] = world.fork(rid)
    world.attach(child)
    world.run()
    assert world.streams[child].result == b""
    assert world.streams[rid].result == records(text(10), 1)


def test_refusals():
    world = decoder()
    huge = m.SeqSubmit(70, "demo", pack_i32([1] * 60_000), params(max_tokens=1, prompt_logprobs=20), "alice")
    assert explain(world, huge).field == "prompt_logprobs"
    none = m.SeqSubmit(71, "demo", pack_i32([1]), params(max_tokens=0), "alice")
    assert explain(world, none).field == "max_tokens"
    rid = world.spawn([1, 2])
    answer = world.ask(m.SeqContinue(72, rid, "demo", params(max_tokens=1, prompt_logprobs=0)), GATEWAY)
    assert isinstance(answer, m.Error)
    assert answer.field == "prompt_logprobs"
