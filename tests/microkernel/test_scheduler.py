"""The microkernel with a fake executor that checks every KV read: exact pages, exact plans, exact tokens."""

from __future__ import annotations

import pytest
from kernel_world import CONTROL, GATEWAY, SUPERVISOR, World, params, token_at

from llmos.codes import ErrorCode, FinishReason
from llmos.microkernel.kernel import Sender
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32


def make_world(**shape: object) -> World:
    world = World(**shape)
    world.start_executor()
    return world


def test_one_sequence_gets_its_tokens_in_order_and_one_end():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=5)
    world.run()
    stream = world.streams[rid]
    assert stream.ids == stream.expected(5)
    assert stream.end.reason == FinishReason.LENGTH
    assert (stream.end.usage.prompt_tokens, stream.end.usage.output_tokens) == (3, 5)


def test_first_plan_carries_the_row_whole_and_steady_decode_is_an_empty_difference():
    world = make_world(page_size=4)
    world.submit([1, 2, 3, 4, 5], max_tokens=8)
    first, second = world.plans
    (add,) = first.row_adds
    assert (add.row, list(unpack_i32(add.tokens)), add.num_computed) == (0, [1, 2, 3, 4, 5], 0)
    assert list(unpack_i32(add.pages)) == [0, 1]  # 5 tokens and one more: two pages of 4
    assert list(unpack_i32(first.prefill)) == [0, 0, 5, 1]
    assert first.decode == b""
    assert (second.row_adds, list(unpack_i32(second.decode))) == ((), [0])  # planned before the first result
    world.step()
    third = world.plans[2]
    assert (third.decode, third.prefill, third.page_appends, third.row_frees) == (None, b"", b"", b"")
    for _ in range(2):
        world.step()
    assert list(unpack_i32(world.plans[4].page_appends)) == [0, 2, 2]  # position 8 opens page index 2


def test_at_most_two_steps_are_in_flight():
    world = make_world()
    world.submit([1, 2, 3], max_tokens=50)
    assert len(world.executor.inbox) == 2
    world.step()
    assert len(world.executor.inbox) == 2


def test_long_prompt_is_chunked_by_the_token_budget():
    world = make_world(max_step_tokens=8)
    rid = world.submit(list(range(20)), max_tokens=2)
    world.run()
    chunks = [list(unpack_i32(plan.prefill)) for plan in world.plans]
    assert chunks[:3] == [[0, 0, 8, 0], [0, 8, 8, 0], [0, 16, 4, 1]]
    assert world.streams[rid].ids == world.streams[rid].expected(2)


def test_decode_goes_before_a_long_prompt_in_every_step():
    world = make_world(max_step_tokens=8, num_pages=256)
    talker = world.submit([1, 2], max_tokens=30)
    for _ in range(3):
        world.step()
    before = len(world.streams[talker].ids)
    world.submit(list(range(200)), max_tokens=1)
    for _ in range(10):
        world.step()
    assert len(world.streams[talker].ids) == before + 10  # one token per step, whatever the prompt's length


def test_prefix_hit_shares_pages_and_computes_only_the_rest():
    world = make_world(page_size=4, num_pages=64)
    prompt = list(range(10, 30))
    first = world.submit(prompt, max_tokens=4)
    world.run()
    computed = world.executor.computed_tokens
    second = world.submit([*prompt, 1, 2], max_tokens=4, seed=8)
    world.run()
    assert list(unpack_i32(world.row_add(second).pages))[:5] == [0, 1, 2, 3, 4]
    assert world.streams[second].end.usage.cached_tokens == 20
    assert world.executor.computed_tokens - computed == 2 + 3  # the rest of the prompt, then three decode steps
    assert world.streams[first].end.usage.cached_tokens == 0
    assert world.streams[second].ids == world.streams[second].expected(4)


