"""Open sequences: spawn, append, turns, attach, wait, close, idleness, records of ended ones."""

from __future__ import annotations

import pytest
from kernel_world import CONTROL, GATEWAY, SUPERVISOR, World, params

from llmos.codes import ErrorCode, FinishReason, PageFate, SeqState
from llmos.microkernel.sender import Sender
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32

OTHER = Sender(9, "gateway", "gateway-2")


def make_world(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def sequence(world: World, rid: int):
    return world.kernel.state.sequences[rid]


def code_of(answer: m.Message) -> tuple[int, str | None]:
    assert isinstance(answer, m.Error), answer
    return answer.code, answer.field


# ------------------------------------------------------------ turns


def test_a_conversation_keeps_its_pages_and_computes_only_what_is_new():
    world = make_world(page_size=4, num_pages=64)
    rid = world.spawn(list(range(10)))
    world.run()
    assert (sequence(world, rid).state, world.executor.computed_tokens) == (SeqState.BLOCKED, 9)
    world.continue_(rid, max_tokens=6, seed=3)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(6)
    assert world.executor.computed_tokens == 9 + 6
    world.append(rid, [7, 8, 9])
    world.run()
    assert world.executor.computed_tokens == 15 + 3
    world.continue_(rid, max_tokens=2, seed=4)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(2)
    assert world.executor.computed_tokens == 18 + 2
    usage = world.streams[rid].end.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) == (19, 18, 2)


def test_an_empty_open_sequence_gets_its_tokens_by_append():
    world = make_world()
    rid = world.spawn([])
    assert sequence(world, rid).state is SeqState.BLOCKED
    answer = world.ask(m.SeqContinue(1, rid, "demo", params()), GATEWAY)
    assert code_of(answer) == (ErrorCode.WRONG_STATE, "rid")
    world.append(rid, [5])
    assert sequence(world, rid).state is SeqState.BLOCKED  # one token needs no prefill
    world.continue_(rid, max_tokens=3)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(3)


def test_input_that_the_prefix_cache_has_needs_no_row():
    world = make_world(page_size=4, num_pages=64)
    first = world.spawn(list(range(9)))
    world.run()
    second = world.spawn(list(range(9)))
    assert sequence(world, second).state is SeqState.BLOCKED
    assert list(sequence(world, second).page_table) == list(sequence(world, first).page_table)[:2]
    world.run()
    assert world.executor.computed_tokens == 8
    world.continue_(second, max_tokens=3)
    world.run()
    assert world.streams[second].ids == world.streams[second].expected(3)


@pytest.mark.parametrize("shared", [False, True])
def test_a_common_prefix_of_2000_tokens_is_computed_once(shared: bool):
    """For a tenant, and for all of them where sharing is configured."""
    world = make_world(num_pages=600, page_size=16, max_step_tokens=2048, max_context=8000, share_prefixes=shared)
    world.executor._read = lambda row, upto: b""  # contents are checked elsewhere; reading is quadratic here
    world.submit([1] * 2000 + [2, 3, 4], max_tokens=1)
    world.run()
    before = world.executor.computed_tokens
    world.submit([1] * 2000 + [5, 6], max_tokens=1)
    world.run()
    assert world.executor.computed_tokens - before == 2
    world.submit([1] * 2000 + [7, 8], max_tokens=1, owner="bob")
    world.run()
    assert world.executor.computed_tokens - before == 2 + (2 if shared else 2002)


def test_cancel_ends_the_turn_and_late_tokens_do_not_count():
    world = make_world(steps_in_flight=3)
    rid = world.spawn([1, 2, 3])
    world.run()
    world.continue_(rid, max_tokens=50)
    for _ in range(5):
        world.step()
    got = len(world.streams[rid].ids)
    world.send(GATEWAY, m.SeqCancel(rid, FinishReason.CANCELLED))
    end = world.streams[rid].end
    assert (end.reason, end.usage.output_tokens) == (FinishReason.CANCELLED, got)
    world.run()
    assert (sequence(world, rid).state, sequence(world, rid).num_output) == (SeqState.BLOCKED, got)
    world.continue_(rid, max_tokens=4, seed=5)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(4)


