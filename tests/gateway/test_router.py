"""Routing between clients, tokenizer and microkernel, without sockets: clients that leave, clients that do not read, services that
refuse or are silent. Services that die: test_router_losses.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from router_world import World

from llmos.codes import ErrorCode, FinishReason
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway import clients as clients_module
from llmos.services.gateway.router import ANSWER_TIMEOUT_S


def test_what_a_request_asks_of_the_scheduler_travels_to_the_microkernel() -> None:
    world = World()
    world.generate(nice=-20, deadline_ms=1500.0, parent=7, after=(5, 6))
    world.client(b"a", m.Generate(2, None, "ab", None, None, SamplingParams(), "k", 5, 400.0), now=10.0)
    encode = world.text[-1]
    assert isinstance(encode, m.Encode)
    world.router.on_text(m.Encoded(encode.req, pack_i32([65, 66])), 10.25)
    submits = [message for message in world.kernel if isinstance(message, m.SeqSubmit)]
    keys = [(s.client_request_id, s.nice, s.deadline_ms) for s in submits]
    assert keys == [("gw-1", -20, 1500.0), ("k", 5, 150.0)]
    assert [(s.parent, s.after) for s in submits] == [(7, (5, 6)), (None, ())]


def test_below_zero_is_for_administrators() -> None:
    world = World()
    request = m.Generate(1, None, None, pack_i32([65]), None, SamplingParams(), nice=-1)
    world.client(b"a", request, uid=987_654)
    assert world.errors() == [(1, ErrorCode.PERMISSION)]
    assert world.kernel == []
    world.client(b"root", request, uid=0)
    (submit,) = world.kernel
    assert isinstance(submit, m.SeqSubmit)
    assert (submit.owner, submit.nice) == ("root", -1)


def test_one_decode_step_per_batch() -> None:
    world = World()
    world.stream(req=1, rid=500)
    world.stream(req=2, rid=501)
    before = len(world.text)
    world.step((500, 0, (65,)), (501, 0, (66, 67)), (999, 0, (1,)))
    (step,) = world.text[before:]
    assert isinstance(step, m.DecodeStep)
    assert [item.ids for item in step.items] == [(65,), (66, 67)]


def test_a_client_that_left_is_found_at_the_next_send() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.stream(b"a", 2, 501)
    world.stream(b"b", 1, 502)
    world.listener.gone.add(b"a")
    stream = world.text[0]
    assert isinstance(stream, m.DecodeOpen)
    world.step((500, 0, (65,)))
    world.router.on_text(m.Decoded((m.DecodedItem(stream.stream, "A", 1),)), 0.0)
    cancels = [message for message in world.kernel if isinstance(message, m.SeqCancel)]
    assert cancels == [m.SeqCancel(500, FinishReason.CANCELLED), m.SeqCancel(501, FinishReason.CANCELLED)]
    assert len(world.router) == 1
    assert b"a" not in world.listener.core.peers
    assert b"b" in world.listener.core.peers


def test_a_probe_finds_clients_that_left_without_a_word() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.stream(b"b", 1, 501)
    world.listener.gone.add(b"a")
    world.table.probe()
    assert m.SeqCancel(500, FinishReason.CANCELLED) in world.kernel
    assert list(world.listener.core.peers) == [b"b"]
    assert isinstance(world.listener.sent[b"b"][-1], m.Welcome)


def test_a_sequence_accepted_after_its_client_left_is_cancelled() -> None:
    world = World()
    world.generate()
    world.listener.gone.add(b"a")
    world.table.probe()
    submit = world.kernel[-1]
    assert isinstance(submit, m.SeqSubmit)
    world.from_kernel(m.SeqAccepted(submit.req, 500))
    assert world.kernel[-1] == m.SeqCancel(500, FinishReason.CANCELLED)


def test_a_client_that_does_not_read_gets_everything_later_and_holds_up_nobody() -> None:
    world = World()
    world.stream(b"a", 1, 500)
    world.stream(b"b", 1, 501)
    streams = [message.stream for message in world.text if isinstance(message, m.DecodeOpen)]
    world.listener.full.add(b"a")
    for offset in range(3):
        world.step((500, offset, (65,)), (501, offset, (66,)))
        items = tuple(m.DecodedItem(stream, "x", 1) for stream in streams)
        world.router.on_text(m.Decoded(items), 0.0)
    assert [t.offset for t in world.listener.sent[b"b"] if isinstance(t, m.Tokens)] == [0, 1, 2]
    assert [t for t in world.listener.sent[b"a"] if isinstance(t, m.Tokens)] == []
    world.listener.full.clear()
    world.table.flush()
    assert [t.offset for t in world.listener.sent[b"a"] if isinstance(t, m.Tokens)] == [0, 1, 2]


def test_a_client_with_too_much_unread_is_dropped(monkeypatch: Any) -> None:
    monkeypatch.setattr(clients_module, "MAX_BACKLOG", 3)
    world = World()
    world.stream(b"a", 1, 500)
    world.listener.full.add(b"a")
    for req in range(10, 16):
        world.client(b"a", m.PsGet(req))  # each is refused with an Error that does not get through
    assert m.SeqCancel(500, FinishReason.CANCELLED) in world.kernel
    assert len(world.router) == 0


def test_in_flight_limit() -> None:
    world = World(max_in_flight=2)
    for req in (1, 2, 3):
        world.generate(req=req)
    world.generate(b"b")
    assert world.errors(b"a") == [(3, ErrorCode.OVERLOADED)]
    assert world.errors(b"b") == []


def test_a_number_in_use_is_refused_and_the_first_request_lives() -> None:
    world = World()
    world.stream(req=1)
    world.generate(req=1)
    assert world.errors() == [(1, ErrorCode.INVALID_REQUEST)]
    assert len(world.router) == 1


def test_encoded_prompt_over_the_context_fails_typed() -> None:
    world = World()
    world.generate(text="x" * 600, token_ids=None)
    encode = world.text[-1]
    assert isinstance(encode, m.Encode)
    world.router.on_text(m.Encoded(encode.req, pack_i32([1] * 600)), 0.0)
    assert world.errors() == [(1, ErrorCode.CONTEXT_TOO_LONG)]
    assert len(world.router) == 0


def test_errors_of_services_reach_the_client_with_its_number() -> None:
    world = World()
    world.generate(req=3, text="x", token_ids=None)
    encode = world.text[-1]
    assert isinstance(encode, m.Encode)
    world.router.on_text(m.Error(encode.req, ErrorCode.INVALID_REQUEST, "bad template", "messages"), 0.0)
    world.generate(req=4)
    submit = world.kernel[-1]
    assert isinstance(submit, m.SeqSubmit)
    world.from_kernel(m.Error(submit.req, ErrorCode.OVERLOADED, "queue is full"))
    assert world.listener.sent[b"a"] == [
        m.Error(3, ErrorCode.INVALID_REQUEST, "bad template", "prompt"),
        m.Error(4, ErrorCode.OVERLOADED, "queue is full"),
    ]
    assert len(world.router) == 0


def test_services_that_are_silent_are_unavailable() -> None:
    world = World()
    world.generate(req=4, text="x", token_ids=None)
    world.client(b"a", m.Tokenize(5, None, "x", None))
    world.generate(req=6)
    world.router.tick(ANSWER_TIMEOUT_S - 0.1)
    assert len(world.router) == 3
    world.router.tick(ANSWER_TIMEOUT_S)
    texts = [error.message for error in world.listener.sent[b"a"] if isinstance(error, m.Error)]
    assert texts == ["the tokenizer is silent for 30 s"] * 2 + ["the microkernel is silent for 30 s"]
    assert world.errors() == [(req, ErrorCode.UNAVAILABLE) for req in (4, 5, 6)]
    assert len(world.router) == 1  # what the microkernel may still answer
    world.from_kernel(m.SeqAccepted(world.kernel[-1].req, 500))  # type: ignore[attr-defined]
    assert world.kernel[-1] == m.SeqCancel(500, FinishReason.CANCELLED)
    assert len(world.router) == 0


def test_the_limit_of_silence_does_not_hit_a_stream() -> None:
    world = World()
    world.stream()
    world.router.tick(ANSWER_TIMEOUT_S * 10)
    assert world.errors() == []
    assert len(world.router) == 1


def test_control_messages_on_the_wrong_socket_are_refused() -> None:
    world = World()
    world.client(b"a", m.StatusGet(9))
    assert world.errors() == [(9, ErrorCode.INVALID_REQUEST)]


def test_a_client_that_reads_nothing_is_dropped_before_its_answers_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmos.services.gateway.clients.MAX_BACKLOG_BYTES", 10_000)
    world = World()
    world.client(b"a", m.Cancel(7))
    world.listener.full.add(b"a")
    client = world.table.find(b"a")
    assert client is not None
    answer = m.Error(1, 2, "x" * 1000)
    for _ in range(9):
        world.table.send(client, answer)
    assert 9000 < client.backlog_bytes < 10_000
    world.listener.full.clear()
    world.table.flush()
    assert (len(world.listener.sent[b"a"]), client.backlog_bytes) == (9, 0)
    world.listener.full.add(b"a")
    for _ in range(10):
        world.table.send(client, answer)
    assert world.table.find(b"a") is None
