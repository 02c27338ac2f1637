"""Tokenize, Spawn and Append as pure state machines."""

from __future__ import annotations

import pytest
from gateway_world import model_info
from stream_events import stats

from llmos.codes import ErrorCode
from llmos.errors import ContextTooLong, InvalidRequest, LlmosError, Unavailable, WrongState
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.services.gateway.exchanges import Exchange
from llmos.services.gateway.requests import Outbox, RequestState

INFO = model_info()
SPAWN = m.SeqSpawn(9, "echo", b"", "alice", 3, 7, (5, 6), "once")
APPEND = m.SeqAppend(9, 70, "echo", b"", "alice")
IDS = pack_i32([1, 2, 3])


def make(question: m.SeqSpawn | m.SeqAppend | None, *, submitted: bool = False, is_durable: bool = False) -> Exchange:
    exchange = Exchange(9, b"client", 4, "echo", question, is_durable=is_durable)
    if submitted:
        exchange.encoded(m.Encoded(9, IDS), INFO, 0.0, out := Outbox())
        exchange.sent(out.kernel[0])
        if isinstance(question, m.SeqAppend):
            exchange.answered(stats(70, 9), 0.0, out)
            exchange.sent(out.kernel[1])
    return exchange


def to_client(*messages: m.Message) -> Outbox:
    return Outbox(client=[(b"client", message) for message in messages])


def test_tokenize() -> None:
    exchange, out = make(None), Outbox()
    exchange.encoded(m.Encoded(9, IDS, ("a", "b", "c")), INFO, 0.0, out)
    assert out == to_client(m.Tokenized(4, "echo", IDS, ("a", "b", "c")))
    assert exchange.state is RequestState.ENDED


def test_spawn() -> None:
    exchange, out = make(SPAWN), Outbox()
    exchange.encoded(m.Encoded(9, IDS), INFO, 0.0, out)
    assert out == Outbox(kernel=[m.SeqSpawn(9, "echo", IDS, "alice", 3, 7, (5, 6), "once")])
    out = Outbox()
    exchange.answered(m.SeqAccepted(9, 71), 0.0, out)
    assert out == to_client(m.Spawned(4, 71, "echo", 3))
    assert exchange.state is RequestState.ENDED


def test_spawn_without_tokens() -> None:
    exchange, out = make(SPAWN), Outbox()
    exchange.encoded(m.Encoded(9, b""), INFO, 0.0, out)
    assert out == Outbox(kernel=[SPAWN])
    out = Outbox()
    exchange.answered(m.SeqAccepted(9, 71), 0.0, out)
    assert out == to_client(m.Spawned(4, 71, "echo", 0))


def test_append() -> None:
    exchange, out = make(APPEND), Outbox()
    exchange.encoded(m.Encoded(9, IDS), INFO, 0.0, out)
    assert out == Outbox(kernel=[m.Stat(9, 70, "alice")])
    out = Outbox()
    exchange.answered(stats(70, 9), 0.0, out)
    assert out == Outbox(kernel=[m.SeqAppend(9, 70, "echo", IDS, "alice")])
    out = Outbox()
    exchange.answered(m.SeqAppended(9, 70, 12), 0.0, out)
    assert out == to_client(m.Appended(4, 70, 12))


@pytest.mark.parametrize(
    ("question", "ids", "kind"),
    [
        (APPEND, [], InvalidRequest),
        (APPEND, [256], InvalidRequest),
        (APPEND, [1] * 512, ContextTooLong),
        (SPAWN, [-1], InvalidRequest),
        (SPAWN, [1] * 512, ContextTooLong),
    ],
)
def test_bad_tokens_are_refused_before_the_microkernel_is_asked(
    question: m.SeqSpawn | m.SeqAppend, ids: list[int], kind: type[LlmosError]
) -> None:
    exchange, out = make(question), Outbox()
    with pytest.raises(kind) as caught:
        exchange.encoded(m.Encoded(9, pack_i32(ids)), INFO, 0.0, out)
    assert caught.value.field == "prompt"
    assert out == Outbox()
    assert exchange.state is RequestState.ENCODING