def test_a_turn_that_begins_while_old_tokens_are_on_their_way_waits_for_them():
    world = make_world(steps_in_flight=4)
    rid = world.spawn([1, 2, 3])
    world.run()
    world.continue_(rid, max_tokens=50)
    for _ in range(3):
        world.step()
    assert len(world.executor.inbox) == 4
    world.send(GATEWAY, m.SeqCancel(rid, FinishReason.CANCELLED))
    world.continue_(rid, max_tokens=4, seed=5)
    assert sequence(world, rid).state is SeqState.WAITING
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(4)


def test_append_while_it_prefills_and_while_it_generates():
    world = make_world(max_step_tokens=4, num_pages=64, page_size=4)
    rid = world.spawn(list(range(30)))
    world.step()
    assert sequence(world, rid).state is SeqState.RUNNING
    world.append(rid, [1, 2, 3])
    world.continue_(rid, max_tokens=5)
    answer = world.ask(m.SeqAppend(1, rid, "demo", pack_i32([1])), GATEWAY)
    assert code_of(answer) == (ErrorCode.WRONG_STATE, "rid")
    assert code_of(world.ask(m.SeqContinue(2, rid, "demo", params()), GATEWAY)) == (ErrorCode.WRONG_STATE, "rid")
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(5)
    assert world.executor.computed_tokens == 33 + 4  # nothing twice


def test_numbers_that_went_bad_end_the_turn_and_the_pages_are_computed_again():
    world = make_world(prefix_cache=False)
    rid = world.spawn([1, 2, 3, 4, 5])
    world.run()
    world.executor.fail_rows[rid] = FinishReason.NUMERICAL_ERROR
    world.continue_(rid, max_tokens=5)
    world.run()
    assert world.streams[rid].end.reason == FinishReason.NUMERICAL_ERROR
    assert (sequence(world, rid).state, sequence(world, rid).kept_tokens) == (SeqState.BLOCKED, 0)
    world.continue_(rid, max_tokens=5)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(5)


def test_what_rests_gives_its_pages_to_who_needs_them_and_computes_them_again():
    world = make_world(num_pages=6, page_size=4, prefix_cache=False)
    rid = world.spawn(list(range(12)))
    world.run()
    other = world.submit(list(range(100, 112)), max_tokens=10)
    world.run()
    assert len(world.streams[other].ids) == 10
    assert list(sequence(world, rid).page_table) == []
    assert world.kernel.state.lanes["demo"].status().preemptions == 0
    world.continue_(rid, max_tokens=3)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(3)


@pytest.mark.parametrize("fate", list(PageFate))
def test_suspended_in_a_turn_and_at_rest(fate: PageFate):
    world = make_world(host_pages=20)
    rid = world.spawn([1, 2, 3, 4, 5])
    world.run()
    world.ask(m.Suspend(1, rid, fate))
    world.continue_(rid, max_tokens=10)
    world.run()
    assert world.streams[rid].ids == []
    world.ask(m.Resume(2, rid))
    for _ in range(4):
        world.step()
    world.ask(m.Suspend(3, rid, fate))
    world.run()
    world.ask(m.Resume(4, rid))
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(10)
    assert sequence(world, rid).state is SeqState.BLOCKED


# ------------------------------------------------------------ readers


def test_attach_gives_the_output_so_far_and_the_rest_to_the_new_reader():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=12)
    for _ in range(6):
        world.step()
    got = len(world.streams[rid].ids)
    sends = world.kernel.handle(OTHER, m.SeqAttach(5, rid), world.now)
    assert [(send.peer, type(send.message)) for send in sends] == [(1, m.SeqReplaced), (9, m.SeqAttached)]
    assert list(unpack_i32(sends[1].message.output)) == world.streams[rid].ids
    world.run()  # OTHER is no gateway of this world: World gets all tokens, as long as they come once and in order
    assert world.streams[rid].ids == world.streams[rid].expected(12)
    assert got < 12


