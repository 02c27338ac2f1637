"""What gateways ask again of a microkernel that may have done it before it died: it is not done twice."""

from __future__ import annotations

import pytest
from crash import Journaled
from kernel_world import GATEWAY, World, params

from llmos.codes import ErrorCode, FinishReason
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32

NEW = [7, 8, 9]


def make_world() -> tuple[World, Journaled, int]:
    """An open sequence of five tokens."""
    world = World()
    journaled = Journaled(world)
    world.start_executor()
    rid = world.spawn([1, 2, 3, 4, 5])
    world.run()
    return world, journaled, rid


def append(rid: int, expect: int | None) -> m.SeqAppend:
    return m.SeqAppend(77, rid, "demo", pack_i32(NEW), None, expect)


def go_on(rid: int, expect: int | None, **sampling: object) -> m.SeqContinue:
    return m.SeqContinue(77, rid, "demo", params(**sampling), None, None, expect)


def length(world: World, rid: int) -> int:
    return len(world.kernel.state.known(rid, None).tokens)


@pytest.mark.parametrize("was_done", [True, False])
def test_an_append_happens_once(was_done: bool) -> None:
    world, journaled, rid = make_world()
    if was_done:
        world.append(rid, NEW)
    journaled.crash()
    for _ in range(2):
        assert world.ask(append(rid, 5), GATEWAY) == m.SeqAppended(77, rid, 8)
    assert length(world, rid) == 8


def test_an_append_that_was_done_may_have_been_gone_on_from() -> None:
    world, _, rid = make_world()
    world.append(rid, NEW)
    world.continue_(rid, max_tokens=4)
    assert world.ask(append(rid, 5), GATEWAY) == m.SeqAppended(77, rid, 8)
    world.run()
    assert world.ask(append(rid, 5), GATEWAY) == m.SeqAppended(77, rid, 8)
    assert length(world, rid) == 12


@pytest.mark.parametrize("question", [append, go_on])
def test_what_was_not_done_is_refused_if_something_else_was(question) -> None:
    world, _, rid = make_world()
    world.append(rid, [9, 9])
    answer = world.ask(question(rid, 5), GATEWAY)
    assert isinstance(answer, m.Error)
    assert (answer.code, answer.field) == (ErrorCode.WRONG_STATE, "rid")
    assert answer.message == f"sequence {rid} has 7 tokens, not 5"
    assert length(world, rid) == 7


def test_without_an_expectation_the_same_is_done_again() -> None:
    world, _, rid = make_world()
    for count in (8, 11):
        assert world.ask(append(rid, None), GATEWAY) == m.SeqAppended(77, rid, count)


@pytest.mark.parametrize("progress", ["not done", "nothing yet", "some", "ended"])
def test_a_continue_happens_once(progress: str) -> None:
    world, journaled, rid = make_world()
    if progress != "not done":
        world.continue_(rid, max_tokens=6, seed=3)
        for _ in range({"nothing yet": 0, "some": 4, "ended": 100}[progress]):
            world.step()
    journaled.crash()
    known = world.kernel.state.known(rid, None)
    output, has_ended = list(known.tokens[5:]), progress == "ended"
    answer = world.ask(go_on(rid, 5, max_tokens=6, seed=3), GATEWAY)
    assert isinstance(answer, m.SeqAttached)
    assert (answer.prompt_tokens, list(unpack_i32(answer.output))) == (5, output)
    assert (answer.end is not None) == has_ended
    assert known.generating != has_ended
    world.run()
    assert length(world, rid) == 11
    again = world.ask(go_on(rid, 5, max_tokens=6, seed=3), GATEWAY)
    assert isinstance(again, m.SeqAttached)
    assert len(unpack_i32(again.output)) == 6


def test_who_attached_to_an_output_that_is_over_may_still_cut_it() -> None:
    """The microkernel that knew who read it is gone, and its end had come before the stop string was found."""
    world, journaled, rid = make_world()
    world.continue_(rid, max_tokens=6, seed=3)
    world.run()
    journaled.crash()
    world.send(GATEWAY, m.SeqFinish(rid, 2))
    assert length(world, rid) == 11
    world.ask(m.SeqAttach(78, rid), GATEWAY)
    world.send(GATEWAY, m.SeqFinish(rid, 2))
    assert length(world, rid) == 7
    answer = world.ask(m.SeqAttach(79, rid), GATEWAY)
    assert isinstance(answer, m.SeqAttached)
    assert answer.end is not None
    assert (answer.end.reason, answer.end.usage.output_tokens) == (FinishReason.STOP, 2)
