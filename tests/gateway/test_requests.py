"""Every event in every state of every kind of request, against the table in requests.py."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_world import model_info, usage
from stream_events import stats

from llmos.codes import ErrorCode, FinishReason
from llmos.errors import NotFound, Unavailable
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.exchanges import Exchange
from llmos.services.gateway.requests import TRANSITIONS, Outbox, Request, RequestState
from llmos.services.gateway.streams import Stream

INFO = model_info()
PARAMS = SamplingParams(max_tokens=8, stop=("END",))
IDS = pack_i32([1, 2])
TEXT = m.Encode(9, "echo", "ab", None)
SUBMIT = m.SeqSubmit(9, "echo", IDS, PARAMS, "alice", "k")
SPAWN = m.SeqSpawn(9, "echo", IDS, "alice", client_request_id="k")
APPEND = m.SeqAppend(9, 70, "echo", IDS, "alice")
CONTINUE = m.SeqContinue(9, 70, "echo", PARAMS, None, "alice")
ATTACH = m.SeqAttach(9, 70, "alice")
STAT = m.Stat(9, 70, "alice")
WANTED: dict[str, Any] = {
    "generate": SUBMIT,
    "durable": SUBMIT,  # under the client's own id
    "continue": CONTINUE,
    "attach": ATTACH,
    "spawn": SPAWN,
    "append": APPEND,
    "tokenize": None,
}
STREAMS = ("generate", "durable", "continue", "attach")
SUBMITS = ("generate", "durable")
OTHERS = ("durable", "continue", "attach")  # their sequences outlive them
KNOWN = ("continue", "attach")  # their rid is known from the beginning
MAKES = (*SUBMITS, "spawn")
WITH_TEXT = (*MAKES, "append", "tokenize")
ASKING = (*STREAMS, "spawn", "append")


def make(kind: str, state: str) -> Request:
    """`held`: submitted, but no microkernel was there. `measuring`: only Stat was asked. `cutting`: resuming because its end is known
    and its output too long. `waiting`: streaming, but it is not its turn at the tokenizer.
    """
    wanted = WANTED[kind]
    request: Request
    if kind in STREAMS:
        model = "" if kind == "attach" else "echo"
        request = Stream(9, b"client", 4, model, wanted, is_durable=kind == "durable")
    else:
        request = Exchange(9, b"client", 4, "echo", wanted)
    if kind in WITH_TEXT:
        request.encode(TEXT, 2)
    if state == "encoding":
        request.take_turn(Outbox())
        return request
    out = Outbox()
    if kind in KNOWN:
        assert isinstance(request, Stream)
        request.submit(0.0, out)
    else:
        request.encoded(m.Encoded(9, IDS), INFO, 0.0, out)
    if state == "held":
        return request
    request.sent(out.kernel[-1])
    if state == "measuring":
        return request
    if out.kernel[-1] == STAT:
        request.answered(stats(70, 2), 0.0, out)
        request.sent(out.kernel[-1])
    if state == "orphaned":
        request.abandon(Outbox())
    elif state != "submitted":
        accept(request, Outbox())
        assert isinstance(request, Stream)
        stream_to(request, state)
    return request


def stream_to(stream: Stream, state: str) -> None:
    if state != "waiting":
        stream.take_turn(Outbox())
    if state == "resuming":
        stream.kernel_lost()
    elif state in ("ending", "cutting"):
        stream.tokens(m.TokenEntry(70, 0, (10, 11)), Outbox())
        fire(stream, "end")
        if state == "cutting":
            stream.decoded(m.DecodedItem(9, "a", 1, "END"), Outbox())


def accept(request: Request, out: Outbox, *output: int, end: m.SeqEnd | None = None) -> None:
    """The microkernel's answer, to one that resumes with its output so far."""
    if request.state is RequestState.RESUMING or (isinstance(request, Stream) and request.rid):
        request.answered(m.SeqAttached(9, 70, "echo", 2, PARAMS, pack_i32(output), end), 0.0, out)
    elif isinstance(request, Exchange) and isinstance(request._question.wanted, m.SeqAppend):  # type: ignore[union-attr]
        request.answered(m.SeqAppended(9, 70, 12), 0.0, out)
    else:
        request.answered(m.SeqAccepted(9, 70), 0.0, out)