def test_what_nobody_reads_runs_on_and_what_is_read_waits_for_its_reader():
    world = make_world(window=6)
    rid, watched = world.spawn([1, 2, 3]), world.spawn([4, 5, 6])
    world.run()
    world.continue_(rid, max_tokens=20)
    world.continue_(watched, max_tokens=20)
    world.send(GATEWAY, m.SeqDetach(rid))
    world.run()
    assert (world.streams[rid].ids, sequence(world, rid).num_output) == ([], 20)
    assert len(world.streams[watched].ids) == 6
    world.attach(rid)
    for _ in range(10):
        world.send(GATEWAY, m.SeqAck(watched, len(world.streams[watched].ids)))
        world.run()
    for each in (rid, watched):
        assert world.streams[each].ids == world.streams[each].expected(20)


@pytest.mark.parametrize("scarce", ["rows", "pages"])
def test_a_reader_that_does_not_read_holds_up_nobody_else(scarce: str):
    rows, pages = (1, 64) if scarce == "rows" else (4, 6)
    world = make_world(max_rows=rows, num_pages=pages, page_size=4, window=6)
    slow = world.submit([1, 2, 3], max_tokens=14, seed=1)
    world.run()
    assert len(world.streams[slow].ids) == 6
    other = world.submit([4, 5, 6], max_tokens=16, seed=2)
    for _ in range(4):
        world.run()
        world.send(GATEWAY, m.SeqAck(other, len(world.streams[other].ids)))
    assert world.streams[other].ids == world.streams[other].expected(16)
    assert sequence(world, slow).state is SeqState.BLOCKED
    explained = world.ask(m.Explain(1, slow))
    assert explained.client_ms > 0
    assert explained.blocked_ms == 0
    for _ in range(4):
        world.send(GATEWAY, m.SeqAck(slow, len(world.streams[slow].ids)))
        world.run()
    assert world.streams[slow].ids == world.streams[slow].expected(14)


def test_a_stop_string_that_is_found_after_the_end_still_cuts():
    world = make_world(page_size=4)
    rid = world.spawn([1, 2, 3])
    world.run()
    world.continue_(rid, max_tokens=12)
    world.run()
    world.send(OTHER, m.SeqFinish(rid, 1))  # not its reader
    assert sequence(world, rid).num_output == 12
    world.send(GATEWAY, m.SeqFinish(rid, 5))
    del world.streams[rid].ids[5:]
    assert list(sequence(world, rid).tokens) == [1, 2, 3, *world.streams[rid].ids]
    assert world.ask(m.Stat(1, rid)).usage.output_tokens == 5
    world.kernel.check()
    world.append(rid, [9])
    world.send(GATEWAY, m.SeqFinish(rid, 0))  # too late: there is new input
    world.continue_(rid, max_tokens=4, seed=3)
    world.run()
    assert world.streams[rid].ids == world.streams[rid].expected(4)


def test_a_lost_gateway_ends_what_only_it_read_and_not_what_is_open():
    world = make_world()
    one_shot = world.submit([1, 2, 3], max_tokens=30)
    rid = world.spawn([4, 5, 6])
    for _ in range(6):
        world.step()
    world.continue_(rid, max_tokens=3)
    world._deliver(world.kernel.peer_down(GATEWAY.peer, world.now))
    world._deliver(world.kernel.tick(world.now))
    world.run()
    assert one_shot not in world.kernel.state.sequences
    assert sequence(world, rid).num_output == 3
    world.attach(rid)
    assert world.streams[rid].ids == world.streams[rid].expected(3)


def test_only_the_reader_may_cancel_finish_and_acknowledge():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=6)
    for late in (m.SeqCancel(rid, FinishReason.CANCELLED), m.SeqFinish(rid, 0), m.SeqAck(rid, 1), m.SeqDetach(rid)):
        assert world.kernel.handle(OTHER, late, world.now) == []
    world.run()
    assert len(world.streams[rid].ids) == 6


# ------------------------------------------------------------ the end, and after it


def test_wait_is_answered_at_the_end_and_at_once_afterwards():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=4)
    world.send(CONTROL, m.Wait(7, rid))
    assert world.replies == []
    world.run()
    usage = world.streams[rid].end.usage
    assert world.replies.pop() == m.Waited(7, rid, FinishReason.LENGTH, usage)
    assert world.ask(m.Wait(8, rid)) == m.Waited(8, rid, FinishReason.LENGTH, usage)