def test_prefix_hit_leaves_the_last_prompt_token_to_compute():
    world = make_world(page_size=4)
    for _ in range(2):
        rid = world.submit(list(range(8)), max_tokens=2)
        world.run()
    assert (
        world.streams[rid].end.usage.cached_tokens == 4
    )  # 8 tokens are 2 full pages; the second holds the token to compute


def test_prefix_cache_is_salted_with_the_owner():
    world = make_world(page_size=4)
    hits = []
    for owner in ("alice", "bob", "alice"):
        rid = world.submit(list(range(20)), owner=owner, max_tokens=2)
        world.run()
        hits.append(world.row_add(rid).num_computed)
    assert hits == [0, 0, 16]


def test_prefix_cache_can_be_switched_off():
    world = make_world(page_size=4, prefix_cache=False)
    for _ in range(2):
        rid = world.submit(list(range(20)), max_tokens=2)
        world.run()
    assert world.streams[rid].end.usage.cached_tokens == 0
    assert world.kernel.state.lanes["demo"].status().pages_cached == 0


def test_full_pool_preempts_the_newest_and_recomputes_it_without_a_changed_token():
    world = make_world(num_pages=12, page_size=4)
    rids = [world.submit([seed, 2, 3, 4, 5], max_tokens=24, seed=seed) for seed in range(5)]
    world.run()
    for rid in rids:
        assert world.streams[rid].ids == world.streams[rid].expected(24)
    usages = [world.streams[rid].end.usage for rid in rids]
    assert usages[0].preemptions == 0  # the oldest is never the victim
    assert sum(usage.preemptions for usage in usages) == world.kernel.state.lanes["demo"].status().preemptions > 0


def test_one_sequence_may_fill_the_whole_pool():
    world = make_world(num_pages=4, page_size=4)
    rid = world.submit([1, 2, 3], max_tokens=None)
    world.run()
    assert (
        len(world.streams[rid].ids) == 13
    )  # 16 slots; the last token needs no slot of its own but counts for the limit
    assert world.streams[rid].end.reason == FinishReason.LENGTH


def test_max_tokens_is_bounded_by_the_context():
    world = make_world(max_context=10)
    rid = world.submit([1, 2, 3], max_tokens=100)
    world.run()
    assert len(world.streams[rid].ids) == 7


def test_stop_token_ends_the_sequence_and_is_the_last_token():
    stop = token_at(7, 6)
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=50, stop_token_ids=(stop,))
    world.run()
    stream = world.streams[rid]
    assert stream.ids == stream.expected(4)
    assert stream.end.reason == FinishReason.STOP


def test_stop_token_before_min_tokens_does_not_end():
    stop = token_at(7, 6)
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=8, min_tokens=4, stop_token_ids=(stop,))
    world.run()
    assert len(world.streams[rid].ids) == 8


def test_the_step_in_flight_when_a_sequence_stops_is_dropped():
    stop = token_at(7, 4)
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=50, stop_token_ids=(stop,))
    world.run()
    assert len(world.streams[rid].ids) == 2
    assert world.kernel.state.lanes["demo"].status().tokens_committed == 2


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancel_at_any_moment_gives_one_end_and_frees_everything(steps: int):
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=50)
    for _ in range(steps):
        world.step()
    world.send(GATEWAY, m.SeqCancel(rid, FinishReason.CANCELLED))
    world.send(GATEWAY, m.SeqCancel(rid, FinishReason.CANCELLED))
    world.run()
    assert world.streams[rid].end.reason == FinishReason.CANCELLED
    status = world.kernel.state.lanes["demo"].status()
    assert status.pages_free + status.pages_cached == status.pages_total
    assert (status.running, status.waiting, world.kernel.state.sequences) == (0, 0, {})


def test_stop_string_from_the_gateway_truncates_the_usage():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=50)
    for _ in range(6):
        world.step()
    world.send(GATEWAY, m.SeqFinish(rid, 4))
    world.run()
    assert world.streams[rid].end.reason == FinishReason.STOP
    assert world.streams[rid].end.usage.output_tokens == 4


