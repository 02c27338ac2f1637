"""Every event in every state of every kind of request, against the table in requests.py."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_world import model_info, usage

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
QUESTIONS: dict[str, Any] = {
    "generate": m.SeqSubmit(9, "echo", b"", PARAMS, "alice"),
    "continue": m.SeqContinue(9, 70, "echo", PARAMS, None, "alice"),
    "attach": m.SeqAttach(9, 70, "alice"),
    "spawn": m.SeqSpawn(9, "echo", b"", "alice"),
    "append": m.SeqAppend(9, 70, "echo", b"", "alice"),
    "tokenize": None,
}
STREAMS = ("generate", "continue", "attach")
DETACH, CANCEL = m.SeqDetach(70), m.SeqCancel(70, FinishReason.CANCELLED)
LOST = m.SeqCancel(70, FinishReason.TOKENIZER_FAILED)
CLOSE = m.DecodeClose(9)
GONE = m.Error(4, ErrorCode.UNAVAILABLE, "gone", None, None)
NO_RID = (m.Finished(4, 0, FinishReason.CANCELLED, "", m.Usage(0, 0, 0, 0, 0.0, 0.0)),)


def make(kind: str, state: str) -> Request:
    question = QUESTIONS[kind]
    request: Request
    if kind in STREAMS:
        request = Stream(9, b"client", 4, "" if kind == "attach" else "echo", question)
    else:
        request = Exchange(9, b"client", 4, "echo", question)
    if state == "encoding":
        return request
    if kind in ("continue", "attach"):
        assert isinstance(request, Stream)
        request.submit(Outbox())
    else:
        request.encoded(m.Encoded(9, pack_i32([1, 2])), INFO, 0.0, Outbox())
    if state == "orphaned":
        request.abandon(Outbox())
    elif state == "streaming":
        accept(request, Outbox())
    return request


def accept(request: Request, out: Outbox, end: m.SeqEnd | None = None) -> None:
    if isinstance(request, Stream) and not request.is_owner:
        request.answered(m.SeqAttached(9, 70, "echo", 2, PARAMS, b"", end), out)
    elif isinstance(request, Exchange) and isinstance(request.question, m.SeqAppend):
        request.answered(m.SeqAppended(9, 70, 12), out)
    else:
        request.answered(m.SeqAccepted(9, 70), out)


def fire(request: Request, event: str) -> Outbox:
    """Let one thing happen."""
    out = Outbox()
    if event == "answered":
        accept(request, out)
    elif event == "refused":
        request.refused(Unavailable("gone"), out)
    elif event == "fail":
        request.fail(Unavailable("gone"), out)
    elif event == "abandon":
        request.abandon(out)
    else:
        assert isinstance(request, Stream)
        if event == "cancel":
            request.cancel(out)
        elif event == "text_lost":
            request.text_lost(Unavailable("gone"), out)
        elif event == "replaced":
            request.replaced(out)
        elif event == "tokens":
            request.tokens(m.TokenEntry(70, 0, (10,)), out)
        else:
            assert event == "end"
            request.end(m.SeqEnd(70, FinishReason.LENGTH, usage(2, 0)), out)
    assert all(routing_id == b"client" for routing_id, _ in out.client)
    return out


def error(code: ErrorCode, text: str, rid: int | None, field: str | None = None) -> tuple[m.Message, ...]:
    return (m.Error(4, code, text, field, rid),)


# kinds | state before | event | state after | to the client | to the microkernel | only if nobody else reads | text | decode
OPEN = (m.DecodeOpen(9, "echo", ("END",)),)
FLUSH = (m.DecodeItem(9, (), True),)
TAKEN = error(ErrorCode.WRONG_STATE, "another reader took over", 70, "rid")
OTHERS = ("continue", "attach")
KNOWN = ("continue", "attach")  # their rid is known from the beginning
ACCEPTED = (m.Accepted(4, 70, "echo", 2),)
ROWS: list[tuple[Any, ...]] = [
    (("generate",), "encoding", "cancel", "ended", NO_RID, (), (), (), ()),
    (("generate",), "encoding", "text_lost", "encoding", (), (), (), (), ()),
    (("generate", "spawn", "append", "tokenize"), "encoding", "fail", "ended", (GONE,), (), (), (), ()),
    (("generate", "spawn", "append", "tokenize"), "encoding", "abandon", "ended", (), (), (), (), ()),
    (STREAMS, "submitted", "answered", "streaming", ACCEPTED, (), (), OPEN, ()),
    (("spawn",), "submitted", "answered", "ended", (m.Spawned(4, 70, "echo", 2),), (), (), (), ()),
    (("append",), "submitted", "answered", "ended", (m.Appended(4, 70, 12),), (), (), (), ()),
    (STREAMS, "submitted", "cancel", "submitted", (), (), (), (), ()),
    (STREAMS, "submitted", "text_lost", "submitted", (), (), (), (), ()),
    (STREAMS, "submitted", "tokens", "submitted", (), (), (), (), ()),
    (STREAMS, "submitted", "end", "submitted", (), (), (), (), ()),
    (STREAMS, "submitted", "replaced", "submitted", (), (), (), (), ()),
    (("generate", "spawn", "append"), "submitted", "refused", "ended", (GONE,), (), (), (), ()),
    (KNOWN, "submitted", "refused", "ended", error(ErrorCode.UNAVAILABLE, "gone", 70), (), (), (), ()),
    (("generate", "spawn", "append"), "submitted", "fail", "orphaned", (GONE,), (), (), (), ()),
    (KNOWN, "submitted", "fail", "orphaned", error(ErrorCode.UNAVAILABLE, "gone", 70), (), (), (), ()),
    ((*STREAMS, "spawn", "append"), "submitted", "abandon", "orphaned", (), (), (), (), ()),
    (STREAMS, "streaming", "tokens", "streaming", (), (), (), (), (m.DecodeItem(9, (10,), False),)),
    (STREAMS, "streaming", "end", "streaming", (), (), (), (), FLUSH),
    (STREAMS, "streaming", "replaced", "ended", TAKEN, (), (), (CLOSE,), ()),
    (STREAMS, "streaming", "cancel", "streaming", (), (CANCEL,), (), (), ()),
    (("generate",), "streaming", "text_lost", "streaming", (), (LOST,), (), (), ()),
    (OTHERS, "streaming", "text_lost", "ended", error(ErrorCode.UNAVAILABLE, "gone", 70), (), (DETACH,), (CLOSE,), ()),
    (STREAMS, "streaming", "refused", "ended", error(ErrorCode.UNAVAILABLE, "gone", 70), (), (), (CLOSE,), ()),
    (
        ("generate",),
        "streaming",
        "fail",
        "ended",
        error(ErrorCode.UNAVAILABLE, "gone", 70),
        (),
        (CANCEL,),
        (CLOSE,),
        (),
    ),
    (OTHERS, "streaming", "fail", "ended", error(ErrorCode.UNAVAILABLE, "gone", 70), (), (DETACH,), (CLOSE,), ()),
    (("generate",), "streaming", "abandon", "ended", (), (), (CANCEL,), (CLOSE,), ()),
    (OTHERS, "streaming", "abandon", "ended", (), (), (DETACH,), (CLOSE,), ()),
    (("generate",), "orphaned", "answered", "ended", (), (), (CANCEL,), (), ()),
    (OTHERS, "orphaned", "answered", "ended", (), (), (DETACH,), (), ()),
    (("spawn",), "orphaned", "answered", "ended", (), (m.Close(9, 70),), (), (), ()),
    (("append",), "orphaned", "answered", "ended", (), (), (), (), ()),
    ((*STREAMS, "spawn", "append"), "orphaned", "refused", "ended", (), (), (), (), ()),
    ((*STREAMS, "spawn", "append"), "orphaned", "fail", "orphaned", (), (), (), (), ()),
    ((*STREAMS, "spawn", "append"), "orphaned", "abandon", "orphaned", (), (), (), (), ()),
    (STREAMS, "orphaned", "cancel", "orphaned", (), (), (), (), ()),
    (STREAMS, "orphaned", "text_lost", "orphaned", (), (), (), (), ()),
    (STREAMS, "orphaned", "tokens", "orphaned", (), (), (), (), ()),
    (STREAMS, "orphaned", "end", "orphaned", (), (), (), (), ()),
    (STREAMS, "orphaned", "replaced", "orphaned", (), (), (), (), ()),
]
CASES = [(kind, *row[1:]) for row in ROWS for kind in row[0]]


@pytest.mark.parametrize(
    ("kind", "before", "event", "after", "client", "kernel", "leave", "text", "decode"),
    CASES,
    ids=[f"{case[0]}-{case[1]}-{case[2]}" for case in CASES],
)
def test_the_table(
    kind: str,
    before: str,
    event: str,
    after: str,
    client: tuple[m.Message, ...],
    kernel: tuple[m.Message, ...],
    leave: tuple[m.Message, ...],
    text: tuple[m.Message, ...],
    decode: tuple[m.DecodeItem, ...],
) -> None:
    request = make(kind, before)
    out = fire(request, event)
    assert request.state.value == after
    assert [message for _, message in out.client] == list(client)
    assert (out.kernel, out.leave) == (list(kernel), list(leave))
    assert (out.text, out.decode) == (list(text), list(decode))


@pytest.mark.parametrize(("kind", "before"), sorted({case[:2] for case in CASES}))
def test_whatever_follows_the_last_message_gives_nothing(kind: str, before: str) -> None:
    request = make(kind, before)
    request.refused(NotFound("no"), Outbox())
    events = ["refused", "fail", "abandon"]
    events += ["cancel", "text_lost", "replaced", "tokens", "end"] if kind in STREAMS else []
    for event in events:
        assert fire(request, event) == Outbox()
    assert request.state is RequestState.ENDED


def test_every_state_has_its_transitions_and_ended_is_final() -> None:
    assert set(TRANSITIONS) == set(RequestState)
    assert TRANSITIONS[RequestState.ENDED] == frozenset()
    seen = {(before, after) for _, before, _, after, *_ in CASES if before != after}
    # a question without a prompt, or with one that is encoded: the tests of streams and exchanges
    seen.add(("encoding", "submitted"))
    assert seen == {(before.value, after.value) for before, afters in TRANSITIONS.items() for after in afters}
