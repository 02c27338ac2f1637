"""Requests with grammars and tools through the router: what is asked of whom, and what is refused before anybody is asked."""

from __future__ import annotations

import json

import pytest
from gateway_world import model_info, usage
from router_world import World

from llmos.codes import ErrorCode, FinishReason
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import Grammar, SamplingParams
from llmos.services.gateway.validate import complete_params

WISH = Grammar("choice", '["a"]')
MADE = Grammar("lark", 'start: "a"\n')
PARAMS = SamplingParams(max_tokens=5, grammar=WISH)
CHAT = (m.ChatMessage("user", "hi"),)
ADD = m.Tool("add", "adds", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}}))
SUB = m.Tool("sub")


def submitted(world: World) -> m.SeqSubmit:
    (found,) = [message for message in world.kernel if isinstance(message, m.SeqSubmit)]
    return found


def test_text_and_grammar_are_asked_for_together() -> None:
    world = World()
    world.client(b"a", m.Generate(1, None, "hi", None, None, PARAMS))
    assert world.text == [m.Encode(1, "echo", "hi", None, grammar=WISH)]
    world.router.on_text(m.Encoded(1, pack_i32([104, 105]), grammar=MADE), 0.0)
    assert submitted(world).params.grammar == MADE
    assert submitted(world).prompt == pack_i32([104, 105])


def test_token_ids_wait_for_their_grammar_and_a_tokenizer_that_dies_is_asked_again() -> None:
    world = World()
    world.client(b"a", m.Generate(1, None, None, pack_i32([7, 8]), None, PARAMS))
    assert world.text == [m.Encode(1, "echo", None, None, grammar=WISH)]
    assert world.kernel == []
    world.router.on_text_down(0.0)
    world.router.on_text_up(0.0)
    assert world.text == [m.Encode(1, "echo", None, None, grammar=WISH)] * 2
    world.router.on_text(m.Encoded(1, b"", grammar=MADE), 0.0)
    assert submitted(world).prompt == pack_i32([7, 8])
    assert submitted(world).params.grammar == MADE


def test_a_turn_of_an_open_sequence_waits_for_its_grammar() -> None:
    world = World()
    world.client(b"a", m.Continue(1, 500, "echo", PARAMS))
    assert world.text == [m.Encode(1, "echo", None, None, grammar=WISH)]
    world.router.on_text(m.Encoded(1, b"", grammar=MADE), 0.0)
    assert world.kernel == [m.Stat(1, 500, None)]
    world.measured(1)
    (asked,) = world.kernel[1:]
    assert isinstance(asked, m.SeqContinue)
    assert asked.params.grammar == MADE
    attached = m.SeqAttached(1, 500, "echo", 3, asked.params, b"")
    world.from_kernel(attached)
    world.from_kernel(m.SeqTokens((), (m.SeqEnd(500, FinishReason.STOP, usage(0)),)))
    world.router.on_text(m.Decoded((m.DecodedItem(1, "", 0, None, True),)), 0.0)
    assert [type(answer) for answer in world.listener.sent[b"a"]] == [m.Accepted, m.Finished]
    assert len(world.router) == 0


def test_a_turn_that_is_cancelled_while_its_grammar_is_compiled() -> None:
    world = World()
    world.client(b"a", m.Continue(1, 500, "echo", PARAMS))
    world.client(b"a", m.Cancel(1))
    (answer,) = world.listener.sent[b"a"]
    assert (answer.reason, answer.rid) == (FinishReason.CANCELLED, 500)
    world.router.on_text(m.Encoded(1, b"", grammar=MADE), 0.0)
    assert world.kernel == []


