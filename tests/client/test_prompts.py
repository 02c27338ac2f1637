"""Prompts: what they become, and what is refused under which name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmos.client.chat import parse_tools
from llmos.client.prompts import parse_prompt, parse_tokens
from llmos.errors import InvalidRequest
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import ChatMessage, Tool, ToolCall


def test_three_kinds_of_prompt() -> None:
    assert parse_prompt("hé") == ("hé", None, None)
    assert parse_prompt([1, 2**31 - 1]) == (None, pack_i32([1, 2**31 - 1]), None)
    assert parse_prompt(range(3)) == (None, pack_i32([0, 1, 2]), None)
    assert parse_prompt(np.array([7, 8])) == (None, pack_i32([7, 8]), None)
    chat = [{"role": "system", "content": "be"}, ChatMessage("user", "hi")]
    assert parse_prompt(chat) == (None, None, (ChatMessage("system", "be"), ChatMessage("user", "hi")))


BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "empty"),
    ([], "empty"),
    (b"bytes", "bytes are not text"),
    (None, "NoneType"),
    (5, "int"),
    ({"role": "user", "content": "x"}, "dict"),
    ("a\ud800b", "lone surrogate at character 1"),
    ("x" * (5 * 1024 * 1024), "5242880 bytes"),
    ([1, "a"], r"prompt\[1\]: expected a token id, got str"),
    ([1.5], "got float"),
    ([-1], "-1 is not a token id"),
    ([2**31], "not a token id"),
    ([1] * 1_048_577, "1048577 token ids"),
    ([{"role": "user"}], r"prompt\[0\].content: expected a str, got NoneType"),
    ([{"role": "user", "content": "x", "nome": "n"}], "unknown key 'nome'"),
    ([{"role": "user", "content": "\udfff"}], r"prompt\[0\].content: not valid Unicode"),
    ([{"role": "user", "content": "x"}, 5], r"prompt\[1\]: expected a chat message"),
    ([{"role": "", "content": ""}], "empty"),
    ([{"role": "u", "content": "x"}] * 1025, "1025 messages"),
]


@pytest.mark.parametrize(("prompt", "words"), BAD_PROMPTS, ids=[words for _, words in BAD_PROMPTS])
def test_bad_prompts(prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse_prompt(prompt)
    assert caught.value.field == "prompt"


def test_tokens_to_append_have_another_name_and_are_no_chat() -> None:
    assert parse_tokens("hé", "text") == ("hé", None)
    assert parse_tokens((1, 2), "text") == (None, pack_i32([1, 2]))
    for bad, words in (
        ("", "text is empty"),
        ([], "text is empty"),
        ([-1], r"text\[0\]: -1 is not"),
        ([{"role": "user", "content": "x"}], "text: a chat can not be appended"),
    ):
        with pytest.raises(InvalidRequest, match=words) as caught:
            parse_tokens(bad, "text")
        assert caught.value.field == "text"


def test_calls_of_tools_in_a_conversation() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    chat = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"},
    ]
    parsed = (
        ChatMessage("assistant", "", (ToolCall("f", '{"a": 1}', "c1"),)),
        ChatMessage("tool", "2", (), "c1", "f"),
    )
    assert parse_prompt(chat) == (None, None, parsed)
    assert parse_prompt(parsed) == (None, None, parsed)


def test_tools_of_each_form() -> None:
    tool = Tool("f", "d", '{"type": "object"}')
    plain = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert parse_tools([plain, {"type": "function", "function": plain}, tool]) == (tool, tool, tool)
    assert parse_tools([{"name": "g"}]) == (Tool("g"),)


@pytest.mark.parametrize(
    "tools",
    [{"name": "f"}, "f", 7, [7], [{"type": "web_search"}], [{"name": 7}], [{"name": "f", "strict": True}],
     [{"name": "f", "parameters": {1, 2}}], [{"name": "\ud800"}]],
)  # fmt: skip
def test_bad_tools(tools: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_tools(tools)
    assert caught.value.field == "tools"


@pytest.mark.parametrize(
    "call",
    [
        7,
        {},
        {"function": {"name": 7}},
        {"function": {"name": "f", "arguments": {1}}},
        {"function": {"name": "f"}, "id": 7},
    ],
)
def test_bad_calls(call: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt\[0\].tool_calls\[0\]"):
        parse_prompt([{"role": "assistant", "content": "", "tool_calls": [call]}])