def test_a_client_that_does_not_read_is_descheduled_and_others_go_on():
    world = make_world(window=5)
    lazy = world.submit([1, 2, 3], max_tokens=20)
    world.run()
    assert len(world.streams[lazy].ids) == 5
    other = world.submit([4, 5], max_tokens=5)
    world.run()
    assert world.streams[other].end is not None
    world.send(GATEWAY, m.SeqAck(lazy, 5))
    world.run()
    assert len(world.streams[lazy].ids) == 10


def test_kill_needs_the_owner():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=50)
    world.send(CONTROL, m.Kill(5, rid, "bob"))
    foreign = world.replies.pop()
    world.send(CONTROL, m.Kill(5, rid + 1, "bob"))
    unknown = world.replies.pop()
    assert foreign == m.Error(5, ErrorCode.NOT_FOUND, f"no sequence {rid}", "rid", rid)
    assert unknown == m.Error(5, ErrorCode.NOT_FOUND, f"no sequence {rid + 1}", "rid", rid + 1)
    world.send(CONTROL, m.Kill(6, rid, "alice"))
    assert world.replies.pop() == m.Killed(6, (rid,))
    assert world.streams[rid].end.reason == FinishReason.KILLED


def test_ps_shows_only_the_owner_asked_for():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=50)
    world.step()
    world.send(CONTROL, m.PsGet(1, "bob"))
    assert world.replies.pop() == m.PsReply(1, ())
    world.send(CONTROL, m.PsGet(2))
    (row,) = world.replies.pop().rows
    assert (row.rid, row.owner, row.prompt_tokens, row.output_tokens, row.max_tokens, row.pages) == (
        rid,
        "alice",
        3,
        1,
        50,
        2,
    )


def test_executor_death_ends_its_sequences_with_a_typed_reason():
    world = make_world()
    rids = [world.submit([1, 2, seed], max_tokens=50, seed=seed) for seed in range(12)]  # 8 run, 4 wait
    for _ in range(3):
        world.step()
    world.kill_executor()
    assert {world.streams[rid].end.reason for rid in rids} == {FinishReason.EXECUTOR_LOST}
    world.send(GATEWAY, m.SeqSubmit(77, "demo", pack_i32([1]), params(), "alice"))
    assert world.replies.pop().code == ErrorCode.UNAVAILABLE


def test_an_executor_that_registers_again_gets_a_new_generation_and_recomputes():
    world = make_world()
    rids = [world.submit([1, 2, seed], max_tokens=30, seed=seed) for seed in range(12)]
    for _ in range(5):
        world.step()
    old = world.executor
    world.start_executor()
    assert world.executor.generation == 2
    stale = old.run_one()
    world.send(Sender(world.executor_peer, "executor", "executor.demo"), stale)
    assert world.kernel.state.lanes["demo"].results_dropped == 1
    world.run()
    for rid in rids:
        assert world.streams[rid].ids == world.streams[rid].expected(30)


def test_a_repeated_result_is_dropped_and_counted():
    world = make_world()
    world.submit([1, 2, 3], max_tokens=50)
    result = world.executor.run_one()
    executor = Sender(world.executor_peer, "executor", "executor.demo")
    world.send(executor, result)
    world.send(executor, result)
    assert world.kernel.state.lanes["demo"].results_dropped == 1
    assert world.kernel.state.lanes["demo"].status().tokens_committed == 1


def test_a_row_that_fails_by_itself_ends_alone():
    world = make_world()
    good = world.submit([1, 2, 3], max_tokens=10)
    bad = world.submit([1, 2, 4], max_tokens=10, seed=5)
    world.step()
    world.executor.fail_rows[bad] = FinishReason.NUMERICAL_ERROR
    world.run()
    assert world.streams[bad].end.reason == FinishReason.NUMERICAL_ERROR
    assert world.streams[good].ids == world.streams[good].expected(10)


