"""The SDK without I/O: routing, gaps, endings, acknowledgements."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_world import usage

from llmos.client._core import ACK_EVERY_TOKENS, AckCounter, ClientCore, Drain, Generation, Reply
from llmos.client.types import Chunk, Completion
from llmos.codes import ErrorCode, FinishReason
from llmos.errors import NotFound, ProtocolError, SequenceFailed, Unavailable, WrongState
from llmos.protocol import messages as m


def stream(core: ClientCore, start: int = 0, *, detaches: bool = False) -> tuple[int, list[Any]]:
    items: list[Any] = []
    req, _ = core.add(lambda req: Generation(req, items.append, start, detaches=detaches))
    return req, items


def test_a_stream_becomes_chunks_and_a_completion() -> None:
    core = ClientCore()
    req, items = stream(core)
    logprobs = (m.TokenLogprobs(-0.5), m.TokenLogprobs(-0.25))
    core.receive(m.Accepted(req, 77, "demo", 3))
    core.receive(m.Tokens(req, 0, (5, 6), "ab", logprobs))
    core.receive(m.Tokens(req, 2, (7,), "", (m.TokenLogprobs(-1.0),)))
    core.receive(m.Finished(req, 77, FinishReason.STOP, "c", usage(3, 3), "END"))
    assert items == [
        Chunk("ab", (5, 6), 0, logprobs, 77),
        Chunk("", (7,), 2, (m.TokenLogprobs(-1.0),), 77),
        Chunk("c", (), 3, None, 77),
        Completion(77, "demo", "abc", (5, 6, 7), "stop", "END", usage(3, 3), (*logprobs, m.TokenLogprobs(-1.0))),
    ]
    assert len(core) == 0


@pytest.mark.parametrize("offset", [1, 3])
def test_a_gap_or_repetition_is_a_protocol_error_and_cancels(offset: int) -> None:
    core = ClientCore()
    req, items = stream(core)
    core.receive(m.Accepted(req, 77, "demo", 3))
    core.receive(m.Tokens(req, 0, (5, 6), "ab"))
    assert core.receive(m.Tokens(req, offset, (7,), "c")) == m.Cancel(req)
    assert isinstance(items[-1], ProtocolError)
    assert f"offset {offset}, expected 2" in str(items[-1])
    core.receive(m.Finished(req, 77, FinishReason.CANCELLED, "", usage()))
    assert len(items) == 2
    assert core.stray == 1


def test_a_stream_may_start_anywhere() -> None:
    core = ClientCore()
    req, items = stream(core, 5)
    core.receive(m.Accepted(req, 77, "demo", 3))
    core.receive(m.Tokens(req, 5, (6, 7), "ab"))
    core.receive(m.Finished(req, 77, FinishReason.STOP, "c", usage(3, 7)))
    assert [(item.offset, item.text) for item in items[:2]] == [(5, "ab"), (7, "c")]
    assert (items[2].text, items[2].token_ids) == ("abc", (6, 7))


@pytest.mark.parametrize("offset", [0, 4, 6])
def test_a_gap_in_what_is_only_attached_cancels_nothing(offset: int) -> None:
    core = ClientCore()
    req, items = stream(core, 5, detaches=True)
    assert core.receive(m.Tokens(req, offset, (7,), "c")) is None
    assert f"offset {offset}, expected 5" in str(items[-1])
    assert len(core) == 0


def test_another_reader_is_a_typed_error() -> None:
    core = ClientCore()
    req, items = stream(core)
    core.receive(m.Error(req, ErrorCode.WRONG_STATE, "another reader took over", None, 77))
    assert isinstance(items[0], WrongState)
    assert items[0].rid == 77


@pytest.mark.parametrize("end", ["finished", "error", "death"])
def test_a_drain_acknowledges_what_nobody_reads(end: str) -> None:
    core = ClientCore()
    items: list[Any] = []
    req, left = core.add(lambda req: Generation(req, items.append, 10, detaches=True))
    core.receive(m.Tokens(req, 10, (1, 2), "ab"))
    assert core.replace(req, left, Drain(left))
    assert not core.replace(req, left, Drain(left)), "only once"
    assert core.receive(m.Tokens(req, 12, (0,) * (ACK_EVERY_TOKENS - 1), "")) is None
    assert core.receive(m.Tokens(req, 11 + ACK_EVERY_TOKENS, (0,), "")) == m.Ack(req, 12 + ACK_EVERY_TOKENS)
    assert len(core) == 1
    if end == "finished":
        core.receive(m.Finished(req, 77, FinishReason.STOP, "c", usage(3, 7)))
    elif end == "error":
        core.receive(m.Error(req, ErrorCode.WRONG_STATE, "another reader took over"))
    else:
        core.fail_all(Unavailable("lost"))
    assert len(core) == 0
    assert [item.text for item in items] == ["ab"], "nobody is told"


@pytest.mark.parametrize("reason", [reason for reason in FinishReason if reason.is_failure])
def test_failures_raise_with_rid_and_reason(reason: FinishReason) -> None:
    core = ClientCore()
    req, items = stream(core)
    core.receive(m.Finished(req, 77, reason, "", usage()))
    (error,) = items
    assert isinstance(error, SequenceFailed)
    assert error.rid == 77
    assert reason.name.lower() in error.message


def test_a_missed_deadline_says_so() -> None:
    core = ClientCore()
    req, items = stream(core)
    core.receive(m.Tokens(req, 0, (5, 6), "ab"))
    core.receive(m.Finished(req, 77, FinishReason.DEADLINE, "", usage()))
    assert str(items[-1]) == "sequence 77 ended: its deadline passed while it waited, after 2 tokens"


@pytest.mark.parametrize("reason", [reason for reason in FinishReason if not reason.is_failure])
def test_asked_for_endings_are_completions(reason: FinishReason) -> None:
    core = ClientCore()
    req, items = stream(core)
    core.receive(m.Finished(req, 77, reason, "", usage()))
    assert items[0].finish_reason == reason.name.lower()


def test_an_unknown_reason_is_a_protocol_error() -> None:
    core = ClientCore()
    req, items = stream(core)
    core.receive(m.Finished(req, 77, 200, "", usage()))
    assert isinstance(items[0], ProtocolError)


def test_streams_do_not_mix() -> None:
    core = ClientCore()
    (one, first), (two, second) = stream(core), stream(core)
    core.receive(m.Tokens(two, 0, (2,), "2"))
    core.receive(m.Tokens(one, 0, (1,), "1"))
    core.receive(m.Error(one, ErrorCode.NOT_FOUND, "no such model", "model"))
    core.receive(m.Tokens(two, 1, (3,), "3"))
    assert [item.text for item in second] == ["2", "3"]
    assert isinstance(first[-1], NotFound)
    assert (first[-1].field, str(first[-1])) == ("model", "no such model")


def test_replies_get_their_type_or_an_error() -> None:
    core = ClientCore()
    got: list[Any] = []
    numbers = [core.add(lambda _: Reply(m.PsReply, got.append))[0] for _ in range(3)]
    core.receive(m.PsReply(numbers[0], ()))
    core.receive(m.Killed(numbers[1], (5,)))
    core.receive(m.Error(numbers[2], ErrorCode.UNAVAILABLE, "no"))
    assert got[0] == m.PsReply(numbers[0], ())
    assert isinstance(got[1], ProtocolError)
    assert isinstance(got[2], Unavailable)
    assert len(core) == 0


@pytest.mark.parametrize("how", ["death", "error without number"])
def test_everybody_is_told_when_the_connection_is_useless(how: str) -> None:
    core = ClientCore()
    (_, first), (_, second) = stream(core), stream(core)
    if how == "death":
        core.fail_all(Unavailable("lost"))
    else:
        core.receive(m.Error(0, ErrorCode.UNAVAILABLE, "lost"))
    assert [str(item) for item in first + second] == ["lost", "lost"]
    assert len(core) == 0


def test_probes_and_tails_are_ignored() -> None:
    core = ClientCore()
    req, items = stream(core)
    assert core.receive(m.Welcome(1, "x", "client", 1)) is None
    assert core.forget(req)
    assert not core.forget(req)
    core.receive(m.Tokens(req, 0, (1,), "x"))
    assert items == []
    assert core.stray == 1


def test_numbers_are_not_reused() -> None:
    core = ClientCore()
    first, _ = stream(core)
    core.forget(first)
    assert stream(core)[0] == first + 1


def test_acknowledge_every_256_tokens_read() -> None:
    acks = AckCounter()
    told = [upto for _ in range(100) if (upto := acks.read(10)) is not None]
    assert told == [260, 520, 780]
    assert AckCounter().read(ACK_EVERY_TOKENS) == ACK_EVERY_TOKENS
    assert AckCounter(40).read(ACK_EVERY_TOKENS) == 40 + ACK_EVERY_TOKENS