@pytest.mark.parametrize("question", [None, SPAWN, APPEND])
def test_while_encoding_it_fails_and_is_abandoned_without_a_trace(question: m.SeqSpawn | m.SeqAppend | None) -> None:
    exchange, out = make(question), Outbox()
    exchange.fail(Unavailable("gone"), out)
    exchange.fail(Unavailable("again"), out)
    assert out == to_client(m.Error(4, ErrorCode.UNAVAILABLE, "gone"))
    assert exchange.state is RequestState.ENDED
    exchange, out = make(question), Outbox()
    exchange.abandon(out)
    assert out == Outbox()
    assert exchange.state is RequestState.ENDED


@pytest.mark.parametrize("question", [SPAWN, APPEND])
def test_what_the_microkernel_refuses_ends_it(question: m.SeqSpawn | m.SeqAppend) -> None:
    exchange, out = make(question, submitted=True), Outbox()
    exchange.refused(WrongState("sequence 70 is generating", field="rid", rid=70), out)
    assert out == to_client(m.Error(4, ErrorCode.WRONG_STATE, "sequence 70 is generating", "rid", 70))
    assert exchange.state is RequestState.ENDED


def test_a_sequence_that_can_be_found_again_is_left_to_be_found() -> None:
    for existing in (False, True):
        exchange, out = make(SPAWN, submitted=True, is_durable=True), Outbox()
        exchange.abandon(out)
        exchange.answered(m.SeqAccepted(9, 71, existing), 0.0, out)
        assert out == Outbox()
        assert exchange.state is RequestState.ENDED


def test_a_sequence_that_nobody_waits_for_is_closed() -> None:
    exchange, out = make(SPAWN, submitted=True), Outbox()
    exchange.abandon(out)
    assert out == Outbox()
    assert exchange.state is RequestState.ORPHANED
    exchange.answered(m.SeqAccepted(9, 71), 0.0, out)
    assert out == Outbox(kernel=[m.Close(9, 71)])
    assert exchange.state is RequestState.ENDED


def test_the_microkernels_silence_orphans_a_spawn() -> None:
    exchange, out = make(SPAWN, submitted=True), Outbox()
    exchange.fail(Unavailable("silent"), out)
    exchange.fail(Unavailable("again"), out)
    exchange.refused(Unavailable("and gone"), out)
    assert out == to_client(m.Error(4, ErrorCode.UNAVAILABLE, "silent"))
    assert exchange.state is RequestState.ENDED


def test_an_append_whose_client_left_has_happened() -> None:
    exchange, out = make(APPEND, submitted=True), Outbox()
    exchange.abandon(out)
    exchange.answered(m.SeqAppended(9, 70, 12), 0.0, out)
    assert out == Outbox()
    assert exchange.state is RequestState.ENDED


def test_an_append_that_is_asked_again_says_how_long_the_sequence_was() -> None:
    exchange = make(APPEND, submitted=True)
    for _ in range(2):
        exchange.kernel_lost()
        exchange.kernel_back(7.0, out := Outbox())
        assert out == Outbox(kernel=[m.SeqAppend(9, 70, "echo", IDS, "alice", 9)])
        exchange.sent(out.kernel[0])


def test_an_append_that_reached_nobody_expects_nothing() -> None:
    """Somebody else may append meanwhile, as ever."""
    exchange, out = make(APPEND), Outbox()
    exchange.encoded(m.Encoded(9, IDS), INFO, 0.0, out)
    exchange.sent(out.kernel[0])
    exchange.answered(stats(70, 9), 0.0, Outbox())  # what it asks now is not sent: the microkernel has died
    exchange.kernel_lost()
    exchange.kernel_back(0.0, out := Outbox())
    assert out == Outbox(kernel=[m.SeqAppend(9, 70, "echo", IDS, "alice")])


def test_what_it_holds_to_ask_with_has_a_weight() -> None:
    exchange = make(SPAWN)
    empty = exchange.weight
    exchange.encode(m.Encode(9, "echo", "x" * 500, None), 500)
    assert exchange.weight == empty + 500
    exchange.encoded(m.Encoded(9, IDS), INFO, 0.0, Outbox())
    assert exchange.weight == empty + 12
