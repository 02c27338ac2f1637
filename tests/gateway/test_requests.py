"""The request's life as a pure state machine: every event in every state that can see it."""

from __future__ import annotations

import pytest
from gateway_world import usage

from llmos.codes import ErrorCode, FinishReason
from llmos.errors import Unavailable
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.requests import TRANSITIONS, Outbox, Request, RequestState, Terms

PARAMS = SamplingParams(max_tokens=8, stop=("END",))


def make(state: RequestState = RequestState.STREAMING) -> Request:
    request = Request(9, b"client", 4, "echo", PARAMS, "alice", Terms("once", 7, 500.0, received=10.0))
    if state is not RequestState.ENCODING:
        request.encoded(pack_i32([1, 2, 3]), PARAMS, 10.0, Outbox())
    if state is RequestState.STREAMING:
        request.accepted(70, Outbox())
    return request


def to_client(out: Outbox) -> list[m.Message]:
    assert all(routing_id == b"client" for routing_id, _ in out.client)
    return [message for _, message in out.client]


def feed(request: Request, offset: int, *ids: int) -> Outbox:
    out = Outbox()
    request.tokens(m.TokenEntry(70, offset, ids), out)
    return out


def decode(request: Request, text: str, used: int, stop: str | None = None, *, final: bool = False) -> Outbox:
    out = Outbox()
    request.decoded(m.DecodedItem(9, text, used, stop, final), out)
    return out


def end(request: Request, reason: FinishReason = FinishReason.LENGTH, output: int = 2) -> Outbox:
    out = Outbox()
    request.end(m.SeqEnd(70, reason, usage(3, output)), out)
    return out


def test_the_whole_way() -> None:
    request, out = make(RequestState.ENCODING), Outbox()
    request.encoded(pack_i32([1, 2, 3]), PARAMS, 10.125, out)
    assert out.kernel == [m.SeqSubmit(9, "echo", pack_i32([1, 2, 3]), PARAMS, "alice", "once", 7, 375.0)]
    out = Outbox()
    request.accepted(70, out)
    assert to_client(out) == [m.Accepted(4, 70, "echo", 3)]
    assert out.text == [m.DecodeOpen(9, "echo", ("END",))]
    assert feed(request, 0, 10, 11).decode == [m.DecodeItem(9, (10, 11), False)]
    assert to_client(decode(request, "a", 2)) == [m.Tokens(4, 0, (10, 11), "a")]
    assert end(request).decode == [m.DecodeItem(9, (), True)]
    out = decode(request, "b", 0, final=True)
    assert to_client(out) == [m.Finished(4, 70, FinishReason.LENGTH, "b", usage(3, 2))]
    assert request.state is RequestState.ENDED


def test_a_deadline_that_passed_while_encoding_is_left_to_the_microkernel() -> None:
    assert Terms(deadline_ms=500.0, received=10.0).deadline_left(10.0) == 500.0
    assert Terms(deadline_ms=500.0, received=10.0).deadline_left(99.0) == 0.001
    assert Terms(received=10.0).deadline_left(99.0) is None


def test_tokens_wait_for_their_text_in_order() -> None:
    request = make()
    feed(request, 0, 10)
    feed(request, 1, 11, 12)
    assert to_client(decode(request, "x", 1)) == [m.Tokens(4, 0, (10,), "x")]
    assert to_client(decode(request, "yz", 2)) == [m.Tokens(4, 1, (11, 12), "yz")]


def test_tokens_seen_before_are_dropped() -> None:
    request = make()
    feed(request, 0, 10, 11)
    assert feed(request, 0, 10, 11).decode == []
    assert feed(request, 1, 11, 12).decode == [m.DecodeItem(9, (12,), False)]


def test_a_gap_ends_the_request() -> None:
    out = feed(make(), 1, 10)
    (error,) = to_client(out)
    assert isinstance(error, m.Error)
    assert (error.req, error.code, error.rid) == (4, ErrorCode.PROTOCOL, 70)
    assert out.kernel == [m.SeqCancel(70, FinishReason.CANCELLED)]
    assert out.text == [m.DecodeClose(9)]


def test_logprobs_travel_with_their_tokens() -> None:
    request, out = make(), Outbox()
    logprobs = (m.TokenLogprobs(-0.1), m.TokenLogprobs(-0.2), m.TokenLogprobs(-0.3))
    request.tokens(m.TokenEntry(70, 0, (1, 2, 3), logprobs), out)
    assert to_client(decode(request, "a", 2, "END")) == [m.Tokens(4, 0, (1, 2), "a", logprobs[:2])]