def test_a_grammar_that_the_tokenizer_refuses_is_refused_by_name() -> None:
    world = World()
    world.client(b"a", m.Generate(1, None, "hi", None, None, PARAMS))
    world.router.on_text(m.Error(1, ErrorCode.INVALID_REQUEST, "grammar: no", "grammar"), 0.0)
    (answer,) = world.listener.sent[b"a"]
    assert (answer.code, answer.field) == (ErrorCode.INVALID_REQUEST, "grammar")
    world.client(b"a", m.Generate(2, None, None, None, CHAT, SamplingParams(), tools=(ADD,), tool_choice="required"))
    world.router.on_text(m.Error(2, ErrorCode.INVALID_REQUEST, "grammar: keyword 'not'", "grammar"), 0.0)
    answer = world.listener.sent[b"a"][1]
    assert (answer.message, answer.field) == ("tools: keyword 'not'", "tools")
    assert world.kernel == []


@pytest.mark.parametrize(
    ("info", "request_", "field"),
    [
        ({"has_grammar": False}, {"params": PARAMS}, "grammar"),
        ({"eos_token_ids": ()}, {"params": PARAMS}, "grammar"),
        ({"tools": None}, {"tools": (ADD,)}, "tools"),
        ({}, {"tools": (ADD,), "messages": None, "text": "hi"}, "tools"),
        ({}, {"tools": (ADD, ADD)}, "tools"),
        ({}, {"tool_choice": "required"}, "tool_choice"),
        ({}, {"tools": (ADD,), "tool_choice": "function:sub"}, "tool_choice"),
        ({}, {"tools": (ADD,), "tool_choice": "any"}, "tool_choice"),
        ({}, {"tools": (ADD,), "tool_choice": "required", "params": PARAMS}, "tool_choice"),
        ({"has_grammar": False}, {"tools": (ADD,), "tool_choice": "required"}, "grammar"),
    ],
)
def test_what_is_refused_at_once(info, request_, field) -> None:
    world = World()
    world.router.models = {"echo": model_info(**info)}
    plain = {"req": 1, "model": None, "text": None, "token_ids": None, "messages": CHAT, "params": SamplingParams()}
    world.client(b"a", m.Generate(**(plain | request_)))
    (answer,) = world.listener.sent[b"a"]
    assert (answer.code, answer.field) == (ErrorCode.INVALID_REQUEST, field)
    assert world.text == world.kernel == []


def test_own_stop_tokens_end_an_output_where_the_model_has_no_end() -> None:
    world = World()
    world.router.models = {"echo": model_info(eos_token_ids=())}
    params = SamplingParams(grammar=WISH, stop_token_ids=(9,))
    world.client(b"a", m.Generate(1, None, "hi", None, None, params))
    assert len(world.text) == 1


@pytest.mark.parametrize("choice", ["auto", "none", "required", "function:sub"])
def test_tools_go_into_the_prompt_and_a_choice_becomes_a_grammar(choice: str) -> None:
    world = World()
    world.client(b"a", m.Generate(1, None, None, None, CHAT, SamplingParams(), tools=(ADD, SUB), tool_choice=choice))
    (asked,) = world.text
    assert isinstance(asked, m.Encode)
    assert asked.tools == (() if choice == "none" else (ADD, SUB))
    grammar = asked.grammar
    assert (grammar is not None) == (choice in ("required", "function:sub"))
    if grammar is not None:
        assert (r"\"add\"" in grammar.text, r"\"sub\"" in grammar.text) == (choice == "required", True)
    world.router.on_text(m.Encoded(1, pack_i32([1]), grammar=grammar), 0.0)
    world.from_kernel(m.SeqAccepted(1, 500))
    (accepted,) = world.listener.sent[b"a"]
    assert accepted == m.Accepted(1, 500, "echo", 1, None if choice == "none" else "hermes")


def test_without_tools_nothing_changes() -> None:
    world = World()
    world.client(b"a", m.Generate(1, None, "hi", None, None, SamplingParams()))
    assert world.text == [m.Encode(1, "echo", "hi", None)]
    world.router.on_text(m.Encoded(1, pack_i32([1])), 0.0)
    assert submitted(world).params == complete_params(SamplingParams(max_tokens=511), model_info())
