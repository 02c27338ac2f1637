"""Tools and formats over HTTP. The microkernel echoes the prompt, so a call in the user's message is a call in the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from gateway_world import model_info
from http_world import HttpWorld, events

from llmos.protocol import messages as m

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CALLS = (
    'Well. <tool_call>\n{"name": "weather", "arguments": {"town": "Paris"}}\n</tool_call>'
    '<tool_call>{"name": "weather", "arguments": {"town": "Rome"}}</tool_call>END'
)
ASKED: dict[str, Any] = {
    "model": "echo",
    "messages": [{"role": "user", "content": CALLS}],
    "tools": [TOOL],
    "max_tokens": 300,
    "stop": "END",
}


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with HttpWorld(model_info(tools=m.ToolFormat("hermes"), has_grammar=True)) as running:
        yield running


def test_calls_in_one_piece(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**ASKED).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content or "").strip() == "user:Well."
    calls = choice.message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [{"town": "Paris"}, {"town": "Rome"}]  # type: ignore[union-attr]
    assert len({call.id for call in calls}) == 2


def test_calls_as_a_stream_are_what_the_client_helps_itself_to(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ASKED) as stream:
        whole = stream.get_final_completion().choices[0]
    plain = client.chat.completions.create(**ASKED).choices[0]
    assert whole.finish_reason == plain.finish_reason
    assert whole.message.content == plain.message.content
    arguments = [json.loads(call.function.arguments) for call in whole.message.tool_calls or []]
    assert arguments == [{"town": "Paris"}, {"town": "Rome"}]


def _joined(found: list[tuple[str, str]]) -> tuple[str, dict[int, str], dict[int, set[str]], str]:
    text, arguments, ids, reason = "", dict[int, str](), dict[int, set[str]](), ""
    for _, data in found:
        if data == "[DONE]":
            continue
        choice = json.loads(data)["choices"][0]
        text += choice["delta"].get("content") or ""
        reason += choice["finish_reason"] or ""
        for call in choice["delta"].get("tool_calls", ()):
            arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
            ids.setdefault(call["index"], set()).update({call["id"]} if "id" in call else set())
    return text, arguments, ids, reason


def test_a_stream_of_calls_goes_on_after_every_event(world: HttpWorld) -> None:
    body = ASKED | {"stream": True}
    with world.http() as http:
        whole = events(http.post("/v1/chat/completions", json=body).text)
        for place in range(len(whole) - 1):
            answer = http.post("/v1/chat/completions", json=body, headers={"last-event-id": whole[place][0]})
            assert _joined(whole[: place + 1] + events(answer.text)) == _joined(whole), whole[place]
    assert _joined(whole)[3] == "tool_calls"


def test_the_conversation_with_its_calls_reaches_the_template(client: openai.OpenAI, world: HttpWorld) -> None:
    first = client.chat.completions.create(**ASKED).choices[0].message
    calls = first.tool_calls or []
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    client.chat.completions.create(**ASKED | {"messages": [*ASKED["messages"], first, *results]})
    seen = [message for message in world.tokenizer.seen if isinstance(message, m.Encode)][-1]
    assert seen.tools == (
        m.Tool("weather", "of a town", json.dumps(TOOL["function"]["parameters"], separators=(",", ":"))),
    )  # type: ignore[index]
    assert seen.messages is not None
    assert [call.name for call in seen.messages[1].tool_calls] == ["weather", "weather"]
    assert (seen.messages[2].name, seen.messages[2].tool_call_id) == ("weather", calls[0].id)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"tool_choice": "required"}, "lark"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "lark"),
        ({"tools": [], "response_format": {"type": "json_object"}}, "json_object"),
        (
            {"tools": [], "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
            "json_schema",
        ),
        ({"tools": [], "grammar": {"kind": "regex", "text": "[ab]+"}}, "regex"),
    ],
)
def test_what_has_to_fit_is_compiled(
    client: openai.OpenAI, world: HttpWorld, changes: dict[str, Any], kind: str
) -> None:
    asked = ASKED | changes
    own = {"grammar": asked.pop("grammar")} if "grammar" in asked else {}
    client.chat.completions.create(**asked, extra_body=own)
    seen = [message for message in world.tokenizer.seen if isinstance(message, m.Encode)][-1]
    assert seen.grammar is not None
    assert seen.grammar.kind == kind


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "weather", "strict": True}}]},
            "tools[0].function.strict",
        ),
        ({"logprobs": True}, "logprobs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"grammar": {"kind": "prose", "text": ""}}, "grammar"),
        ({"grammar": {"kind": "regex", "text": "a"}, "response_format": {"type": "json_object"}}, "grammar"),
    ],
)
def test_mistakes_are_named(world: HttpWorld, changes: dict[str, Any], param: str) -> None:
    with world.http() as http:
        answer: httpx.Response = http.post("/v1/chat/completions", json=ASKED | changes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
