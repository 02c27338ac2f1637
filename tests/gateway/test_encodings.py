"""Embed, and log-probabilities of prompts, through a router whose services answer, die and come back."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from gateway_world import model_info, usage
from router_world import World

from llmos.codes import ErrorCode, FinishReason
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams

VECTOR = struct.pack("<2f", 0.5, -1.0)
STOP = m.SeqEnd(500, FinishReason.STOP, usage(3, 0))
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)
RECORDS = pack_i32([65, 1, 66, 2])


def make_world(task: str = "embed", **changes: Any) -> World:
    world = World()
    world.router.models = {"echo": model_info(), "enc": model_info(model="enc", task=task, max_context=8, **changes)}
    return world


def embed(world: World, **changes: Any) -> m.SeqSubmit:
    """As far as the microkernel."""
    fields: dict[str, Any] = {"model": "enc", "text": None, "token_ids": pack_i32([5, 6, 7])}
    world.client(b"a", m.Embed(req=1, **(fields | changes)), world.now)
    question = world.kernel[-1]
    assert isinstance(question, m.SeqSubmit)
    return question


def sent(world: World) -> list[m.Message]:
    return world.listener.sent.get(b"a", [])


def give(world: World, *ends: m.SeqEnd, values: bytes = VECTOR, start: int = 0) -> None:
    results = (m.ResultEntry(500, start, values),) if values else ()
    world.from_kernel(m.SeqTokens((), ends, b"", results))


def test_one_question_and_one_answer() -> None:
    world = make_world("classify", labels=("no", "yes"))
    world.client(b"a", m.Embed(1, "enc", "x", second="y", truncate=True, nice=3), world.now)
    assert world.text == [m.Encode(1, "enc", "x", None, second="y", truncate=True)]
    world.from_text(m.Encoded(1, pack_i32([2, 3, 4, 5]), second_at=2))
    submit = world.kernel[-1]
    assert isinstance(submit, m.SeqSubmit)
    assert (submit.prompt, submit.second_at, submit.nice) == (pack_i32([2, 3, 4, 5]), 2, 3)
    world.from_kernel(m.SeqAccepted(1, 500))
    assert sent(world) == []
    give(world, STOP)
    assert sent(world) == [m.Embedded(1, 500, "enc", VECTOR, ("no", "yes"), STOP.usage)]
    assert len(world.router) == 0
    assert len(world.text) == 1, "there is no text to decode"


def test_the_microkernel_dies_before_the_answer() -> None:
    world = make_world()
    asked = embed(world)
    world.lose_kernel()
    assert world.bring_kernel() == [asked]
    world.from_kernel(m.SeqAccepted(1, 500, existing=True))
    assert world.kernel[-1] == m.SeqAttach(1, 500, "root")
    world.from_kernel(m.SeqAttached(1, 500, "enc", 3, asked.params, b""))
    world.lose_kernel()
    assert world.bring_kernel() == [m.SeqAttach(1, 500, "root")]
    world.from_kernel(m.SeqAttached(1, 500, "enc", 3, asked.params, b"", STOP, VECTOR))
    assert sent(world) == [m.Embedded(1, 500, "enc", VECTOR, (), STOP.usage)]
    assert len(world.router) == 0


def test_an_end_without_its_vector_is_asked_for_once() -> None:
    world = make_world()
    asked = embed(world)
    world.from_kernel(m.SeqAccepted(1, 500))
    give(world, STOP, values=b"")
    assert world.kernel[-1] == m.SeqAttach(1, 500, "root")
    world.from_kernel(m.SeqAttached(1, 500, "enc", 3, asked.params, b"", STOP, VECTOR))
    assert sent(world) == [m.Embedded(1, 500, "enc", VECTOR, (), STOP.usage)]


@pytest.mark.parametrize("reason", [FinishReason.KILLED, FinishReason.POISONED, FinishReason.NUMERICAL_ERROR])
def test_other_ends_are_typed_failures(reason: FinishReason) -> None:
    world = make_world()
    embed(world)
    world.from_kernel(m.SeqAccepted(1, 500))
    give(world, m.SeqEnd(500, reason, usage(3, 0)), values=b"")
    [error] = sent(world)
    assert isinstance(error, m.Error)
    assert (error.req, error.code, error.rid) == (1, ErrorCode.SEQUENCE_FAILED, 500)
    assert reason.name.lower() in error.message
    assert len(world.router) == 0


def test_cancelled_before_it_was_encoded_and_after() -> None:
    world = make_world()
    world.client(b"a", m.Embed(1, "enc", "x"), world.now)
    world.client(b"a", m.Cancel(1), world.now)
    assert world.errors() == [(1, ErrorCode.SEQUENCE_FAILED)]
    embed(world)
    world.from_kernel(m.SeqAccepted(world.kernel[-1].req, 500))
    world.client(b"a", m.Cancel(1), world.now)
    assert world.kernel[-1] == m.SeqCancel(500, FinishReason.CANCELLED)


def test_a_client_that_leaves_takes_its_text_with_it() -> None:
    world = make_world()
    embed(world)
    world.from_kernel(m.SeqAccepted(1, 500))
    world.leave(b"a")
    assert world.kernel[-1] == m.SeqCancel(500, FinishReason.CANCELLED)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": "echo"}, "model"),
        ({"token_ids": pack_i32(range(9))}, "prompt"),
        ({"token_ids": None}, "prompt"),
        ({"token_ids": None, "text": "x", "second": "y"}, "second"),
        ({"nice": 99}, "nice"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], field: str) -> None:
    world = make_world()
    message = m.Embed(**({"req": 1, "model": "enc", "text": None, "token_ids": pack_i32([1])} | changes))
    world.client(b"a", message, world.now)
    [error] = sent(world)
    assert isinstance(error, m.Error)
    assert error.field == field
    assert world.kernel == []


def test_an_encoder_does_not_generate() -> None:
    world = make_world()
    world.generate(model="enc")
    world.client(b"a", m.Spawn(2, "enc"), world.now)
    world.client(b"a", m.Continue(3, 500, "enc", SamplingParams()), world.now)
    assert world.errors() == [(req, ErrorCode.INVALID_REQUEST) for req in (1, 2, 3)]
    assert all("enc" in error.message and error.field == "model" for error in sent(world))


# ---------------------------------------------------------------- scores of a prompt


def test_scores_come_before_the_end_and_each_once() -> None:
    world = World()
    world.generate(params=SCORED)
    world.from_kernel(m.SeqAccepted(1, 500))
    give(world, values=RECORDS[:8])
    world.lose_kernel()
    world.bring_kernel()
    world.from_kernel(m.SeqAttached(1, 500, "echo", 2, SCORED, b""))  # it begins anew
    give(world, values=RECORDS[:8])
    give(world, m.SeqEnd(500, FinishReason.LENGTH, usage(2, 0)), values=RECORDS[8:], start=1)
    world.from_text(m.Decoded((m.DecodedItem(1, "", 0, None, True),)))
    assert sent(world) == [
        m.Accepted(1, 500, "echo", 2),
        m.PromptLogprobs(1, 0, 0, RECORDS[:8]),
        m.PromptLogprobs(1, 1, 0, RECORDS[8:]),
        m.Finished(1, 500, FinishReason.LENGTH, "", usage(2, 0)),
    ]


def test_who_attaches_gets_all_of_them_first() -> None:
    world = World()
    number = world.attach(offset=1)
    end = m.SeqEnd(500, FinishReason.LENGTH, usage(2, 0))
    params = SamplingParams(prompt_logprobs=0)
    world.from_kernel(m.SeqAttached(number, 500, "echo", 2, params, pack_i32([70, 71]), end, RECORDS))
    assert sent(world)[:2] == [m.Accepted(1, 500, "echo", 2), m.PromptLogprobs(1, 0, 0, RECORDS)]


@pytest.mark.parametrize("loses", ["the first", "the end's"])
def test_a_piece_that_did_not_come_is_asked_for(loses: str) -> None:
    world = World()
    world.generate(params=SCORED)
    world.from_kernel(m.SeqAccepted(1, 500))
    end = m.SeqEnd(500, FinishReason.LENGTH, usage(2, 0))
    if loses == "the first":
        give(world, values=RECORDS[8:], start=1)
    else:
        give(world, end, values=b"")
    assert world.kernel[-1] == m.SeqAttach(1, 500, "root")
    world.from_kernel(m.SeqAttached(1, 500, "echo", 2, SCORED, b"", end, RECORDS))
    assert m.PromptLogprobs(1, 0, 0, RECORDS) in sent(world)


def test_a_prompt_may_fill_the_context_if_nothing_is_generated() -> None:
    world = World()
    world.router.models = {"echo": model_info(max_context=2)}
    world.generate(params=SCORED)
    assert isinstance(world.kernel[-1], m.SeqSubmit)
    world.generate(req=2, params=SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert world.errors() == [(2, ErrorCode.CONTEXT_TOO_LONG)]


def test_not_for_open_sequences() -> None:
    world = World()
    world.client(b"a", m.Continue(1, 500, "echo", SamplingParams(prompt_logprobs=1)), world.now)
    [error] = sent(world)
    assert isinstance(error, m.Error)
    assert error.field == "prompt_logprobs"
