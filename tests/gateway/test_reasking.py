"""A microkernel that comes back is asked by turns; as part of a router: `test_many_streams_ask_in_turns`."""

from __future__ import annotations

import pytest
from router_world import World

from llmos.codes import ErrorCode
from llmos.protocol import messages as m
from llmos.services.gateway.reasking import AT_ONCE, Reasking

COUNT = 3 * AT_ONCE
LAST = 1000 + COUNT - 1  # the last sequence of `many_streams`


def turns(line: Reasking) -> list[int]:
    found = []
    while (number := line.next()) is not None:
        found.append(number)
    return found


def test_so_many_at_once_and_the_next_for_each_answer() -> None:
    line = Reasking()
    line.begin(range(COUNT))
    assert turns(line) == list(range(AT_ONCE))
    line.answered(5)
    line.answered(5)
    line.answered(COUNT - 1)  # it has not been asked for
    assert turns(line) == [AT_ONCE]


def test_who_comes_meanwhile_lines_up_once_and_nobody_waits_when_all_were_asked() -> None:
    line = Reasking()
    assert not line.holds_up(7)
    line.begin(range(AT_ONCE + 1))
    turns(line)
    assert line.holds_up(COUNT)
    assert not line.holds_up(0)  # it may ask more before it is answered
    line.join(COUNT)
    line.join(COUNT)
    for number in range(AT_ONCE):
        line.answered(number)
    assert turns(line) == [AT_ONCE, COUNT]
    assert not line.holds_up(COUNT + 1)


def test_nobody_is_asked_any_more_when_it_is_gone() -> None:
    line = Reasking()
    line.begin(range(COUNT))
    turns(line)
    line.stop()
    assert turns(line) == []
    assert not line.holds_up(1)


def many_streams() -> World:
    """The last of them has output."""
    world = World(max_in_flight=COUNT + 1)
    for place in range(COUNT):
        world.stream(b"a", place + 1, 1000 + place)
    world.step((LAST, 0, (65,)))
    world.lose_kernel()
    return world


def attaches(world: World) -> list[m.SeqAttach]:
    return [message for message in world.kernel if isinstance(message, m.SeqAttach)]


def answer_all(world: World) -> list[int]:
    """Answer each question in its order, until there is none; returns whose turn it was."""
    seen = 0
    while seen < len(asked := attaches(world)):
        rid = asked[seen].rid
        world.attached(asked[seen].req, *([65] if rid == LAST else []), rid=rid)
        seen += 1
    return [message.rid for message in asked]


def test_many_streams_ask_in_turns() -> None:
    world = many_streams()
    asked = world.bring_kernel()
    assert [type(message) for message in asked] == [m.SeqAttach] * AT_ONCE
    assert [message.rid for message in attaches(world)[:3]] == [LAST, 1000, 1001]
    world.attached(asked[1].req, rid=1000)
    assert len(attaches(world)) == AT_ONCE + 1
    world = many_streams()
    world.bring_kernel()
    assert answer_all(world) == [LAST, *range(1000, LAST)]


def test_a_new_request_waits_behind_those_that_were_there() -> None:
    """Else the older one, which asks later, would take the sequence back."""
    world = many_streams()
    world.bring_kernel()
    world.client(b"b", m.Attach(1, LAST - 1))
    assert LAST - 1 not in [message.rid for message in attaches(world)]
    assert answer_all(world)[-1] == LAST - 1
    assert world.errors(b"a") == [(COUNT - 1, ErrorCode.WRONG_STATE)]
    assert world.errors(b"b") == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_microkernel_that_dies_again_is_asked_from_the_start(times: int) -> None:
    world = many_streams()
    for _ in range(times):
        world.bring_kernel()
        world.lose_kernel()
    asked = world.bring_kernel()
    assert len(asked) == AT_ONCE
    assert attaches(world)[-AT_ONCE].rid == LAST