def test_a_token_outside_the_vocabulary_is_not_committed_but_recomputed():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=10)
    result = world.executor.run_one()
    row, position, _ = unpack_i32(result.samples)
    executor = Sender(world.executor_peer, "executor", "executor.demo")
    world.send(executor, m.StepResult(result.generation, result.step, pack_i32([row, position, 10**6]), (), b"", 1, 0))
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(10)
    assert world.streams[rid].end.usage.preemptions == 1


@pytest.mark.parametrize(
    ("message", "code", "field"),
    [
        (m.SeqSubmit(9, "nope", pack_i32([1]), params(), "a"), ErrorCode.NOT_FOUND, "model"),
        (m.SeqSubmit(9, "demo", b"", params(), "a"), ErrorCode.INVALID_REQUEST, "prompt"),
        (m.SeqSubmit(9, "demo", b"abc", params(), "a"), ErrorCode.PROTOCOL, None),
        (m.SeqSubmit(9, "demo", pack_i32([1000]), params(), "a"), ErrorCode.INVALID_REQUEST, "prompt"),
        (m.SeqSubmit(9, "demo", pack_i32([-1]), params(), "a"), ErrorCode.INVALID_REQUEST, "prompt"),
        (m.SeqSubmit(9, "demo", pack_i32([1] * 256), params(), "a"), ErrorCode.CONTEXT_TOO_LONG, "prompt"),
        (m.SeqSubmit(9, "demo", pack_i32([1]), params(top_p=2.0), "a"), ErrorCode.INVALID_REQUEST, "top_p"),
        (
            m.SeqSubmit(9, "demo", pack_i32([1]), params(temperature=None), "a"),
            ErrorCode.INVALID_REQUEST,
            "temperature",
        ),
        (
            m.SeqSubmit(9, "demo", pack_i32([1]), params(temperature=float("nan")), "a"),
            ErrorCode.INVALID_REQUEST,
            "temperature",
        ),
        (m.Kill(9, 12345), ErrorCode.NOT_FOUND, "rid"),
        (m.ModelsGet(9), ErrorCode.UNAVAILABLE, None),
    ],
)
def test_bad_input_gets_a_typed_error_and_disturbs_nobody(message: m.Message, code: ErrorCode, field: str | None):
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=10)
    world.send(GATEWAY, message)
    error = world.replies.pop()
    assert (error.req, error.code, error.field) == (9, code, field)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(10)


@pytest.mark.parametrize("role", ["gateway", "executor", "storage", "supervisor"])
def test_roles_may_only_send_what_is_theirs(role: str):
    world = make_world()
    sender = Sender(55, role, role)
    for message, allowed in [
        (m.SeqSubmit(1, "demo", pack_i32([1]), params(max_tokens=1), "a"), {"gateway"}),
        (m.ServiceDown("executor", "executor.x", 1), {"supervisor"}),
        (m.ModelsReply(1, ()), {"storage"}),
        (m.StepResult(1, 1, b"", (), b"", 0, 0), {"executor"}),
    ]:
        sent = world.kernel.handle(sender, message, 0.0)
        refused = any(isinstance(s.message, m.Error) and s.message.code == ErrorCode.PERMISSION for s in sent)
        assert refused == (role not in allowed)


def test_a_gateway_that_dies_takes_only_its_own_sequences():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=10)
    other = Sender(2, "gateway", "other")
    world.kernel.handle(other, m.SeqSubmit(1, "demo", pack_i32([9]), params(max_tokens=10), "bob"), 0.0)
    assert len(world.kernel.state.sequences) == 2
    world.kernel.peer_down(other.peer, 0.0)
    world.run()
    assert world.kernel.state.sequences == {}
    assert world.streams[rid].ids == world.streams[rid].expected(10)