def test_an_ended_sequence_can_be_read_for_the_retention_time():
    world = make_world(retention_s=5.0)
    rid = world.submit([1, 2, 3], max_tokens=4)
    world.run()
    answer = world.ask(m.SeqAttach(1, rid), GATEWAY)
    assert (list(unpack_i32(answer.output)), answer.end) == (world.streams[rid].ids, world.streams[rid].end)
    stats = world.ask(m.Stat(2, rid))
    assert (stats.reason, stats.num_tokens, stats.row.pages) == (FinishReason.LENGTH, 7, 0)
    explained = world.ask(m.Explain(3, rid))
    assert explained.age_ms == pytest.approx(world.streams[rid].end.usage.total_ms)
    assert code_of(world.ask(m.Kill(4, rid))) == (ErrorCode.WRONG_STATE, "rid")
    assert code_of(world.ask(m.Nice(5, rid, 1))) == (ErrorCode.WRONG_STATE, "rid")
    world.now += 5.1
    world._deliver(world.kernel.tick(world.now))
    assert code_of(world.ask(m.Stat(6, rid))) == (ErrorCode.NOT_FOUND, "rid")
    assert len(world.kernel.state.ended) == 0


def test_close_and_idleness_end_an_open_sequence_and_a_busy_one_is_not_idle():
    world = make_world(idle_timeout_s=10.0)
    closed, idle = world.spawn([1, 2, 3]), world.spawn([4, 5, 6])
    busy = world.spawn([7, 8, 9])
    world.run()
    assert world.ask(m.Close(1, closed)) == m.Done(1, closed)
    assert world.ask(m.Wait(2, closed)).reason == FinishReason.CLOSED
    world.now += 9.0
    world.continue_(busy, max_tokens=3)
    world.now += 2.0
    world._deliver(world.kernel.tick(world.now))
    assert world.ask(m.Wait(3, idle)).reason == FinishReason.IDLE
    world.run()
    assert sequence(world, busy).state is SeqState.BLOCKED
    assert code_of(world.ask(m.Close(4, world.submit([1], max_tokens=1)))) == (ErrorCode.WRONG_STATE, "rid")


def test_what_was_read_of_one_output_does_not_count_for_the_next():
    world = make_world(window=4)
    rid = world.spawn([1, 2, 3])
    world.run()
    world.continue_(rid, max_tokens=12)
    while world.streams[rid].end is None:
        world.run()
        world.send(GATEWAY, m.SeqAck(rid, len(world.streams[rid].ids)))
    world.continue_(rid, max_tokens=12)
    world.run()
    assert len(world.streams[rid].ids) == 4


def test_who_waits_for_others_is_not_idle():
    world = make_world(idle_timeout_s=10.0)
    first = world.submit([1], max_tokens=50)
    held = world.spawn([2, 3], after=(first,))
    world.now += 11.0
    world.step()
    assert sequence(world, held).held_back
    world.run()
    assert sequence(world, held).state is SeqState.BLOCKED
    world.now += 11.0
    world._deliver(world.kernel.tick(world.now))
    assert world.ask(m.Wait(3, held)).reason == FinishReason.IDLE


def test_kill_by_selector():
    world = make_world(max_rows=2)
    mine = [world.submit([index], max_tokens=50) for index in range(3)]
    his = world.submit([9], max_tokens=50, owner="bob")
    child = world.submit([8], max_tokens=50, parent=mine[0])
    assert world.ask(m.Kill(1, None, None, job=child)).rids == (mine[0], child)
    assert world.ask(m.Kill(2, None, "bob", tenant="alice")).rids == ()
    assert world.ask(m.Kill(3, None, "bob", model="demo")).rids == (his,)
    assert world.ask(m.Kill(4, None, None, tenant="alice", model="demo")).rids == (mine[1], mine[2])
    assert code_of(world.ask(m.Kill(5, None))) == (ErrorCode.INVALID_REQUEST, "rid")
    assert code_of(world.ask(m.Kill(6, mine[0], job=mine[0]))) == (ErrorCode.INVALID_REQUEST, "rid")
    assert code_of(world.ask(m.Kill(7, None, "bob", job=mine[0]))) == (ErrorCode.NOT_FOUND, "job")
    world.run()
    assert all(world.streams[rid].end.reason == FinishReason.KILLED for rid in (*mine, his, child))