def fire(request: Request, event: str) -> Outbox:
    """Let one thing happen."""
    out, gone = Outbox(), Unavailable("gone")
    if event == "answered":
        accept(request, out)
    elif event == "attached":
        accept(request, out, 10)
    elif event == "cut":  # the microkernel has dropped what is after the stop string
        accept(request, out, 10, end=m.SeqEnd(70, FinishReason.STOP, usage(2, 1)))
    elif event == "uncut" or event == "ended":
        accept(request, out, 10, 11, end=m.SeqEnd(70, FinishReason.LENGTH, usage(2, 2)))
    elif event == "known":
        request.answered(m.SeqAccepted(9, 70, existing=True), 0.0, out)
    elif event == "measured":
        request.answered(stats(70, 2), 0.0, out)
    elif event in ("refused", "fail", "text_failed"):
        getattr(request, event)(gone, out)
    elif event == "unknown":
        request.refused(NotFound("no sequence 70", field="rid", rid=70), out)
    elif event == "kernel_back":
        request.kernel_back(0.0, out)
    elif event in ("kernel_lost", "text_lost"):
        getattr(request, event)()
    elif event == "tokens":
        request.tokens(m.TokenEntry(70, 0, (10,)), out)  # type: ignore[attr-defined]
    elif event == "gap":
        request.tokens(m.TokenEntry(70, 1, (11,)), out)  # type: ignore[attr-defined]
    elif event in ("end", "early end"):
        received = request._feed.received  # type: ignore[attr-defined]
        end = m.SeqEnd(70, FinishReason.LENGTH, usage(2, received + (event == "early end")))
        request.end(end, out)  # type: ignore[attr-defined]
    else:
        getattr(request, {"turn": "take_turn"}.get(event, event))(out)
    assert all(routing_id == b"client" for routing_id, _ in out.client)
    return out


def error(code: ErrorCode, text: str, rid: int | None, field: str | None = None) -> m.Message:
    return m.Error(4, code, text, field, rid)


def finished(reason: FinishReason, output: int = 2, stop: str | None = None) -> m.Message:
    return m.Finished(4, 70, reason, "", usage(2, output), stop)


GONE = error(ErrorCode.UNAVAILABLE, "gone", None)
GONE_70 = error(ErrorCode.UNAVAILABLE, "gone", 70)
LOST_70 = error(ErrorCode.UNAVAILABLE, "sequence 70 was lost with the microkernel", 70)
TAKEN = error(ErrorCode.WRONG_STATE, "another reader took over", 70, "rid")
CANCELLED = m.Finished(4, 0, FinishReason.CANCELLED, "", m.Usage(0, 0, 0, 0, 0.0, 0.0))
ACCEPTED = m.Accepted(4, 70, "echo", 2)
CANCEL, FAILED = m.SeqCancel(70, FinishReason.CANCELLED), m.SeqCancel(70, FinishReason.TOKENIZER_FAILED)
DETACH, FINISH = m.SeqDetach(70), m.SeqFinish(70, 1)
OPEN, CLOSE = m.DecodeOpen(9, "echo", ("END",)), m.DecodeClose(9)


def item(*ids: int) -> m.DecodeItem:
    return m.DecodeItem(9, ids, final=not ids)


