"""Several clients that want the same sequence: who reads it, and what the one says that leaves."""

from __future__ import annotations

import pytest
from router_world import World

from llmos.codes import ErrorCode, FinishReason
from llmos.protocol import messages as m


def test_a_reader_is_replaced_from_another_gateway() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.from_kernel(m.SeqReplaced(500))
    assert world.listener.sent[b"a"][-1] == m.Error(1, ErrorCode.WRONG_STATE, "another reader took over", "rid", 500)
    assert isinstance(world.text[-1], m.DecodeClose)
    assert len(world.router) == 0
    assert not any(isinstance(message, (m.SeqCancel, m.SeqDetach)) for message in world.kernel)
    world.leave(b"a")
    assert not any(isinstance(message, (m.SeqCancel, m.SeqDetach)) for message in world.kernel)
    world.from_kernel(m.SeqReplaced(500))


def test_a_reader_is_replaced_by_another_client_here() -> None:
    """The microkernel does not tell: for it the reader is this gateway as before."""
    world = World()
    world.stream(b"a", 1, 500)
    number = world.attach(b"b", 9)
    world.step((500, 0, (65,)))
    world.attached(number, 65)
    assert world.errors(b"a") == [(1, ErrorCode.WRONG_STATE)]
    world.step((500, 1, (66,)))
    assert world.text[-1] == m.DecodeStep((m.DecodeItem(number, (66,), False),))
    world.leave(b"a")
    assert not any(isinstance(message, (m.SeqCancel, m.SeqDetach)) for message in world.kernel)
    assert len(world.router) == 1


@pytest.mark.parametrize("is_owner", [True, False])
def test_who_leaves_while_another_attaches_takes_nothing_away(is_owner: bool) -> None:
    world = World()
    if is_owner:
        world.stream(b"a", 1, 500)
    else:
        world.attached(world.attach(b"a", 1))
    number = world.attach(b"b", 9)
    world.leave(b"a")  # before the microkernel has answered the other one
    asked = len(world.kernel)
    world.step((500, 0, (65,)))
    world.attached(number, 65)
    assert len(world.kernel) == asked
    world.step((500, 1, (66,)))
    assert world.text[-1] == m.DecodeStep((m.DecodeItem(number, (66,), False),))


@pytest.mark.parametrize("is_owner", [True, False])
def test_who_leaves_while_another_is_refused_is_not_forgotten(is_owner: bool) -> None:
    world = World()
    if is_owner:
        world.stream(b"a", 1, 500)
    else:
        world.attached(world.attach(b"a", 1))
    number = world.attach(b"b", 9)
    world.leave(b"a")
    asked = len(world.kernel)
    world.from_kernel(m.Error(number, ErrorCode.NOT_FOUND, "no sequence 500", "rid", 500))
    left = m.SeqCancel(500, FinishReason.CANCELLED) if is_owner else m.SeqDetach(500)
    assert world.kernel[asked:] == [left]
    assert len(world.router) == 0


def test_a_stranger_who_asks_and_leaves_disturbs_no_reader() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    number = world.attach(b"b", 9, uid=987_654)
    world.leave(b"b")
    asked = len(world.kernel)
    world.from_kernel(m.Error(number, ErrorCode.NOT_FOUND, "no sequence 500", "rid", 500))
    assert world.kernel[asked:] == []
    world.step((500, 0, (65,)))
    assert isinstance(world.text[-1], m.DecodeStep)


def test_two_ask_and_the_first_leaves() -> None:
    world = World()
    first, second = world.attach(b"a", 1), world.attach(b"b", 9)
    world.leave(b"a")
    asked = len(world.kernel)
    world.attached(first, 65)
    world.attached(second, 65)
    assert world.kernel[asked:] == []
    world.step((500, 1, (66,)))
    assert world.text[-1] == m.DecodeStep((m.DecodeItem(second, (66,), False),))


def test_a_request_that_is_asked_again_takes_over() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.generate(b"b", 9, client_request_id="k")
    submit = world.kernel[-1]
    assert isinstance(submit, m.SeqSubmit)
    world.from_kernel(m.SeqAccepted(submit.req, 500, existing=True))
    assert world.kernel[-1] == m.SeqAttach(submit.req, 500, "root")
    world.leave(b"a")  # says nothing: the other one is asking
    world.attached(submit.req, 65)
    assert world.kernel[-1] == m.SeqAttach(submit.req, 500, "root")
    world.step((500, 1, (66,)))
    assert world.text[-1] == m.DecodeStep((m.DecodeItem(submit.req, (66,), False),))
    world.leave(b"b")
    assert world.kernel[-1] == m.SeqDetach(500)  # it can be collected later


def test_a_request_that_is_asked_again_may_be_too_late() -> None:
    world = World()
    world.generate(b"b", 9, client_request_id="k")
    submit = world.kernel[-1]
    assert isinstance(submit, m.SeqSubmit)
    world.from_kernel(m.SeqAccepted(submit.req, 500, existing=True))
    world.from_kernel(m.Error(submit.req, ErrorCode.NOT_FOUND, "no sequence 500", "rid", 500))
    assert world.errors(b"b") == [(9, ErrorCode.NOT_FOUND)]
    assert len(world.router) == 0
