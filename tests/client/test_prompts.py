"""Prompts: what they become, and what is refused under which name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmos.client.prompts import parse_prompt, parse_tokens
from llmos.errors import InvalidRequest
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import ChatMessage


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
    ([{"role": "user", "content": "x", "name": "n"}], "unknown key 'name'"),
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
