"""Spawn, Append, Continue and Attach through the router, and what becomes of them when a service fails or the client leaves."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_world import model_info, usage
from router_world import World
from stream_events import stats

from llmos.codes import ErrorCode, FinishReason
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.router import ANSWER_TIMEOUT_S
from llmos.services.gateway.validate import complete_params


def test_spawn_of_each_form() -> None:
    world = World()
    world.client(b"a", m.Spawn(1, None, nice=2, parent=7, after=(5, 6), client_request_id="k"))
    assert world.kernel == [m.SeqSpawn(1, "echo", b"", "root", 2, 7, (5, 6), "k")]
    world.client(b"a", m.Spawn(2, None, token_ids=pack_i32([1, 2])))
    assert world.kernel[-1] == m.SeqSpawn(2, "echo", pack_i32([1, 2]), "root", client_request_id="gw-2")
    world.client(b"a", m.Spawn(3, None, text="ab"))
    world.client(b"a", m.Spawn(4, None, messages=(m.ChatMessage("user", "hi"),)))
    world.client(b"a", m.Spawn(5, None, text=""))
    assert world.text == [
        m.Encode(3, "echo", "ab", None),
        m.Encode(4, "echo", None, (m.ChatMessage("user", "hi"),)),
        m.Encode(5, "echo", "", None),
    ]
    world.router.on_text(m.Encoded(3, pack_i32([97, 98])), 0.0)
    assert world.kernel[-1] == m.SeqSpawn(3, "echo", pack_i32([97, 98]), "root", client_request_id="gw-3")
    world.from_kernel(m.SeqAccepted(3, 500))
    assert world.listener.sent[b"a"] == [m.Spawned(3, 500, "echo", 2)]
    assert len(world.router) == 4


def test_append_continues_the_text_under_its_owners_name() -> None:
    world = World()
    world.client(b"a", m.Append(1, 500, "echo", "ab", None), uid=987_654)
    assert world.text == [m.Encode(1, "echo", "ab", None, continues=True)]
    world.router.on_text(m.Encoded(1, pack_i32([97, 98])), 0.0)
    assert world.kernel == [m.Stat(1, 500, "uid:987654")]
    world.measured(1)
    assert world.kernel[1:] == [m.SeqAppend(1, 500, "echo", pack_i32([97, 98]), "uid:987654")]
    world.client(b"b", m.Append(1, 500, "echo", None, pack_i32([99])), uid=0)
    world.measured(2)
    assert world.kernel[-1] == m.SeqAppend(2, 500, "echo", pack_i32([99]), None)
    world.from_kernel(m.SeqAppended(2, 500, 12))
    world.from_kernel(m.Error(1, ErrorCode.CONTEXT_TOO_LONG, "600 tokens, the limit is 512", "tokens", 500))
    assert world.listener.sent[b"b"] == [m.Appended(1, 500, 12)]
    assert world.listener.sent[b"a"] == [
        m.Error(1, ErrorCode.CONTEXT_TOO_LONG, "600 tokens, the limit is 512", "prompt", 500)
    ]
    assert len(world.router) == 0


def test_continue_is_complete_and_streams() -> None:
    world = World()
    params = SamplingParams(top_k=3, max_tokens=9)
    world.client(b"a", m.Continue(1, 500, "echo", params, 250.0), uid=987_654)
    complete = complete_params(params, model_info())
    world.measured(1)
    assert world.kernel[1:] == [m.SeqContinue(1, 500, "echo", complete, 250.0, "uid:987654")]
    world.attached(1)
    world.step((500, 0, (65,)))
    world.router.on_text(m.Decoded((m.DecodedItem(1, "A", 1),)), 0.0)
    world.step(ends=(m.SeqEnd(500, FinishReason.LENGTH, usage(2, 1)),))
    assert world.text[-1] == m.DecodeStep((m.DecodeItem(1, (), True),))
    world.client(b"a", m.Continue(2, 500, "echo", params), uid=987_654)  # before the text of the first is out
    world.measured(2)
    world.attached(2)
    world.step((500, 0, (66,)))
    world.router.on_text(m.Decoded((m.DecodedItem(1, "", 0, final=True), m.DecodedItem(2, "B", 1))), 0.0)
    assert world.listener.sent[b"a"] == [
        m.Accepted(1, 500, "echo", 2),
        m.Tokens(1, 0, (65,), "A"),
        m.Accepted(2, 500, "echo", 2),
        m.Finished(1, 500, FinishReason.LENGTH, "", usage(2, 1)),
        m.Tokens(2, 0, (66,), "B"),
    ]


def test_attach_names_its_owner_and_shows_the_rest() -> None:
    world = World()
    number = world.attach(offset=1, uid=987_654)
    assert world.kernel == [m.SeqAttach(number, 500, "uid:987654")]
    world.attached(number, 65, 66)
    assert world.text == [
        m.DecodeOpen(number, "echo", ()),
        m.DecodeStep((m.DecodeItem(number, (65,), False), m.DecodeItem(number, (66,), False))),
    ]
    world.router.on_text(m.Decoded((m.DecodedItem(number, "A", 1), m.DecodedItem(number, "B", 1))), 0.0)
    assert world.listener.sent[b"a"] == [m.Accepted(1, 500, "echo", 2), m.Tokens(1, 1, (66,), "B")]


BAD: list[tuple[Any, int, str]] = [
    (m.Attach(1, 0), ErrorCode.INVALID_REQUEST, "rid"),
    (m.Attach(1, 500, -1), ErrorCode.INVALID_REQUEST, "offset"),
    (m.Append(1, 500, "echo", "", None), ErrorCode.INVALID_REQUEST, "prompt"),
    (m.Append(1, 500, "nope", "x", None), ErrorCode.NOT_FOUND, "model"),
    (m.Append(1, 500, "echo", None, pack_i32([256])), ErrorCode.INVALID_REQUEST, "prompt"),
    (m.Continue(1, -5, "echo", SamplingParams()), ErrorCode.INVALID_REQUEST, "rid"),
    (m.Continue(1, 500, "echo", SamplingParams(top_p=2.0)), ErrorCode.INVALID_REQUEST, "top_p"),
    (m.Spawn(1, None, text="x", token_ids=b"abcd"), ErrorCode.INVALID_REQUEST, "prompt"),
    (m.Spawn(1, None, after=(5, 5)), ErrorCode.INVALID_REQUEST, "after"),
    (m.Spawn(1, None, nice=-1), ErrorCode.PERMISSION, "nice"),
]


@pytest.mark.parametrize(("message", "code", "field"), BAD)
def test_what_is_refused_here_reaches_nobody(message: Any, code: int, field: str) -> None:
    world = World()
    world.client(b"a", message, uid=987_654)
    (error,) = world.listener.sent[b"a"]
    assert isinstance(error, m.Error)
    assert (error.req, error.code, error.field) == (1, code, field)
    assert (world.kernel, world.text, len(world.router)) == ([], [], 0)


QUESTIONS: list[Any] = [
    m.Spawn(1, None),
    m.Append(1, 500, "echo", None, pack_i32([65])),
    m.Continue(1, 500, "echo", SamplingParams()),
    m.Attach(1, 500),
]


def asked(world: World, message: Any) -> int:
    """The microkernel was asked; returns how many messages that took."""
    world.client(b"a", message)
    if isinstance(world.kernel[-1], m.Stat):
        world.measured(world.kernel[-1].req)
    return len(world.kernel)


@pytest.mark.parametrize("message", QUESTIONS, ids=lambda message: type(message).__name__)
def test_questions_fail_with_the_microkernel(message: Any) -> None:
    refused = m.Error(1, ErrorCode.WRONG_STATE, "sequence 500 is generating", "rid", 500)
    for happen in (
        lambda world: world.from_kernel(refused),
        lambda world: world.router.tick(ANSWER_TIMEOUT_S),
    ):
        world = World()
        before = asked(world, message)
        happen(world)
        (error,) = world.listener.sent[b"a"]
        assert isinstance(error, m.Error)
        assert (error.req, error.code) in ((1, ErrorCode.WRONG_STATE), (1, ErrorCode.UNAVAILABLE))
        assert len(world.kernel) == before
        world.client(b"a", message)  # the number is free again
        assert len(world.listener.sent[b"a"]) == 1


@pytest.mark.parametrize(
    ("message", "answer", "given_back"),
    [
        (QUESTIONS[0], m.SeqAccepted(1, 501), [m.Close(1, 501)]),
        (QUESTIONS[1], m.SeqAppended(1, 500, 12), []),
        (QUESTIONS[2], m.SeqAttached(1, 500, "echo", 2, SamplingParams(), b""), [m.SeqDetach(500)]),
        (QUESTIONS[3], m.SeqAttached(1, 500, "echo", 2, SamplingParams(), b""), [m.SeqDetach(500)]),
    ],
    ids=["Spawn", "Append", "Continue", "Attach"],
)
def test_what_is_granted_to_a_client_that_left_is_given_back(
    message: Any, answer: m.Message, given_back: list[m.Message]
) -> None:
    world = World()
    before = asked(world, message)
    world.leave(b"a")
    assert len(world.kernel) == before
    world.from_kernel(answer)
    assert world.kernel[before:] == given_back
    assert len(world.router) == 0
    world.from_kernel(m.Done(1, 501))  # the answer to a Close
    assert len(world.kernel) == before + len(given_back)


def test_who_leaves_a_continue_or_attach_only_detaches() -> None:
    world = World()
    number = world.attach()
    world.attached(number, 65)
    world.leave(b"a")
    assert world.kernel[1:] == [m.SeqDetach(500)]
    assert world.text[-1] == m.DecodeClose(number)
    world.step((500, 1, (66,)))  # was on its way
    assert len(world.router) == 0


def test_an_explicit_cancel_ends_what_it_reads() -> None:
    world = World()
    world.attached(world.attach(), 65)
    world.client(b"a", m.Cancel(1))
    assert world.kernel[1:] == [m.SeqCancel(500, FinishReason.CANCELLED)]
    world.leave(b"a")
    assert len(world.kernel) == 2


def test_cancel_and_ack_mean_nothing_to_what_is_no_stream() -> None:
    world = World()
    world.client(b"a", m.Spawn(1, None))
    world.client(b"a", m.Cancel(1))
    world.client(b"a", m.Ack(1, 5))
    world.from_kernel(m.SeqAccepted(1, 500))
    assert world.listener.sent[b"a"] == [m.Spawned(1, 500, "echo", 0)]
    assert len(world.kernel) == 1


# ---------------------------------------------------------------- services that refuse


def test_a_stream_that_the_tokenizer_does_not_know_is_unavailable() -> None:
    world = World()
    number = world.attach()
    world.attached(number, 65)
    world.router.on_text(m.Error(number, ErrorCode.NOT_FOUND, f"no stream {number}", "stream"), 0.0)
    assert world.listener.sent[b"a"][-1] == m.Error(
        1, ErrorCode.UNAVAILABLE, f"the tokenizer can not go on with the text: no stream {number}", None, 500
    )


def test_an_error_about_a_sequence_fails_its_reader() -> None:
    world = World()
    world.attached(world.attach())
    world.from_kernel(m.Error(0, ErrorCode.INVALID_REQUEST, "upto 9 is outside [0, 1]", "upto", 500))
    assert world.errors() == [(1, ErrorCode.INVALID_REQUEST)]
    assert world.kernel[1:] == [m.SeqDetach(500)]


def test_answers_that_nobody_asked_for_are_ignored() -> None:
    world = World()
    world.from_kernel(m.SeqAccepted(77, 500))
    world.from_kernel(m.SeqAppended(77, 500, 1))
    world.from_kernel(m.PsReply(77, ()))
    world.from_kernel(stats(500, 3, 77))
    world.from_kernel(m.Error(77, ErrorCode.NOT_FOUND, "no sequence 500", "rid", 500))
    assert (world.kernel, world.listener.sent) == ([], {})
