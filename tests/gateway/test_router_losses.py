"""A router whose tokenizer and microkernel die and come back: who asks what again, in which order, and for how long. As a property:
test_faults.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from gateway_world import usage
from router_world import World

from llmos.codes import ErrorCode, FinishReason
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway import router as router_module
from llmos.services.gateway.router import ANSWER_TIMEOUT_S, MAX_STRIKES, PATIENCE_S

TEXT: dict[str, Any] = {"text": "x", "token_ids": None}
CANCEL = m.SeqCancel(500, FinishReason.CANCELLED)


def kinds(messages: list[m.Message]) -> list[type[m.Message]]:
    return [type(message) for message in messages]


def decoded(world: World, stream: int, text: str, used: int) -> None:
    world.from_text(m.Decoded((m.DecodedItem(stream, text, used),)))


# ---------------------------------------------------------------- the microkernel


def test_a_stream_goes_on_with_what_it_missed() -> None:
    world = World()
    world.stream(rid=500)
    world.step((500, 0, (65,)))
    decoded(world, 1, "A", 1)
    world.client(b"a", m.Ack(1, 1))
    world.lose_kernel()
    assert world.bring_kernel() == [m.SeqAttach(1, 500, "root")]
    before = len(world.text)
    world.attached(1, 65, 66, 67)
    assert world.text[before:] == [m.DecodeStep((m.DecodeItem(1, (66, 67), False),))]
    assert world.kernel[-1] == m.SeqAck(500, 1)
    decoded(world, 1, "BC", 2)
    world.step((500, 3, (68,)), ends=(m.SeqEnd(500, FinishReason.LENGTH, usage(2, 4)),))
    decoded(world, 1, "D", 1)
    world.from_text(m.Decoded((m.DecodedItem(1, "", 0, None, True),)))
    assert world.listener.sent[b"a"] == [
        m.Accepted(1, 500, "echo", 2),
        m.Tokens(1, 0, (65,), "A"),
        m.Tokens(1, 1, (66, 67), "BC"),
        m.Tokens(1, 3, (68,), "D"),
        m.Finished(1, 500, FinishReason.LENGTH, "", usage(2, 4)),
    ]
    assert len(world.router) == 0


def test_text_and_acknowledgements_go_on_while_the_microkernel_is_away() -> None:
    world = World()
    world.stream(rid=500)
    world.step((500, 0, (65, 66)))
    world.lose_kernel()
    asked = len(world.kernel)
    decoded(world, 1, "AB", 2)
    assert world.listener.sent[b"a"][-1] == m.Tokens(1, 0, (65, 66), "AB")
    world.client(b"a", m.Ack(1, 2))
    world.client(b"a", m.Cancel(1))
    assert len(world.kernel) == asked
    world.bring_kernel()
    world.attached(1, 65, 66)
    assert world.kernel[asked + 1 :] == [m.SeqAck(500, 2), CANCEL]


def test_those_that_were_reading_ask_before_those_that_want_to() -> None:
    """So that whoever came last is the reader, as it would have been."""
    world = World()
    world.generate(b"b", 9, client_request_id="k")  # number 1
    world.stream(b"a", 1, 500)  # number 2
    world.from_kernel(m.SeqAccepted(1, 500, existing=True))
    world.generate(b"c", 7)  # number 3
    world.lose_kernel()
    asked: list[Any] = world.bring_kernel()
    assert [(type(message), message.req) for message in asked] == [(m.SeqAttach, 2), (m.SeqAttach, 1), (m.SeqSubmit, 3)]
    world.attached(2, 65)
    world.attached(1, 65)
    assert world.errors(b"a") == [(1, ErrorCode.WRONG_STATE)]
    assert world.errors(b"b") == []


def test_what_was_kept_for_the_old_microkernel_is_void() -> None:
    """Nobody reads at the new one: whoever asks now is the only one."""
    world = World()
    world.stream(b"a", 1, 500)
    number = world.attach(b"b", 9)
    world.leave(b"a")  # SeqCancel is kept, because the other one asks
    world.lose_kernel()
    world.bring_kernel()
    asked = len(world.kernel)
    world.from_kernel(m.Error(number, ErrorCode.WRONG_STATE, "sequence 500 has no output yet", "rid", 500))
    assert world.kernel[asked:] == []


def test_a_sequence_that_is_not_there_any_more_is_named() -> None:
    world = World()
    world.stream(rid=500)
    world.lose_kernel()
    world.bring_kernel()
    world.from_kernel(m.Error(1, ErrorCode.NOT_FOUND, "no sequence 500", "rid", 500))
    error = world.listener.sent[b"a"][-1]
    assert error == m.Error(1, ErrorCode.UNAVAILABLE, "sequence 500 was lost with the microkernel", None, 500)
    assert isinstance(world.text[-1], m.DecodeClose)
    assert len(world.router) == 0


def test_output_that_has_changed_is_not_joined() -> None:
    world = World()
    world.stream(rid=500)
    world.step((500, 0, (65, 66)))
    world.lose_kernel()
    world.bring_kernel()
    world.attached(1, 65, 67, 68)
    error = world.listener.sent[b"a"][-1]
    assert isinstance(error, m.Error)
    assert (error.code, "not what they were before" in error.message) == (ErrorCode.PROTOCOL, True)
    assert world.kernel[-1] == CANCEL


def test_questions_wait_in_their_order_and_under_their_names() -> None:
    world = World()
    world.lose_kernel()
    world.generate(b"a", 1)
    world.client(b"a", m.Spawn(2, None, client_request_id="mine"))
    world.generate(b"a", 3, **TEXT)
    world.client(b"a", m.Append(4, 500, "echo", None, pack_i32([65])))
    world.from_text(m.Encoded(3, pack_i32([66])))
    assert (world.kernel, world.errors()) == ([], [])
    asked: list[Any] = world.bring_kernel()
    expected = [(m.SeqSubmit, 1), (m.SeqSpawn, 2), (m.SeqSubmit, 3), (m.Stat, 4)]
    assert [(type(message), message.req) for message in asked] == expected
    assert [message.client_request_id for message in asked[:3]] == ["gw-1", "mine", "gw-3"]
    world.lose_kernel()
    assert world.bring_kernel() == asked


def test_a_deadline_counts_while_nobody_is_there_to_be_asked() -> None:
    world = World()
    world.lose_kernel()
    world.client(b"a", m.Generate(1, None, None, pack_i32([65]), None, SamplingParams(), deadline_ms=3000.0), now=1.0)
    world.client(b"a", m.Continue(2, 500, "echo", SamplingParams(), 3000.0), now=1.0)
    world.now = 2.0
    submit, stat = world.bring_kernel()
    assert isinstance(submit, m.SeqSubmit)
    assert (submit.deadline_ms, type(stat)) == (2000.0, m.Stat)
    world.now = 3.5
    world.measured(2)
    assert isinstance(world.kernel[-1], m.SeqContinue)
    assert world.kernel[-1].deadline_ms == 500.0


def test_a_question_waits_for_a_limited_time() -> None:
    world = World()
    world.lose_kernel()
    world.generate(b"a", 1)
    world.router.tick(ANSWER_TIMEOUT_S - 0.1)
    assert world.errors() == []
    world.router.tick(ANSWER_TIMEOUT_S)
    assert world.listener.sent[b"a"] == [m.Error(1, ErrorCode.UNAVAILABLE, "the microkernel is not running")]
    assert len(world.router) == 0
    assert world.bring_kernel() == []


def test_losses_do_not_keep_a_question_for_ever() -> None:
    world = World()
    world.generate(b"a", 1)
    for now in range(1, int(ANSWER_TIMEOUT_S), 5):
        world.now = now
        world.lose_kernel()
        world.router.tick(now)
        assert kinds(world.bring_kernel()) == [m.SeqSubmit]
    world.router.tick(ANSWER_TIMEOUT_S)
    assert world.errors() == [(1, ErrorCode.UNAVAILABLE)]
    world.lose_kernel()
    assert kinds(world.bring_kernel()) == [m.SeqSubmit]  # it may have been accepted: then it is given back
    world.from_kernel(m.SeqAccepted(1, 500))
    assert world.kernel[-1] == CANCEL


def test_a_stream_waits_longer_but_not_for_ever() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.generate(b"b", 2, client_request_id="k")
    world.leave(b"b")  # an orphan
    world.lose_kernel()
    world.router.tick(PATIENCE_S - 0.1)
    assert (world.errors(), len(world.router)) == ([], 2)
    world.router.tick(PATIENCE_S)
    error = m.Error(1, ErrorCode.UNAVAILABLE, "the microkernel does not come back", None, 500)
    assert world.listener.sent[b"a"][-1] == error
    assert len(world.router) == 0
    assert world.bring_kernel() == []


def test_a_stream_does_not_wait_for_ever_for_a_microkernel_that_is_silent() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    for now in (100.0, 120.0):
        world.now = now
        world.lose_kernel()
        world.bring_kernel()
        world.router.tick(now + ANSWER_TIMEOUT_S - 0.1)
    assert world.errors() == []
    world.router.tick(120.0 + ANSWER_TIMEOUT_S)
    assert world.errors() == [(1, ErrorCode.UNAVAILABLE)]


def test_who_leaves_while_the_microkernel_is_away_is_not_forgotten() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.attached(world.attach(b"b", 1, 501), rid=501)
    world.generate(b"c", 1)
    world.lose_kernel()
    for name in (b"a", b"b", b"c"):
        world.leave(name)
    asked: list[Any] = world.bring_kernel()
    assert [(type(message), message.req) for message in asked] == [(m.SeqAttach, 1), (m.SeqAttach, 2), (m.SeqSubmit, 3)]
    before = len(world.kernel)
    world.attached(1)
    world.attached(2, rid=501)
    world.from_kernel(m.SeqAccepted(3, 502, existing=True))  # it was made, and is read by nobody yet
    assert world.kernel[before:] == [CANCEL, m.SeqDetach(501), m.SeqAttach(3, 502, "root")]
    world.attached(3, rid=502)
    assert world.kernel[-1] == m.SeqCancel(502, FinishReason.CANCELLED)
    assert len(world.router) == 0


@pytest.mark.parametrize(("key", "left"), [("mine", m.SeqDetach(500)), ("auto-1", CANCEL), (None, CANCEL)])
def test_a_generate_under_the_callers_own_name_outlives_its_client(key: str | None, left: m.Message) -> None:
    world = World()
    world.generate(b"a", 1, client_request_id=key)
    world.from_kernel(m.SeqAccepted(1, 500))
    world.leave(b"a")
    assert world.kernel[1:] == [left]
    world.generate(b"b", 1, client_request_id="mine")
    world.from_kernel(m.SeqAccepted(2, 500, existing=True))
    world.attached(2, 65, end=m.SeqEnd(500, FinishReason.LENGTH, usage(2, 1)))
    assert world.listener.sent[b"b"] == [m.Accepted(1, 500, "echo", 2)]
    assert world.text[-1] == m.DecodeStep((m.DecodeItem(2, (65,), False), m.DecodeItem(2, (), True)))


def test_prompts_that_wait_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "MAX_WAITING_BYTES", 10_000)
    world = World()
    world.lose_kernel()
    world.lose_text()
    world.generate(b"a", 1, text="x" * 6000, token_ids=None)
    world.generate(b"a", 2, token_ids=pack_i32([65] * 500))
    assert world.router.waiting_bytes == 6000 + 2000 + 2 * 1024
    world.generate(b"a", 3)
    assert world.errors() == [(3, ErrorCode.OVERLOADED)]
    world.leave(b"a")
    assert world.router.waiting_bytes == 0
    world.generate(b"b", 1)
    assert world.errors(b"b") == []
    world.bring_kernel()
    world.from_kernel(m.SeqAccepted(3, 500))
    assert world.router.waiting_bytes == 0


# ---------------------------------------------------------------- the tokenizer


def test_a_stream_is_decoded_anew_and_its_client_sees_what_it_lacks() -> None:
    world = World()
    world.stream(rid=500)
    world.step((500, 0, (65, 66)))
    decoded(world, 1, "A", 2)
    world.step((500, 2, (67,)))
    world.lose_text()
    world.step((500, 3, (68,)))
    acks = len(world.kernel)
    assert world.bring_text() == [
        m.DecodeOpen(1, "echo", ()),
        m.DecodeStep((m.DecodeItem(1, (65, 66), False), m.DecodeItem(1, (67, 68), False))),
    ]
    decoded(world, 1, "A", 2)
    assert len(world.kernel) == acks  # the client has not read what it was sent
    decoded(world, 1, "BCD", 2)
    assert world.listener.sent[b"a"][1:] == [m.Tokens(1, 0, (65, 66), "A"), m.Tokens(1, 2, (67, 68), "BCD")]
    assert world.errors() == []


def test_what_the_client_brought_is_acknowledged_once() -> None:
    world = World()
    number = world.attach(offset=2)
    world.attached(number, 65, 66, 67)
    decoded(world, number, "AB", 2)
    assert world.kernel[-1] == m.SeqAck(500, 2)
    asked = len(world.kernel)
    world.lose_text()
    world.bring_text()
    decoded(world, number, "AB", 2)
    assert len(world.kernel) == asked
    decoded(world, number, "C", 1)
    assert world.listener.sent[b"a"][-1] == m.Tokens(1, 2, (67,), "C")


def test_after_a_death_requests_talk_one_at_a_time() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.step((500, 0, (65,)))
    world.generate(b"a", 2, **TEXT)
    world.client(b"a", m.Tokenize(3, None, "y", None))
    world.lose_text()
    assert kinds(world.bring_text()) == [m.DecodeOpen, m.DecodeStep]
    before = len(world.text)
    world.client(b"a", m.Tokenize(4, None, "z", None))
    decoded(world, 1, "A", 1)
    assert world.text[before:] == [m.Encode(2, "echo", "x", None)]
    world.from_text(m.Encoded(2, pack_i32([66])))
    assert world.text[before + 1 :] == [m.Encode(3, "echo", "y", None, True)]
    world.from_text(m.Error(3, ErrorCode.INVALID_REQUEST, "no"))
    assert world.text[before + 2 :] == [m.Encode(4, "echo", "z", None, True)]
    world.leave(b"a")
    world.client(b"b", m.Tokenize(1, None, "w", None))
    assert world.text[-1] == m.Encode(5, "echo", "w", None, True)


def test_streams_that_are_quiet_need_no_turn_of_their_own() -> None:
    world = World()
    for req in (1, 2, 3):
        world.stream(b"a", req, 500 + req)
    world.lose_text()
    assert kinds(world.bring_text()) == [m.DecodeOpen] * 3


def test_a_text_that_tokenizers_die_of_fails_alone() -> None:
    world = World()
    world.generate(b"a", 1, **TEXT)
    world.client(b"b", m.Tokenize(1, None, "poison", None))
    world.stream(b"c", 1, 500)
    world.step((500, 0, (65,)))
    world.lose_text()
    world.bring_text()
    world.from_text(m.Encoded(1, pack_i32([66])))
    deaths = 1
    while not world.errors(b"b"):
        assert world.text[-1] == m.Encode(2, "echo", "poison", None, True)
        world.lose_text()
        deaths += 1
        world.bring_text()
        if isinstance(world.text[-1], m.DecodeStep):
            decoded(world, 3, "A", 1)
    assert deaths == MAX_STRIKES
    assert world.errors(b"b") == [(1, ErrorCode.INTERNAL)]
    assert (world.errors(b"a"), world.errors(b"c")) == ([], [])
    assert world.listener.sent[b"c"][-1] == m.Tokens(1, 0, (65,), "A")


def test_output_that_tokenizers_die_of_ends_its_sequence() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.attached(world.attach(b"b", 1, 501), 65, rid=501)
    world.step((500, 0, (65,)))
    for _ in range(MAX_STRIKES):
        assert world.errors(b"b") == []
        world.lose_text()
        world.bring_text()
        world.router.tick(world.now + 1.1)  # nobody answers: the next one's turn
        world.now += 2
    assert m.SeqCancel(500, FinishReason.TOKENIZER_FAILED) in world.kernel
    assert world.kernel[-1] == m.SeqDetach(501)
    assert world.errors(b"b") == [(1, ErrorCode.INTERNAL)]
    world.step(ends=(m.SeqEnd(500, FinishReason.TOKENIZER_FAILED, usage(2, 1)),))
    last = world.listener.sent[b"a"][-1]
    assert isinstance(last, m.Finished)
    assert last.reason == FinishReason.TOKENIZER_FAILED


def test_strikes_are_forgiven_when_a_tokenizer_answers() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.step((500, 0, (65,)))
    for _ in range(2 * MAX_STRIKES):
        world.lose_text()
        world.bring_text()
        decoded(world, 1, "A", 1)
        world.step((500, 1, (66,)))
    assert not any(isinstance(message, m.SeqCancel) for message in world.kernel)


def test_a_tokenizer_that_is_away_costs_no_strikes() -> None:
    world = World()
    world.generate(b"a", 1, **TEXT)
    for _ in range(2 * MAX_STRIKES):
        world.lose_text()
    assert world.bring_text() == [m.Encode(1, "echo", "x", None)]


def test_waiting_for_a_tokenizer_has_an_end() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.lose_text()
    world.generate(b"b", 1, **TEXT)
    world.router.tick(ANSWER_TIMEOUT_S)
    assert world.listener.sent[b"b"] == [m.Error(1, ErrorCode.UNAVAILABLE, "the tokenizer is not running")]
    world.router.tick(PATIENCE_S - 0.1)
    assert not any(isinstance(message, m.SeqCancel) for message in world.kernel)
    world.router.tick(PATIENCE_S)
    assert world.kernel[-1] == m.SeqCancel(500, FinishReason.TOKENIZER_FAILED)


def test_the_end_and_the_last_text_survive_both_losses() -> None:
    world = World()
    world.stream(rid=500)
    world.step((500, 0, (65,)), ends=(m.SeqEnd(500, FinishReason.LENGTH, usage(2, 1)),))
    world.lose_kernel()
    world.lose_text()
    assert world.bring_kernel() == []  # it has all of it
    world.bring_text()
    assert world.text[-1] == m.DecodeStep((m.DecodeItem(1, (65,), False), m.DecodeItem(1, (), True)))
    world.from_text(m.Decoded((m.DecodedItem(1, "A", 1), m.DecodedItem(1, "!", 0, None, True))))
    assert world.listener.sent[b"a"][1:] == [
        m.Tokens(1, 0, (65,), "A"),
        m.Finished(1, 500, FinishReason.LENGTH, "!", usage(2, 1)),
    ]