def test_a_gateway_can_not_touch_another_gateways_sequence():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=10)
    other = Sender(2, "gateway", "other")
    for message in (m.SeqCancel(rid, FinishReason.CANCELLED), m.SeqFinish(rid, 0), m.SeqAck(rid, 5)):
        assert world.kernel.handle(other, message, 0.0) == []
    world.run()
    assert world.streams[rid].end.reason == FinishReason.LENGTH


def test_models_are_relayed_to_storage_and_back():
    world = make_world()
    storage = Sender(60, "storage", "storage")
    (told,) = world.kernel.greet(storage, world.now)
    assert told.message == m.ModelState("demo", "serving")
    (asked,) = world.kernel.handle(CONTROL, m.ModelsGet(41), 0.0)
    row = m.ModelRow("demo", "/x", "d", "llama", "serving", 1)
    (answer,) = world.kernel.handle(storage, m.ModelsReply(asked.message.req, (row,)), 0.0)
    assert (answer.peer, answer.message) == (CONTROL.peer, m.ModelsReply(41, (row,)))
    world.kernel.handle(CONTROL, m.ModelsGet(42), 0.0)
    (lost,) = world.kernel.handle(SUPERVISOR, m.ServiceDown("storage", "storage", 1), 0.0)
    assert (lost.message.req, lost.message.code) == (42, ErrorCode.UNAVAILABLE)


def test_queue_limit_refuses_as_overloaded():
    world = make_world(max_rows=1, max_waiting=2)
    for _ in range(3):
        world.submit([1, 2, 3], max_tokens=50)
    world.send(GATEWAY, m.SeqSubmit(9, "demo", pack_i32([1]), params(), "a"))
    refusal = world.replies.pop()
    assert (refusal.code, refusal.retry_after_ms) == (ErrorCode.OVERLOADED, 100.0)  # its steps take next to no time
    world.kernel.state.lanes["demo"].scheduler.residents.costs.step_s = 0.5
    world.send(GATEWAY, m.SeqSubmit(9, "demo", pack_i32([1]), params(), "a"))
    left = 50 - len(world.streams[1].ids)
    assert world.replies.pop().retry_after_ms == pytest.approx(500.0 * left)


def test_an_executor_that_is_replaced_loses_nothing():
    world = make_world(num_pages=32, page_size=4, max_rows=4)
    rids = [world.submit([index, 2, 3], max_tokens=20, seed=index) for index in range(6)]
    open_rid = world.spawn([7, 8, 9, 10, 11])
    for _ in range(8):
        world.step()
    before = {rid: list(world.streams[rid].ids) for rid in rids}
    world.executor = None
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True))
    late = world.submit([1, 2], max_tokens=3)  # accepted: it waits like the others
    world.ask(m.Kill(1, rids[0]))
    assert world.streams[rids[0]].end.reason == FinishReason.KILLED
    assert world.kernel.state.lanes["demo"].status().ready is False
    world.kernel.check()
    world.start_executor()
    world.run()
    for rid in (*rids[1:], late):
        assert world.streams[rid].ids == world.streams[rid].expected(len(world.streams[rid].ids))
        assert world.streams[rid].end.reason == FinishReason.LENGTH
    assert all(world.streams[rid].ids[: len(ids)] == ids for rid, ids in before.items())
    world.continue_(open_rid, max_tokens=4)
    world.run()
    assert world.streams[open_rid].ids == world.streams[open_rid].expected(4)
    assert world.kernel.state.lanes["demo"].status().tokens_committed == sum(
        len(stream.ids) for stream in world.streams.values()
    )


def test_given_up_after_all_ends_what_waited():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=20)
    world.step()
    world.executor = None
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True))
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1))
    assert world.streams[rid].end.reason == FinishReason.EXECUTOR_LOST
    world.send(GATEWAY, m.SeqSubmit(9, "demo", pack_i32([1]), params(), "a"))
    assert world.replies.pop().code == ErrorCode.UNAVAILABLE