# kinds | state before | event | state after | what comes out, besides nothing
ROWS: list[tuple[tuple[str, ...], str, str, str, dict[str, Any]]] = [
    # -- encoding
    (WITH_TEXT, "encoding", "turn", "encoding", {"text": [TEXT]}),
    (WITH_TEXT, "encoding", "text_lost", "encoding", {}),
    (WITH_TEXT, "encoding", "text_failed", "ended", {"client": [GONE]}),
    (WITH_TEXT, "encoding", "kernel_lost", "encoding", {}),
    (WITH_TEXT, "encoding", "kernel_back", "encoding", {}),
    (WITH_TEXT, "encoding", "fail", "ended", {"client": [GONE]}),
    (WITH_TEXT, "encoding", "abandon", "ended", {}),
    (SUBMITS, "encoding", "cancel", "ended", {"client": [CANCELLED]}),
    # -- submitted, to nobody yet
    (SUBMITS, "held", "kernel_back", "submitted", {"kernel": [SUBMIT]}),
    (("spawn",), "held", "kernel_back", "submitted", {"kernel": [SPAWN]}),
    (("append", "continue"), "held", "kernel_back", "submitted", {"kernel": [STAT]}),
    (("attach",), "held", "kernel_back", "submitted", {"kernel": [ATTACH]}),
    (MAKES, "held", "fail", "ended", {"client": [GONE]}),
    (ASKING, "held", "abandon", "ended", {}),
    # -- only the length was asked for
    (("append",), "measuring", "measured", "submitted", {"kernel": [APPEND]}),
    (("continue",), "measuring", "measured", "submitted", {"kernel": [CONTINUE]}),
    (("append", "continue"), "measuring", "kernel_lost", "submitted", {}),
    (("append", "continue"), "measuring", "kernel_back", "submitted", {"kernel": [STAT]}),
    (("append", "continue"), "measuring", "abandon", "ended", {}),
    # -- submitted
    (STREAMS, "submitted", "answered", "streaming", {"client": [ACCEPTED]}),
    (("spawn",), "submitted", "answered", "ended", {"client": [m.Spawned(4, 70, "echo", 2)]}),
    (("append",), "submitted", "answered", "ended", {"client": [m.Appended(4, 70, 12)]}),
    (SUBMITS, "submitted", "known", "submitted", {"kernel": [ATTACH]}),
    (("spawn",), "submitted", "known", "ended", {"client": [m.Spawned(4, 70, "echo", 2)]}),
    (STREAMS, "submitted", "cancel", "submitted", {}),
    (STREAMS, "submitted", "tokens", "submitted", {}),
    (STREAMS, "submitted", "end", "submitted", {}),
    (STREAMS, "submitted", "replaced", "submitted", {}),
    (ASKING, "submitted", "text_lost", "submitted", {}),
    (ASKING, "submitted", "kernel_lost", "submitted", {}),
    (SUBMITS, "submitted", "kernel_back", "submitted", {"kernel": [SUBMIT]}),
    (("spawn",), "submitted", "kernel_back", "submitted", {"kernel": [SPAWN]}),
    (("append",), "submitted", "kernel_back", "submitted", {"kernel": [m.SeqAppend(9, 70, "echo", IDS, "alice", 2)]}),
    (
        ("continue",),
        "submitted",
        "kernel_back",
        "submitted",
        {"kernel": [m.SeqContinue(9, 70, "echo", PARAMS, None, "alice", 2)]},
    ),
    (("attach",), "submitted", "kernel_back", "submitted", {"kernel": [ATTACH]}),
    ((*MAKES, "append"), "submitted", "refused", "ended", {"client": [GONE]}),
    (KNOWN, "submitted", "refused", "ended", {"client": [GONE_70]}),
    ((*MAKES, "append"), "submitted", "fail", "orphaned", {"client": [GONE]}),
    (KNOWN, "submitted", "fail", "orphaned", {"client": [GONE_70]}),
    (ASKING, "submitted", "abandon", "orphaned", {}),
    # -- streaming
    (STREAMS, "waiting", "turn", "streaming", {"text": [OPEN]}),
    (STREAMS, "waiting", "tokens", "streaming", {}),
    (STREAMS, "waiting", "end", "streaming", {}),
    (("generate",), "waiting", "abandon", "ended", {"leave": [CANCEL]}),
    (OTHERS, "waiting", "abandon", "ended", {"leave": [DETACH]}),
    (SUBMITS, "waiting", "text_failed", "streaming", {"kernel": [FAILED]}),
    (KNOWN, "waiting", "text_failed", "ended", {"client": [GONE_70], "leave": [DETACH]}),
    (STREAMS, "streaming", "tokens", "streaming", {"decode": [item(10)]}),
    (STREAMS, "streaming", "gap", "resuming", {"kernel": [ATTACH]}),
    (STREAMS, "streaming", "end", "streaming", {"decode": [item()]}),
    (STREAMS, "streaming", "early end", "resuming", {"kernel": [ATTACH]}),
    (STREAMS, "streaming", "replaced", "ended", {"client": [TAKEN], "text": [CLOSE]}),
    (STREAMS, "streaming", "cancel", "streaming", {"kernel": [CANCEL]}),
    (STREAMS, "streaming", "kernel_lost", "resuming", {}),
    (STREAMS, "streaming", "text_lost", "streaming", {}),
    (SUBMITS, "streaming", "text_failed", "streaming", {"kernel": [FAILED], "text": [CLOSE]}),
    (KNOWN, "streaming", "text_failed", "ended", {"client": [GONE_70], "leave": [DETACH], "text": [CLOSE]}),
    (STREAMS, "streaming", "refused", "ended", {"client": [GONE_70], "text": [CLOSE]}),
    (("generate",), "streaming", "fail", "ended", {"client": [GONE_70], "leave": [CANCEL], "text": [CLOSE]}),
    (OTHERS, "streaming", "fail", "ended", {"client": [GONE_70], "leave": [DETACH], "text": [CLOSE]}),
    (("generate",), "streaming", "abandon", "ended", {"leave": [CANCEL], "text": [CLOSE]}),
    (OTHERS, "streaming", "abandon", "ended", {"leave": [DETACH], "text": [CLOSE]}),
    # -- streaming, and the end is known
    (STREAMS, "ending", "kernel_lost", "streaming", {}),
    (STREAMS, "ending", "kernel_back", "streaming", {}),
    (STREAMS, "ending", "text_lost", "streaming", {}),
    (STREAMS, "ending", "turn", "streaming", {"text": [OPEN], "decode": [item(10, 11), item()]}),
    (STREAMS, "ending", "cancel", "streaming", {}),
    (STREAMS, "ending", "replaced", "streaming", {}),
    (
        SUBMITS,
        "ending",
        "text_failed",
        "ended",
        {"client": [finished(FinishReason.TOKENIZER_FAILED)], "text": [CLOSE]},
    ),
    (KNOWN, "ending", "text_failed", "ended", {"client": [GONE_70], "text": [CLOSE]}),
    (STREAMS, "ending", "abandon", "ended", {"text": [CLOSE]}),
    # -- resuming
    (STREAMS, "resuming", "tokens", "resuming", {}),
    (STREAMS, "resuming", "gap", "resuming", {}),
    (STREAMS, "resuming", "end", "resuming", {}),
    (STREAMS, "resuming", "replaced", "resuming", {}),
    (STREAMS, "resuming", "cancel", "resuming", {}),
    (STREAMS, "resuming", "kernel_lost", "resuming", {}),
    (STREAMS, "resuming", "kernel_back", "resuming", {"kernel": [ATTACH]}),
    (STREAMS, "resuming", "attached", "streaming", {"decode": [item(10)]}),
    (STREAMS, "resuming", "ended", "streaming", {"decode": [item(10, 11), item()]}),
    (STREAMS, "resuming", "text_lost", "resuming", {}),
    (STREAMS, "resuming", "turn", "resuming", {"text": [OPEN]}),
    (SUBMITS, "resuming", "text_failed", "resuming", {"text": [CLOSE]}),
    (KNOWN, "resuming", "text_failed", "orphaned", {"client": [GONE_70], "text": [CLOSE]}),
    (STREAMS, "resuming", "unknown", "ended", {"client": [LOST_70], "text": [CLOSE]}),
    (STREAMS, "resuming", "refused", "ended", {"client": [GONE_70], "text": [CLOSE]}),
    (STREAMS, "resuming", "fail", "orphaned", {"client": [GONE_70], "text": [CLOSE]}),
    (STREAMS, "resuming", "abandon", "orphaned", {"text": [CLOSE]}),
    # -- resuming because the output is too long
    (KNOWN, "cutting", "cut", "ended", {"client": [finished(FinishReason.STOP, 1, "END")]}),
    (KNOWN, "cutting", "uncut", "resuming", {"kernel": [FINISH, ATTACH]}),
    (KNOWN, "cutting", "unknown", "ended", {"client": [finished(FinishReason.STOP, 1, "END")]}),
    (KNOWN, "cutting", "fail", "ended", {"client": [finished(FinishReason.STOP, 1, "END")]}),
    (KNOWN, "cutting", "cancel", "resuming", {}),
    (KNOWN, "cutting", "text_lost", "resuming", {}),
    (KNOWN, "cutting", "kernel_lost", "resuming", {}),
    (KNOWN, "cutting", "kernel_back", "resuming", {"kernel": [ATTACH]}),
    (KNOWN, "cutting", "abandon", "orphaned", {}),
    # -- orphaned
    (("generate",), "orphaned", "answered", "ended", {"leave": [CANCEL]}),
    (OTHERS, "orphaned", "answered", "ended", {"leave": [DETACH]}),
    (("generate",), "orphaned", "known", "orphaned", {"kernel": [ATTACH]}),
    (("durable",), "orphaned", "known", "ended", {}),
    (KNOWN, "orphaned", "ended", "ended", {}),
    (("spawn",), "orphaned", "answered", "ended", {"kernel": [m.Close(9, 70)]}),
    (("spawn",), "orphaned", "known", "ended", {"kernel": [m.Close(9, 70)]}),
    (("append",), "orphaned", "answered", "ended", {}),
    (("append", "continue"), "orphaned", "measured", "ended", {}),
    (ASKING, "orphaned", "refused", "ended", {}),
    (ASKING, "orphaned", "fail", "orphaned", {}),
    (ASKING, "orphaned", "abandon", "orphaned", {}),
    (STREAMS, "orphaned", "cancel", "orphaned", {}),
    (STREAMS, "orphaned", "tokens", "orphaned", {}),
    (STREAMS, "orphaned", "end", "orphaned", {}),
    (STREAMS, "orphaned", "replaced", "orphaned", {}),
    (ASKING, "orphaned", "kernel_lost", "orphaned", {}),
    (SUBMITS, "orphaned", "kernel_back", "orphaned", {"kernel": [SUBMIT]}),
    (("spawn",), "orphaned", "kernel_back", "orphaned", {"kernel": [SPAWN]}),
    (("append",), "orphaned", "kernel_back", "orphaned", {"kernel": [m.SeqAppend(9, 70, "echo", IDS, "alice", 2)]}),
    (
        ("continue",),
        "orphaned",
        "kernel_back",
        "orphaned",
        {"kernel": [m.SeqContinue(9, 70, "echo", PARAMS, None, "alice", 2)]},
    ),
    (("attach",), "orphaned", "kernel_back", "orphaned", {"kernel": [ATTACH]}),
]
CASES = [(kind, *row[1:]) for row in ROWS for kind in row[0]]
REAL = {
    "held": "submitted",
    "measuring": "submitted",
    "waiting": "streaming",
    "ending": "streaming",
    "cutting": "resuming",
}