def test_what_can_not_be_is_refused():
    world = make_world(num_pages=8, page_size=4)
    rid = world.spawn(list(range(20)))
    one_shot = world.submit([1], max_tokens=30)
    cases = [
        (m.SeqSpawn(1, "nope", b"", "alice"), ErrorCode.NOT_FOUND, "model"),
        (m.SeqSpawn(2, "demo", pack_i32([5000]), "alice"), ErrorCode.INVALID_REQUEST, "prompt"),
        (m.SeqSpawn(3, "demo", pack_i32([1] * 33), "alice"), ErrorCode.CONTEXT_TOO_LONG, "prompt"),
        (m.SeqSpawn(4, "demo", b"", "alice", 20), ErrorCode.INVALID_REQUEST, "nice"),
        (m.SeqSpawn(5, "demo", b"", "alice", 0, 99), ErrorCode.NOT_FOUND, "parent"),
        (m.SeqSpawn(6, "demo", b"", "bob", 0, rid), ErrorCode.NOT_FOUND, "parent"),
        (m.SeqSpawn(7, "demo", b"", "alice", 0, None, (99,)), ErrorCode.NOT_FOUND, "after"),
        (m.SeqAppend(8, rid, "demo", b""), ErrorCode.INVALID_REQUEST, "tokens"),
        (m.SeqAppend(9, rid, "demo", pack_i32([-1])), ErrorCode.INVALID_REQUEST, "tokens"),
        (m.SeqAppend(10, rid, "demo", pack_i32([1] * 13)), ErrorCode.CONTEXT_TOO_LONG, "tokens"),
        (m.SeqAppend(11, rid, "other", pack_i32([1])), ErrorCode.INVALID_REQUEST, "model"),
        (m.SeqAppend(12, rid, "demo", pack_i32([1]), "bob"), ErrorCode.NOT_FOUND, "rid"),
        (m.SeqAppend(13, one_shot, "demo", pack_i32([1])), ErrorCode.WRONG_STATE, "rid"),
        (m.SeqContinue(14, one_shot, "demo", params()), ErrorCode.WRONG_STATE, "rid"),
        (m.SeqContinue(15, rid, "demo", params(), -1.0), ErrorCode.INVALID_REQUEST, "deadline_ms"),
        (m.SeqContinue(16, rid, "demo", params(), None, "bob"), ErrorCode.NOT_FOUND, "rid"),
        (m.SeqAttach(17, rid), ErrorCode.WRONG_STATE, "rid"),
        (m.SeqAttach(18, 99), ErrorCode.NOT_FOUND, "rid"),
        (m.SeqAttach(19, one_shot, "bob"), ErrorCode.NOT_FOUND, "rid"),
    ]
    for message, code, field in cases:
        assert code_of(world.ask(message, GATEWAY)) == (code, field), message
    for message, code, field in (
        (m.Suspend(20, rid, 3), ErrorCode.INVALID_REQUEST, "pages"),
        (m.Deadline(21, rid, 5.0), ErrorCode.WRONG_STATE, "rid"),
        (m.Deadline(22, one_shot, -5.0), ErrorCode.INVALID_REQUEST, "deadline_ms"),
        (m.Wait(23, one_shot, "bob"), ErrorCode.NOT_FOUND, "rid"),
        (m.Stat(24, one_shot, "bob"), ErrorCode.NOT_FOUND, "rid"),
        (m.Close(25, rid, "bob"), ErrorCode.NOT_FOUND, "rid"),
    ):
        assert code_of(world.ask(message)) == (code, field), message
    answer = world.ask(m.SeqAttach(26, one_shot), SUPERVISOR)
    assert code_of(answer)[0] == ErrorCode.PERMISSION
    world.run()
    assert world.streams[one_shot].ids == world.streams[one_shot].expected(30)


def test_a_sequence_that_fills_its_context_says_so():
    world = make_world(num_pages=4, page_size=4)
    rid = world.spawn(list(range(16)))
    world.run()
    answer = world.ask(m.SeqContinue(1, rid, "demo", params()), GATEWAY)
    assert code_of(answer) == (ErrorCode.CONTEXT_TOO_LONG, "rid")
