"""Arguments of `generate`: what they become, and what is refused with which field."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmos.client.prompts import generate_request, merge_params, parse_prompt, tokenize_request
from llmos.errors import InvalidRequest
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import ChatMessage, Generate, Tokenize
from llmos.protocol.params import SamplingParams


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


def test_keyword_arguments_win_over_params() -> None:
    base = SamplingParams(temperature=0.5, top_k=7)
    merged = merge_params(base, {"temperature": 0, "stop": "END", "logit_bias": {5: 1}, "stop_token_ids": [3]})
    assert merged == SamplingParams(
        temperature=0.0, top_k=7, stop=("END",), logit_bias=((5, 1.0),), stop_token_ids=(3,)
    )
    assert merge_params(None, {}) == SamplingParams()


BAD_PARAMS: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"max_new_tokens": 1}, "max_new_tokens", "did you mean 'max_tokens'"),
    ({"zzzz": 1}, "zzzz", "did you mean"),
    ({"temperature": math.nan}, "temperature", "nan"),
    ({"temperature": "hot"}, "temperature", "got `str`"),
    ({"top_p": 2}, "top_p", "outside"),
    ({"max_tokens": 0}, "max_tokens", "outside"),
    ({"max_tokens": 10**12}, "max_tokens", "outside"),
    ({"max_tokens": 10**30}, "max_tokens", "outside"),
    ({"max_tokens": 1.5}, "max_tokens", "float"),
    ({"max_tokens": True}, "max_tokens", "bool"),
    ({"stop": ["a", 5]}, "stop", "int"),
    ({"stop": ["\ud800"]}, "stop", "surrogate"),
    ({"stop": [""]}, "stop", "1 to 128"),
    ({"seed": -1}, "seed", "outside"),
    ({"logprobs": object()}, "logprobs", "object"),
]


@pytest.mark.parametrize(("sampling", "field", "words"), BAD_PARAMS, ids=[str(row[0])[:40] for row in BAD_PARAMS])
def test_bad_parameters_name_themselves(sampling: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        merge_params(None, sampling)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"), [("model", ""), ("model", "x" * 129), ("model", 5), ("client_request_id", "x" * 65)]
)
def test_bad_names(field: str, value: Any) -> None:
    arguments: dict[str, Any] = {"model": None, "client_request_id": None} | {field: value}
    with pytest.raises(InvalidRequest) as caught:
        generate_request("x", arguments["model"], None, arguments["client_request_id"], {})
    assert caught.value.field == field


def test_requests_carry_everything() -> None:
    made = generate_request("x", "demo", None, "id-1", {"seed": 5})(9)
    assert made == Generate(9, "demo", "x", None, None, SamplingParams(seed=5), "id-1")
    assert tokenize_request("x", None)(4) == Tokenize(4, None, "x", None)
    with pytest.raises(InvalidRequest, match="token ids already"):
        tokenize_request([1, 2], None)  # type: ignore[arg-type]