def test_stop_string_cuts_tokens_and_finishes_at_the_microkernel() -> None:
    request = make()
    feed(request, 0, 10, 11)
    feed(request, 2, 12, 13, 14)
    feed(request, 5, 15)
    decode(request, "x", 2)
    out = decode(request, "y", 2, "END")
    assert to_client(out) == [m.Tokens(4, 2, (12, 13), "y")]
    assert out.kernel == [m.SeqFinish(70, 4)]
    assert feed(request, 6, 16) == Outbox()
    assert decode(request, "late", 1) == Outbox()
    (finished,) = to_client(end(request, FinishReason.STOP, 4))
    assert finished == m.Finished(4, 70, FinishReason.STOP, "", usage(3, 4), "END")


def test_stop_string_found_after_the_sequence_had_ended() -> None:
    request = make()
    feed(request, 0, 10, 11, 12)
    end(request, FinishReason.LENGTH, 3)
    out = decode(request, "ab", 2, "END")
    assert to_client(out) == [
        m.Tokens(4, 0, (10, 11), "ab"),
        m.Finished(4, 70, FinishReason.STOP, "", usage(3, 2), "END"),
    ]
    assert out.kernel == []


def test_stop_string_found_by_the_flush() -> None:
    request = make()
    feed(request, 0, 10)
    decode(request, "", 1)
    end(request, FinishReason.LENGTH, 1)
    (finished,) = to_client(decode(request, "held", 0, "END", final=True))
    assert finished == m.Finished(4, 70, FinishReason.STOP, "held", usage(3, 1), "END")


def test_cancel_while_encoding_finishes_at_once() -> None:
    request, out = make(RequestState.ENCODING), Outbox()
    request.cancel(out)
    assert to_client(out) == [m.Finished(4, 0, FinishReason.CANCELLED, "", m.Usage(0, 0, 0, 0, 0.0, 0.0))]
    assert out.kernel == []


def test_cancel_while_submitted_waits_for_the_rid() -> None:
    request, out = make(RequestState.SUBMITTED), Outbox()
    request.cancel(out)
    assert out == Outbox()
    request.accepted(70, out)
    assert out.kernel == [m.SeqCancel(70, FinishReason.CANCELLED)]


def test_cancel_while_streaming_is_sent_once_and_the_end_is_awaited() -> None:
    request, out = make(), Outbox()
    feed(request, 0, 10)
    request.cancel(out)
    request.cancel(out)
    assert out.kernel == [m.SeqCancel(70, FinishReason.CANCELLED)]
    assert to_client(decode(request, "a", 1)) == [m.Tokens(4, 0, (10,), "a")]
    end(request, FinishReason.CANCELLED, 1)
    (finished,) = to_client(decode(request, "", 0, final=True))
    assert finished == m.Finished(4, 70, FinishReason.CANCELLED, "", usage(3, 1))


def test_lost_text_ends_as_tokenizer_failed() -> None:
    request, out = make(), Outbox()
    feed(request, 0, 10)
    request.text_lost(out)
    assert out.kernel == [m.SeqCancel(70, FinishReason.TOKENIZER_FAILED)]
    assert feed(request, 1, 11) == Outbox()
    (finished,) = to_client(end(request, FinishReason.LENGTH, 2))
    assert isinstance(finished, m.Finished)
    assert finished.reason == FinishReason.TOKENIZER_FAILED


def test_lost_text_after_the_end_finishes_at_once() -> None:
    request, out = make(), Outbox()
    end(request)
    request.text_lost(out)
    (finished,) = to_client(out)
    assert isinstance(finished, m.Finished)
    assert finished.reason == FinishReason.TOKENIZER_FAILED


@pytest.mark.parametrize("state", [RequestState.ENCODING, RequestState.SUBMITTED, RequestState.STREAMING])
def test_fail_gives_one_error_in_every_state(state: RequestState) -> None:
    request, out = make(state), Outbox()
    request.fail(Unavailable("gone"), out)
    request.fail(Unavailable("again"), out)
    request.cancel(out)
    request.text_lost(out)
    rid = 70 if state is RequestState.STREAMING else None
    assert to_client(out) == [m.Error(4, ErrorCode.UNAVAILABLE, "gone", None, rid)]
    assert request.state is RequestState.ENDED


def test_abandon_tells_services_and_not_the_client() -> None:
    request, out = make(), Outbox()
    request.abandon(out)
    assert to_client(out) == []
    assert out.kernel == [m.SeqCancel(70, FinishReason.CANCELLED)]
    assert out.text == [m.DecodeClose(9)]


def test_ack_is_limited_to_what_was_sent() -> None:
    request, out = make(), Outbox()
    feed(request, 0, 10, 11)
    decode(request, "ab", 2)
    request.acknowledge(1, out)
    request.acknowledge(1000, out)
    assert out.kernel == [m.SeqAck(70, 1), m.SeqAck(70, 2)]


def test_ended_is_final() -> None:
    assert TRANSITIONS[RequestState.ENDED] == frozenset()
    assert set(TRANSITIONS) == set(RequestState)
