"""Continue and Attach: what is read, from where, and what a replay finds. As a property: test_replay.py."""

from __future__ import annotations

import pytest
from gateway_world import usage
from stream_events import (
    CONTINUE,
    PARAMS,
    attached,
    decode,
    end,
    ending,
    feed,
    generation,
    submitted,
    to_client,
)

from llmos.codes import FinishReason
from llmos.protocol import messages as m
from llmos.services.gateway.requests import Outbox, RequestState
from llmos.services.gateway.streams import Stream

# ---------------------------------------------------------------- Continue


def test_continue_reads_from_the_beginning_of_its_output() -> None:
    stream = Stream(9, b"client", 4, "echo", CONTINUE)
    assert submitted(stream) == Outbox(kernel=[CONTINUE])
    out = Outbox()
    stream.answered(m.SeqAttached(9, 70, "echo", 12, PARAMS, b""), 0.0, out)
    assert to_client(out) == [m.Accepted(4, 70, "echo", 12)]
    stream.take_turn(out)
    assert out.text == [m.DecodeOpen(9, "echo", ("END",))]
    assert (out.decode, out.kernel) == ([], [])
    feed(stream, 0, 10)
    assert to_client(decode(stream, "a", 1)) == [m.Tokens(4, 0, (10,), "a")]


# ---------------------------------------------------------------- Attach


def test_attach_replays_everything_and_shows_what_the_client_lacks() -> None:
    stream, out = attached(10, 11, 12, offset=2)
    assert to_client(out) == [m.Accepted(4, 70, "other", 5)]
    assert out.text == [m.DecodeOpen(9, "other", ("END",))]
    assert out.decode == [m.DecodeItem(9, (10, 11), False), m.DecodeItem(9, (12,), False)]
    out = decode(stream, "ab", 2)
    assert out == Outbox(kernel=[m.SeqAck(70, 2)])
    assert to_client(decode(stream, "c", 1)) == [m.Tokens(4, 2, (12,), "c")]
    feed(stream, 3, 13)
    assert to_client(decode(stream, "d", 1)) == [m.Tokens(4, 3, (13,), "d")]


def test_attach_far_ahead_waits_for_its_offset() -> None:
    stream, _ = attached(10, offset=4)
    decode(stream, "a", 1)
    out = feed(stream, 1, 11, 12, 13, 14, 15)
    assert out.decode == [m.DecodeItem(9, (11, 12, 13), False), m.DecodeItem(9, (14, 15), False)]
    assert decode(stream, "bcd", 3) == Outbox(kernel=[m.SeqAck(70, 4)])
    assert to_client(decode(stream, "ef", 2)) == [m.Tokens(4, 4, (14, 15), "ef")]


@pytest.mark.parametrize("offset", [0, 2, 3, 1000])
def test_attach_to_what_has_ended(offset: int) -> None:
    stream, out = attached(10, 11, offset=offset, end=ending())
    assert to_client(out) == [m.Accepted(4, 70, "other", 5)]
    assert out.decode == [m.DecodeItem(9, (10, 11), False), m.DecodeItem(9, (), True)]
    assert out.kernel == []
    out = decode(stream, "ab", 2)
    assert to_client(out) == ([m.Tokens(4, 0, (10, 11), "ab")] if offset == 0 else [])
    assert out.kernel == []
    assert to_client(decode(stream, "c", 0, final=True)) == [m.Finished(4, 70, FinishReason.LENGTH, "c", usage(3, 2))]
    assert stream.state is RequestState.ENDED


def test_attach_to_what_a_stop_string_ended() -> None:
    """The output ends with the token that completed the stop string: the replay finds it again."""
    stream, _ = attached(10, 11, end=ending(FinishReason.STOP))
    out = decode(stream, "a", 2, "END")
    assert to_client(out) == [
        m.Tokens(4, 0, (10, 11), "a"),
        m.Finished(4, 70, FinishReason.STOP, "", usage(3, 2), "END"),
    ]
    assert out.kernel == []


def test_attach_finds_the_stop_string_that_nobody_looked_for() -> None:
    """While nobody read, the sequence ran on: its text ends at the stop string all the same."""
    stream, _ = attached(10, 11, 12, 13, offset=1)
    assert decode(stream, "a", 1) == Outbox(kernel=[m.SeqAck(70, 1)])
    out = decode(stream, "b", 2, "END")
    assert to_client(out) == [m.Tokens(4, 1, (11, 12), "b")]
    assert out.kernel == [m.SeqFinish(70, 3)]
    (finished,) = to_client(end(stream, FinishReason.STOP, 3))
    assert finished == m.Finished(4, 70, FinishReason.STOP, "", usage(3, 3), "END")


def test_a_stop_string_below_the_offset_of_the_client_gives_just_the_end() -> None:
    stream, _ = attached(10, 11, offset=3, end=ending(FinishReason.STOP, 2))
    out = decode(stream, "secret", 2, "END")
    assert to_client(out) == [m.Finished(4, 70, FinishReason.STOP, "", usage(3, 2), "END")]


def test_attach_to_a_sequence_that_rests_and_has_no_output() -> None:
    stream, out = attached(params=None, end=ending(FinishReason.STOP, 0))
    assert out.text == [m.DecodeOpen(9, "other", ())]
    assert out.decode == [m.DecodeItem(9, (), True)]
    (finished,) = to_client(decode(stream, "", 0, final=True))
    assert finished == m.Finished(4, 70, FinishReason.STOP, "", usage(3, 0))


def test_who_has_the_end_is_not_replaced() -> None:
    stream, out = generation(), Outbox()
    feed(stream, 0, 10)
    end(stream, FinishReason.LENGTH, 1)
    stream.replaced(out)
    assert out == Outbox()
    assert to_client(decode(stream, "a", 1)) == [m.Tokens(4, 0, (10,), "a")]
    (finished,) = to_client(decode(stream, "", 0, final=True))
    assert isinstance(finished, m.Finished)