@pytest.mark.parametrize(
    ("kind", "before", "event", "after", "expected"), CASES, ids=[f"{case[0]}-{case[1]}-{case[2]}" for case in CASES]
)
def test_the_table(kind: str, before: str, event: str, after: str, expected: dict[str, Any]) -> None:
    request = make(kind, before)
    assert request.state.value == REAL.get(before, before)
    out = fire(request, event)
    assert request.state.value == after
    got = {"client": [message for _, message in out.client], "kernel": out.kernel, "leave": out.leave}
    got |= {"text": out.text, "decode": out.decode}
    assert {name: messages for name, messages in got.items() if messages} == expected


@pytest.mark.parametrize(("kind", "before"), sorted({case[:2] for case in CASES}))
def test_whatever_follows_the_last_message_gives_nothing(kind: str, before: str) -> None:
    request = make(kind, before)
    request.refused(NotFound("no"), Outbox())
    assert request.state is RequestState.ENDED
    assert not request.wants_text
    assert not request.is_behind
    events = ["refused", "fail", "abandon", "text_failed", "text_lost", "kernel_lost", "kernel_back"]
    events += ["cancel", "replaced", "tokens", "gap", "end"] if kind in STREAMS else []
    for event in events:
        assert fire(request, event) == Outbox()
    assert request.state is RequestState.ENDED


def test_every_state_has_its_transitions_and_ended_is_final() -> None:
    assert set(TRANSITIONS) == set(RequestState)
    assert TRANSITIONS[RequestState.ENDED] == frozenset()
    pairs = {(REAL.get(case[1], case[1]), case[3]) for case in CASES}
    seen = {pair for pair in pairs if pair[0] != pair[1]}
    # a question without a prompt, or with one that is encoded: the tests of streams and exchanges
    seen.add(("encoding", "submitted"))
    assert seen == {(before.value, after.value) for before, afters in TRANSITIONS.items() for after in afters}


LOSSES = ("kernel_lost", "kernel_back", "text_lost")


@pytest.mark.parametrize(("kind", "before"), sorted({case[:2] for case in CASES}))
def test_a_service_that_is_lost_twice_changes_no_more_than_one_that_is_lost_once(kind: str, before: str) -> None:
    once, twice = make(kind, before), make(kind, before)
    said = [fire(once, event) for event in LOSSES]
    for _ in range(2):
        again = [fire(twice, event) for event in LOSSES]
    assert again == said
    assert (twice.state, twice.has_turn) == (once.state, once.has_turn)
    assert twice.strikes == once.strikes  # the second tokenizer owed it nothing
    assert not any(out.client for out in said)
