"""The SDK without I/O: routing, gaps, endings, acknowledgements, and what an interruption leaves."""

from __future__ import annotations

import math
from typing import Any

import pytest
from gateway_world import usage

from llmos.client._core import ACK_EVERY_TOKENS, AckCounter, ClientCore, ConnectionLost, Drain, Reply
from llmos.client.generation import Generation
from llmos.client.types import Chunk, Completion
from llmos.codes import ErrorCode, FinishReason
from llmos.errors import NotFound, ProtocolError, SequenceFailed, Unavailable, WrongState
from llmos.protocol import messages as m


def stream(core: ClientCore, start: int = 0, *, detaches: bool = False) -> tuple[int, list[Any]]:
    items: list[Any] = []
    req, _ = core.add(Generation(items.append, start, detaches=detaches).asked)
    return req, items


def interrupted(*before: m.Message, start: int = 0, **options: Any) -> tuple[ClientCore, Generation, list[Any]]:
    """A stream that got these messages under number 1, lost its connection, and was asked for again under number 1 of another one."""
    items: list[Any] = []
    losses: list[bool] = []
    generation = Generation(items.append, start, on_lost=lambda: losses.append(True), **options)
    first, second = ClientCore(), ClientCore()
    first.add(generation.asked)
    for message in before:
        first.receive(message)
    first.lose_all()
    assert losses == [True]
    second.add(generation.asked)
    return second, generation, items


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


@pytest.mark.parametrize("end", ["finished", "error", "failure", "death"])
def test_a_drain_acknowledges_what_nobody_reads(end: str) -> None:
    core = ClientCore()
    items: list[Any] = []
    req, left = core.add(Generation(items.append, 10, detaches=True).asked)
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
    elif end == "failure":
        core.fail_all(Unavailable("lost"))
    else:
        core.lose_all()
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


def test_a_lost_connection_leaves_replies_unknown_and_streams_unfinished() -> None:
    core = ClientCore()
    items: list[Any] = []
    core.add(lambda _: Reply(m.PsReply, items.append))
    generation = Generation(items.append, on_lost=lambda: items.append("lost"))
    core.add(generation.asked)
    core.lose_all()
    assert (type(items[0]), items[1]) == (ConnectionLost, "lost")
    assert len(core) == 0
    assert not generation.ended


def test_only_what_ends_with_its_client_is_owned() -> None:
    core = ClientCore()
    for owned in (False, True, False, True):
        core.add(Generation(print, owned=owned).asked)
    core.add(lambda _: Reply(m.PsReply, print))
    assert core.owned() == [2, 4]


ACCEPTED = m.Accepted(1, 77, "demo", 3)


def test_an_interrupted_stream_goes_on_where_it_was() -> None:
    core, generation, items = interrupted(ACCEPTED, m.Tokens(1, 0, (5, 6), "a"))
    assert (generation.rid, generation.upto, generation.accepted) == (77, 2, False)
    core.receive(ACCEPTED)
    core.receive(m.Tokens(1, 0, (5, 6), "a"))  # it has these already
    core.receive(m.Tokens(1, 2, (7,), "bc"))
    core.receive(m.Tokens(1, 2, (7,), "bc"))
    core.receive(m.Finished(1, 77, FinishReason.STOP, "d", usage(3, 3)))
    assert [(item.offset, item.token_ids, item.text) for item in items[:-1]] == [
        (0, (5, 6), "a"),
        (2, (7,), "bc"),
        (3, (), "d"),
    ]
    assert (items[-1].text, items[-1].token_ids, items[-1].model) == ("abcd", (5, 6, 7), "demo")


@pytest.mark.parametrize("offset", [1, 3])
def test_a_gap_or_half_a_repetition_after_an_interruption_is_an_error(offset: int) -> None:
    core, _, items = interrupted(ACCEPTED, m.Tokens(1, 0, (5, 6), "a"))
    core.receive(ACCEPTED)
    assert core.receive(m.Tokens(1, offset, (6, 7), "bc")) == m.Cancel(1)
    assert isinstance(items[-1], ProtocolError)
    assert f"offset {offset}, expected 2" in str(items[-1])


@pytest.mark.parametrize("other", [m.Accepted(1, 78, "demo", 3), m.Accepted(1, 77, "demo", 5)])
def test_another_output_is_not_the_rest_of_this_one(other: m.Accepted) -> None:
    core, _, items = interrupted(ACCEPTED, m.Tokens(1, 0, (5, 6), "a"))
    assert core.receive(other) is None, "it may be somebody else's"
    assert isinstance(items[-1], Unavailable)
    assert "has another output by now" in str(items[-1])


def test_log_probabilities_that_were_lost_are_not_a_number() -> None:
    known = m.TokenLogprobs(-0.5)
    core, generation, items = interrupted(ACCEPTED, m.Tokens(1, 4, (5,), "a", (known,)), start=4)
    generation.wants_logprobs = True
    core.receive(ACCEPTED)
    core.receive(m.Tokens(1, 5, (6, 7), "bc"))
    core.receive(m.Tokens(1, 7, (8,), "d", (known,)))
    core.receive(m.Finished(1, 77, FinishReason.STOP, "", usage(3, 8)))
    assert [len(item.logprobs) for item in items[:3]] == [1, 2, 1]
    found = [entry.logprob for entry in items[-1].logprobs]
    assert (found[0], found[3]) == (-0.5, -0.5)
    assert all(math.isnan(value) for value in found[1:3])


def test_log_probabilities_stay_with_their_tokens_whoever_attaches() -> None:
    core = ClientCore()
    req, items = stream(core, 2, detaches=True)
    core.receive(m.Tokens(req, 2, (5, 6), "ab"))  # old tokens come without
    core.receive(m.Tokens(req, 4, (7,), "c", (m.TokenLogprobs(-0.5),)))
    core.receive(m.Tokens(req, 5, (8,), "d"))
    core.receive(m.Finished(req, 77, FinishReason.STOP, "", usage(3, 6)))
    found = [entry.logprob for entry in items[-1].logprobs]
    assert found[2] == -0.5
    assert [math.isnan(value) for value in found] == [True, True, False, True]


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
