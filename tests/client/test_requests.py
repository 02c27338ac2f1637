"""Messages of the client port: exact, or refused before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from llmos.client.requests import (
    append_request,
    attach_request,
    continue_request,
    generate_request,
    spawn_request,
    tokenize_request,
)
from llmos.errors import InvalidRequest
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams


@dataclass
class Handle:
    rid: int


def test_generate_carries_everything() -> None:
    assert generate_request("x", "demo", {"client_request_id": "id-1", "seed": 5})(9) == m.Generate(
        9, "demo", "x", None, None, SamplingParams(seed=5), "id-1"
    )
    options = {
        "model": "other", "params": SamplingParams(top_k=3), "temperature": 0.5, "nice": 7, "deadline_s": 0.25,
        "timeout_s": 3, "parent": Handle(12), "after": [Handle(13), 14],
    }  # fmt: skip
    assert generate_request([1, 2], "demo", options)(9) == m.Generate(
        9, "other", None, pack_i32([1, 2]), None, SamplingParams(top_k=3, temperature=0.5), None, 7, 250.0, 12, (13, 14)
    )


def test_spawn() -> None:
    assert spawn_request(None, None, {})(3) == m.Spawn(3, None)
    chat = [{"role": "user", "content": "hi"}]
    options = {"nice": -3, "parent": 5, "after": Handle(6), "client_request_id": "a"}
    assert spawn_request(chat, "demo", options)(3) == m.Spawn(
        3, "demo", None, None, (m.ChatMessage("user", "hi"),), -3, 5, (6,), "a"
    )
    assert spawn_request((7, 8), None, {"after": 4, "model": None})(3).token_ids == pack_i32([7, 8])
    assert spawn_request("x", None, {"after": 4})(3).after == (4,)


def test_append_continue_and_attach() -> None:
    assert append_request(5, " there")("demo")(2) == m.Append(2, 5, "demo", " there", None)
    assert append_request(5, [9])("demo")(2) == m.Append(2, 5, "demo", None, pack_i32([9]))
    options = {"max_tokens": 20, "deadline_s": 2, "timeout_s": 1}
    assert continue_request(5, options)("demo")(2) == m.Continue(2, 5, "demo", SamplingParams(max_tokens=20), 2000.0)
    assert attach_request(5, 0)(2) == m.Attach(2, 5, 0)
    assert attach_request(5, 77)(2) == m.Attach(2, 5, 77)


def test_tokenize() -> None:
    assert tokenize_request("x", None)(4) == m.Tokenize(4, None, "x", None)


REFUSED: list[tuple[Callable[[], Any], str, str]] = [
    *(
        (lambda value=value: generate_request("x", None, {"deadline_s": value}), "deadline_s", words)
        for value, words in ((0, "0"), (-1.5, "-1.5"), (math.nan, "nan"), (math.inf, "inf"), ("1", "str"), (604_801, "604800"))
    ),
    (lambda: generate_request("x", None, {"nice": -21}), "nice", "-21 is outside"),
    (lambda: generate_request("x", None, {"nice": None}), "nice", "NoneType"),
    (lambda: generate_request("x", None, {"model": ""}), "model", "0 characters"),
    (lambda: generate_request("x", "x" * 129, {}), "model", "129 characters"),
    (lambda: generate_request("x", 5, {}), "model", "got int"),  # type: ignore[arg-type]
    (lambda: generate_request("x", None, {"client_request_id": "x" * 65}), "client_request_id", "65 characters"),
    (lambda: generate_request("x", None, {"stopp": "a"}), "stopp", "did you mean 'stop'"),
    (lambda: generate_request("x", None, {"stream": True}), "stream", "unknown option"),
    (lambda: generate_request("x", None, {"parent": 0}), "parent", "parent: 0 is not a sequence number"),
    (lambda: generate_request("x", None, {"parent": Handle(-1)}), "parent", "is not a sequence number"),
    (lambda: generate_request("x", None, {"after": "12"}), "after", "'12' is not a sequence number"),
    (lambda: generate_request("x", None, {"after": [3, None]}), "after", "None is not a sequence number"),
    (lambda: generate_request("x", None, {"after": range(1, 258)}), "after", "257 sequences, the limit is 256"),
    (lambda: spawn_request("", None, {}), "prompt", "empty"),
    (lambda: spawn_request([], None, {}), "prompt", "empty"),
    (lambda: spawn_request("x", None, {"temperature": 1}), "temperature", "unknown option 'temperature'"),
    (lambda: spawn_request("x", None, {"deadline_s": 1}), "deadline_s", "unknown option"),
    (lambda: append_request(5, [{"role": "user", "content": "x"}]), "text", "a chat can not be appended"),
    (lambda: append_request(5, None), "text", "NoneType"),
    (lambda: continue_request(5, {"nice": 1}), "nice", "unknown option"),
    (lambda: continue_request(5, {"top_p": 2}), "top_p", "outside"),
    (lambda: attach_request(5, -1), "offset", "-1 is outside"),
    (lambda: attach_request(5, 2.0), "offset", "got float"),
    (lambda: tokenize_request([1, 2], None), "prompt", "token ids already"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "field", "words"), REFUSED, ids=[f"{row[1]}-{row[2]}" for row in REFUSED])
def test_bad_arguments_are_refused_at_once(build: Callable[[], Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build()
    assert caught.value.field == field
    assert words in caught.value.message
