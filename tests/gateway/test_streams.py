"""What passes through a stream, and how it ends. Every event in every state: test_requests.py."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_world import usage
from stream_events import (
    ATTACH,
    CONTINUE,
    INFO,
    PARAMS,
    SUBMIT,
    attached,
    decode,
    end,
    ending,
    feed,
    generation,
    submitted,
    to_client,
)

from llmos.codes import ErrorCode, FinishReason
from llmos.errors import ContextTooLong, Unavailable
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.services.gateway.questions import deadline_left
from llmos.services.gateway.requests import Outbox, RequestState
from llmos.services.gateway.streams import Stream

# ---------------------------------------------------------------- Generate


def test_the_whole_way() -> None:
    stream, out = Stream(9, b"client", 4, "echo", SUBMIT, received=10.0), Outbox()
    stream.encoded(m.Encoded(9, pack_i32([1, 2, 3])), INFO, 10.125, out)
    assert out.kernel == [
        m.SeqSubmit(9, "echo", pack_i32([1, 2, 3]), PARAMS, "alice", "once", 7, 375.0, 5, (3, 4)),
    ]
    stream.sent(out.kernel[0])
    out = Outbox()
    stream.answered(m.SeqAccepted(9, 70), 11.0, out)
    assert to_client(out) == [m.Accepted(4, 70, "echo", 3)]
    stream.take_turn(out)
    assert out.text == [m.DecodeOpen(9, "echo", ("END",))]
    assert feed(stream, 0, 10, 11).decode == [m.DecodeItem(9, (10, 11), False)]
    assert to_client(decode(stream, "a", 2)) == [m.Tokens(4, 0, (10, 11), "a")]
    assert end(stream).decode == [m.DecodeItem(9, (), True)]
    out = decode(stream, "b", 0, final=True)
    assert to_client(out) == [m.Finished(4, 70, FinishReason.LENGTH, "b", usage(3, 2))]
    assert stream.state is RequestState.ENDED


def test_a_prompt_that_does_not_fit_changes_nothing() -> None:
    stream, out = Stream(9, b"client", 4, "echo", SUBMIT), Outbox()
    with pytest.raises(ContextTooLong):
        stream.encoded(m.Encoded(9, pack_i32([1] * 512)), INFO, 0.0, out)
    assert out == Outbox()
    assert stream.state is RequestState.ENCODING


def test_a_deadline_that_passed_while_encoding_is_left_to_the_microkernel() -> None:
    assert deadline_left(500.0, 0.0) == 500.0
    assert deadline_left(500.0, 89.0) == 0.001
    assert deadline_left(None, 89.0) is None


def test_tokens_wait_for_their_text_in_order() -> None:
    stream = generation()
    feed(stream, 0, 10)
    feed(stream, 1, 11, 12)
    assert to_client(decode(stream, "x", 1)) == [m.Tokens(4, 0, (10,), "x")]
    assert to_client(decode(stream, "yz", 2)) == [m.Tokens(4, 1, (11, 12), "yz")]


@pytest.mark.parametrize("make", [generation, lambda: attached()[0]])
def test_after_a_gap_the_microkernel_is_asked_for_the_rest(make: Any) -> None:
    stream = make()
    feed(stream, 0, 10)
    assert feed(stream, 2, 12) == Outbox(kernel=[m.SeqAttach(9, 70, "alice")])
    assert feed(stream, 3, 13) == Outbox()  # it is in the answer
    prompt = 3 if stream.is_owner else 5
    out = Outbox()
    stream.answered(m.SeqAttached(9, 70, "echo", prompt, PARAMS, pack_i32([10, 11, 12, 13])), 0.0, out)
    assert out == Outbox(decode=[m.DecodeItem(9, (11, 12, 13), False)])
    assert feed(stream, 4, 14).decode == [m.DecodeItem(9, (14,), False)]


def test_an_end_that_comes_before_its_tokens_waits_for_them() -> None:
    stream = generation()
    feed(stream, 0, 10)
    assert end(stream, output=3) == Outbox(kernel=[m.SeqAttach(9, 70, "alice")])
    out = Outbox()
    stream.answered(m.SeqAttached(9, 70, "echo", 3, PARAMS, pack_i32([10, 11, 12]), ending(output=3)), 0.0, out)
    assert out == Outbox(decode=[m.DecodeItem(9, (11, 12), False), m.DecodeItem(9, (), True)])


def test_text_without_tokens_ends_the_request() -> None:
    out = decode(generation(), "x", 1)
    assert to_client(out) == [m.Error(4, ErrorCode.PROTOCOL, "sequence 70: text without tokens", None, 70)]


def test_logprobs_travel_with_their_tokens() -> None:
    stream, out = generation(), Outbox()
    logprobs = (m.TokenLogprobs(-0.1), m.TokenLogprobs(-0.2), m.TokenLogprobs(-0.3))
    stream.tokens(m.TokenEntry(70, 0, (1, 2, 3), logprobs), out)
    assert to_client(decode(stream, "a", 2, "END")) == [m.Tokens(4, 0, (1, 2), "a", logprobs[:2])]


def known(stream: Stream) -> Outbox:
    """The microkernel has it already, from an earlier request with the same id."""
    submitted(stream, 10.0)
    out = Outbox()
    stream.answered(m.SeqAccepted(9, 70, existing=True), 10.0, out)
    return out


def test_what_was_asked_before_is_read_from_the_beginning() -> None:
    stream = Stream(9, b"client", 4, "echo", SUBMIT)
    assert known(stream) == Outbox(kernel=[m.SeqAttach(9, 70, "alice")])
    assert stream.state is RequestState.SUBMITTED
    out = Outbox()
    stream.answered(m.SeqAttached(9, 70, "echo", 3, PARAMS, pack_i32([10, 11])), 10.0, out)
    assert to_client(out) == [m.Accepted(4, 70, "echo", 3)]
    stream.take_turn(out)
    assert out.decode == [m.DecodeItem(9, (10, 11), False)]
    assert to_client(decode(stream, "ab", 2)) == [m.Tokens(4, 0, (10, 11), "ab")]
    stream.abandon(out := Outbox())
    assert out.leave == [m.SeqCancel(70, FinishReason.CANCELLED)]


def test_an_orphan_leaves_the_sequence_of_an_earlier_request_alone() -> None:
    stream, out = Stream(9, b"client", 4, "echo", SUBMIT, is_durable=True), Outbox()
    submitted(stream, 10.0)
    stream.abandon(out)
    stream.answered(m.SeqAccepted(9, 70, existing=True), 10.0, out)
    assert out == Outbox()
    assert stream.state is RequestState.ENDED


def test_an_orphan_ends_the_sequence_that_was_made_for_it_before_the_microkernel_died() -> None:
    stream, out = Stream(9, b"client", 4, "echo", SUBMIT), Outbox()
    submitted(stream, 10.0)
    stream.abandon(out)
    stream.kernel_lost()
    stream.kernel_back(10.25, out)
    assert [type(message) for message in out.kernel] == [m.SeqSubmit]
    stream.answered(m.SeqAccepted(9, 70, existing=True), 10.5, out)
    assert out.kernel[1:] == [m.SeqAttach(9, 70, "alice")]
    stream.answered(m.SeqAttached(9, 70, "echo", 3, PARAMS, b""), 10.5, out)
    assert out.leave == [m.SeqCancel(70, FinishReason.CANCELLED)]
    assert stream.state is RequestState.ENDED


# ---------------------------------------------------------------- stop strings


def test_stop_string_cuts_tokens_and_finishes_at_the_microkernel() -> None:
    stream = generation()
    feed(stream, 0, 10, 11)
    feed(stream, 2, 12, 13, 14)
    feed(stream, 5, 15)
    decode(stream, "x", 2)
    out = decode(stream, "y", 2, "END")
    assert to_client(out) == [m.Tokens(4, 2, (12, 13), "y")]
    assert out.kernel == [m.SeqFinish(70, 4)]
    assert feed(stream, 6, 16) == Outbox()
    assert decode(stream, "late", 1) == Outbox()
    (finished,) = to_client(end(stream, FinishReason.STOP, 4))
    assert finished == m.Finished(4, 70, FinishReason.STOP, "", usage(3, 4), "END")


def late_stop() -> Stream:
    """A Continue whose output had ended when its stop string was found."""
    stream, _ = attached()
    feed(stream, 0, 10, 11, 12)
    end(stream, FinishReason.LENGTH, 3)
    out = decode(stream, "ab", 2, "END")
    assert to_client(out) == [m.Tokens(4, 0, (10, 11), "ab")]
    assert out.kernel == [m.SeqFinish(70, 2), m.SeqAttach(9, 70, "alice")]
    assert stream.state is RequestState.RESUMING
    return stream


def after_stop(*output: int) -> m.SeqAttached:
    return m.SeqAttached(9, 70, "other", 5, PARAMS, pack_i32(output), ending(FinishReason.STOP, len(output)))


def test_stop_string_found_after_the_end_cuts_an_open_sequence_before_the_client_hears_of_it() -> None:
    stream, out = late_stop(), Outbox()
    stream.answered(after_stop(10, 11), 0.0, out)
    assert out.kernel == []
    assert to_client(out) == [m.Finished(4, 70, FinishReason.STOP, "", usage(3, 2), "END")]


def test_stop_string_is_told_again_of_a_microkernel_that_did_not_hear_of_it() -> None:
    stream = late_stop()
    for _ in range(2):
        stream.kernel_lost()
        stream.kernel_back(0.0, out := Outbox())
        assert out == Outbox(kernel=[m.SeqAttach(9, 70, "alice")])
        stream.answered(after_stop(10, 11, 12), 0.0, out := Outbox())
        assert out == Outbox(kernel=[m.SeqFinish(70, 2), m.SeqAttach(9, 70, "alice")])
    stream.answered(after_stop(10, 11), 0.0, out := Outbox())
    assert to_client(out) == [m.Finished(4, 70, FinishReason.STOP, "", usage(3, 2), "END")]


def test_stop_string_of_what_can_not_be_cut_is_told_twice() -> None:
    """A one-shot sequence keeps what it made."""
    stream, out = late_stop(), Outbox()
    stream.answered(after_stop(10, 11, 12), 0.0, out)
    assert out == Outbox(kernel=[m.SeqFinish(70, 2), m.SeqAttach(9, 70, "alice")])
    out = Outbox()
    stream.answered(after_stop(10, 11, 12), 0.0, out)
    assert out.kernel == []
    assert to_client(out) == [m.Finished(4, 70, FinishReason.STOP, "", usage(3, 2), "END")]


def test_stop_string_that_crosses_with_the_end_is_told_again() -> None:
    stream, _ = attached()
    feed(stream, 0, 10, 11, 12)
    assert decode(stream, "ab", 2, "END").kernel == [m.SeqFinish(70, 2)]
    assert end(stream, FinishReason.LENGTH, 3).kernel == [m.SeqFinish(70, 2), m.SeqAttach(9, 70, "alice")]


def test_stop_string_of_an_output_that_is_history_is_left_at_that() -> None:
    stream, out = late_stop(), Outbox()
    stream.answered(m.SeqAttached(9, 70, "other", 8, PARAMS, b""), 0.0, out)  # somebody has begun another output
    assert to_client(out) == [m.Finished(4, 70, FinishReason.STOP, "", usage(3, 2), "END")]
    assert (out.kernel, out.leave) == ([], [m.SeqDetach(70)])


def test_stop_string_found_after_the_end_of_a_one_shot_sequence_needs_nothing() -> None:
    stream = generation()
    feed(stream, 0, 10, 11, 12)
    end(stream, FinishReason.LENGTH, 3)
    out = decode(stream, "ab", 2, "END")
    assert to_client(out) == [
        m.Tokens(4, 0, (10, 11), "ab"),
        m.Finished(4, 70, FinishReason.STOP, "", usage(3, 2), "END"),
    ]
    assert out.kernel == []


def test_stop_string_found_in_the_last_token_after_the_end_cuts_nothing() -> None:
    stream, _ = attached()
    feed(stream, 0, 10, 11)
    end(stream, FinishReason.LENGTH, 2)
    assert decode(stream, "ab", 2, "END").kernel == []


def test_stop_string_found_by_the_flush() -> None:
    stream = generation()
    feed(stream, 0, 10)
    decode(stream, "", 1)
    end(stream, FinishReason.LENGTH, 1)
    (finished,) = to_client(decode(stream, "held", 0, "END", final=True))
    assert finished == m.Finished(4, 70, FinishReason.STOP, "held", usage(3, 1), "END")


# ---------------------------------------------------------------- Cancel, loss, acknowledgement


def answer(stream: Stream, out: Outbox, *output: int, end: m.SeqEnd | None = None) -> None:
    if stream.rid:
        stream.answered(m.SeqAttached(9, 70, "echo", 3, PARAMS, pack_i32(output), end), 0.0, out)
    else:
        stream.answered(m.SeqAccepted(9, 70), 0.0, out)


@pytest.mark.parametrize("question", [SUBMIT, CONTINUE, ATTACH])
def test_cancel_while_submitted_waits_for_the_answer(question: Any) -> None:
    stream, out = Stream(9, b"client", 4, "echo", question), Outbox()
    submitted(stream)
    stream.cancel(out)
    assert out == Outbox()
    answer(stream, out)
    assert out.kernel == [m.SeqCancel(70, FinishReason.CANCELLED)]


@pytest.mark.parametrize("question", [CONTINUE, ATTACH])
def test_a_cancel_is_carried_out_even_if_the_client_then_leaves(question: Any) -> None:
    stream, out = Stream(9, b"client", 4, "echo", question), Outbox()
    submitted(stream)
    stream.cancel(out)
    stream.abandon(out)
    answer(stream, out)
    assert out == Outbox(kernel=[m.SeqCancel(70, FinishReason.CANCELLED)])
    stream = attached()[0]
    stream.cancel(Outbox())
    stream.abandon(out := Outbox())
    assert out == Outbox(text=[m.DecodeClose(9)])


@pytest.mark.parametrize("question", [CONTINUE, ATTACH])
@pytest.mark.parametrize("cancelled", [False, True])
def test_an_orphan_needs_nothing_of_a_sequence_that_has_ended(question: Any, cancelled: bool) -> None:
    stream, out = Stream(9, b"client", 4, "echo", question), Outbox()
    submitted(stream)
    if cancelled:
        stream.cancel(out)
    stream.abandon(out)
    answer(stream, out, 1, end=ending())
    assert out == Outbox()
    assert stream.state is RequestState.ENDED


def test_cancel_of_what_has_ended_is_nothing() -> None:
    stream, out = Stream(9, b"client", 4, "", ATTACH), Outbox()
    submitted(stream)
    stream.cancel(out)
    answer(stream, out, end=ending())
    stream.take_turn(out)
    assert out.kernel == []
    (finished,) = to_client(decode(stream, "", 0, final=True))
    assert isinstance(finished, m.Finished)
    assert finished.reason == FinishReason.LENGTH


@pytest.mark.parametrize("make", [generation, lambda: attached()[0]])
def test_cancel_while_streaming_is_sent_once_and_the_end_is_awaited(make: Any) -> None:
    stream, out = make(), Outbox()
    feed(stream, 0, 10)
    stream.cancel(out)
    stream.cancel(out)
    assert out.kernel == [m.SeqCancel(70, FinishReason.CANCELLED)]
    assert to_client(decode(stream, "a", 1)) == [m.Tokens(4, 0, (10,), "a")]
    end(stream, FinishReason.CANCELLED, 1)
    (finished,) = to_client(decode(stream, "", 0, final=True))
    assert finished == m.Finished(4, 70, FinishReason.CANCELLED, "", usage(3, 1))


def test_failed_text_ends_as_tokenizer_failed() -> None:
    stream, out = generation(), Outbox()
    feed(stream, 0, 10)
    stream.text_failed(Unavailable("gone"), out)
    assert out.kernel == [m.SeqCancel(70, FinishReason.TOKENIZER_FAILED)]
    assert feed(stream, 1, 11) == Outbox()
    (finished,) = to_client(end(stream, FinishReason.LENGTH, 2))
    assert isinstance(finished, m.Finished)
    assert finished.reason == FinishReason.TOKENIZER_FAILED


@pytest.mark.parametrize("is_owner", [True, False])
def test_failed_text_after_the_end(is_owner: bool) -> None:
    stream, out = generation() if is_owner else attached()[0], Outbox()
    end(stream, output=0)
    stream.text_failed(Unavailable("gone"), out)
    assert (out.kernel, out.leave) == ([], [])
    (last,) = to_client(out)
    if is_owner:
        assert isinstance(last, m.Finished)
        assert last.reason == FinishReason.TOKENIZER_FAILED
    else:
        assert last == m.Error(4, ErrorCode.UNAVAILABLE, "gone", None, 70)


def test_ack_is_limited_to_what_was_sent() -> None:
    stream, out = generation(), Outbox()
    feed(stream, 0, 10, 11)
    decode(stream, "ab", 2)
    stream.acknowledge(1, out)
    stream.acknowledge(1, out)  # nothing new
    stream.acknowledge(1000, out)
    assert out.kernel == [m.SeqAck(70, 1), m.SeqAck(70, 2)]
    end(stream)
    stream.acknowledge(2, out)
    assert len(out.kernel) == 2
