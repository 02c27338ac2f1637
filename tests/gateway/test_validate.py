"""What the gateway refuses, with the field it names."""

from __future__ import annotations

import math
from typing import Any

import pytest
from gateway_world import model_info

from llmos.errors import ContextTooLong, InvalidRequest, LlmosError, NotFound, PermissionRefused
from llmos.protocol import limits
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.validate import (
    check_append,
    check_attach,
    check_continue,
    check_generate,
    check_ids,
    check_spawn,
    check_tokenize,
    check_tokens,
    complete_params,
)

MODELS = {"echo": model_info(), "plain": model_info("plain", has_chat_template=False)}
CHAT = (m.ChatMessage("user", "hi"),)


def generate(**changes: Any) -> m.Generate:
    fields: dict[str, Any] = {
        "req": 1,
        "model": None,
        "text": "hello",
        "token_ids": None,
        "messages": None,
        "params": SamplingParams(),
    }
    return m.Generate(**(fields | changes))


def params(**fields: Any) -> dict[str, Any]:
    return {"params": SamplingParams(**fields)}


BAD: list[tuple[dict[str, Any], type[LlmosError], str, str]] = [
    ({"model": "nope"}, NotFound, "model", "served are: echo, plain"),
    ({"text": ""}, InvalidRequest, "prompt", "empty"),
    ({"text": None}, InvalidRequest, "prompt", "exactly one"),
    ({"messages": CHAT}, InvalidRequest, "prompt", "exactly one"),
    ({"text": None, "messages": ()}, InvalidRequest, "prompt", "empty"),
    ({"text": None, "token_ids": b""}, InvalidRequest, "prompt", "empty"),
    ({"text": "x" * (5 * 1024 * 1024)}, InvalidRequest, "prompt", "5242880 bytes"),
    ({"text": None, "messages": CHAT * 1025}, InvalidRequest, "prompt", "1025 messages"),
    ({"text": None, "messages": CHAT, "model": "plain"}, InvalidRequest, "messages", "no chat template"),
    ({"text": None, "token_ids": b"\0" * 4 * (limits.MAX_PROMPT_TOKENS + 1)}, InvalidRequest, "prompt", "1048577"),
    ({"client_request_id": "x" * 65}, InvalidRequest, "client_request_id", "64"),
    ({"client_request_id": ""}, InvalidRequest, "client_request_id", "64"),
    ({"nice": 20}, InvalidRequest, "nice", "20 is outside [-20, 19]"),
    ({"nice": -21}, InvalidRequest, "nice", "-21"),
    ({"nice": -1}, PermissionRefused, "nice", "administrators only"),
    ({"deadline_ms": 0.0}, InvalidRequest, "deadline_ms", "0.0 is outside (0, 604800000]"),
    ({"deadline_ms": -5.0}, InvalidRequest, "deadline_ms", "-5.0"),
    ({"deadline_ms": 604_800_001.0}, InvalidRequest, "deadline_ms", "604800001.0"),
    ({"deadline_ms": math.nan}, InvalidRequest, "deadline_ms", "nan"),
    ({"deadline_ms": math.inf}, InvalidRequest, "deadline_ms", "inf"),
    ({"parent": 0}, InvalidRequest, "parent", "0 is outside [1, 9223372036854775807]"),
    ({"parent": 2**63}, InvalidRequest, "parent", "9223372036854775808"),
    ({"after": tuple(range(1, 258))}, InvalidRequest, "after", "257 sequences, the limit is 256"),
    ({"after": (1, -1)}, InvalidRequest, "after", "-1 is outside"),
    ({"after": (1, 2, 1)}, InvalidRequest, "after", "sequence 1 is named twice"),
    (params(temperature=math.nan), InvalidRequest, "temperature", "nan"),
    (params(temperature=math.inf), InvalidRequest, "temperature", "inf"),
    (params(top_p=2.0), InvalidRequest, "top_p", "2.0"),
    (params(max_tokens=0), InvalidRequest, "max_tokens", "0"),
    (params(max_tokens=10**12), InvalidRequest, "max_tokens", "1000000000000"),
    (params(logit_bias=((256, 1.0),)), InvalidRequest, "logit_bias", "256"),
    (params(stop_token_ids=(300,)), InvalidRequest, "stop_token_ids", "300"),
]


@pytest.mark.parametrize(("changes", "kind", "field", "words"), BAD)
def test_bad_requests_name_their_field(changes: dict[str, Any], kind: type[LlmosError], field: str, words: str) -> None:
    with pytest.raises(LlmosError) as caught:
        check_generate(generate(**changes), MODELS, is_administrator=False)
    assert type(caught.value) is kind
    assert caught.value.field == field
    assert words in caught.value.message


def test_without_a_name_the_first_model_answers() -> None:
    assert check_generate(generate(), MODELS, is_administrator=False).model.model == "echo"
    assert check_generate(generate(model="plain"), MODELS, is_administrator=False).model.model == "plain"
    assert check_tokenize(m.Tokenize(1, None, "x", None), MODELS).model == "echo"


@pytest.mark.parametrize(
    ("changes", "is_administrator"),
    [
        ({"nice": 19}, False),
        ({"nice": -20}, True),
        ({"deadline_ms": 604_800_000.0}, False),
        ({"deadline_ms": 1}, False),
        ({"parent": 2**63 - 1, "after": (2**63 - 1, *range(1, 256))}, False),
    ],
)
def test_the_last_good_values_pass(changes: dict[str, Any], is_administrator: bool) -> None:
    assert check_generate(generate(**changes), MODELS, is_administrator).model.model == "echo"


def test_nothing_served_is_not_found() -> None:
    with pytest.raises(NotFound, match="no model"):
        check_generate(generate(), {}, is_administrator=True)


def test_params_become_complete() -> None:
    info = model_info(defaults=SamplingParams(temperature=0.6, top_k=20), eos_token_ids=(7, 9))
    done = complete_params(SamplingParams(top_k=5, stop_token_ids=(3, 7)), info)
    assert (done.temperature, done.top_k, done.top_p, done.min_p, done.repetition_penalty) == (0.6, 5, 1.0, 0.0, 1.0)
    assert done.stop_token_ids == (3, 7, 9)
    assert done.seed is None
    assert complete_params(SamplingParams(ignore_eos=True), info).stop_token_ids == ()


def test_room_limits_max_tokens() -> None:
    info = model_info(max_context=10)
    prompt = pack_i32([1, 2, 3])
    assert check_tokens(prompt, SamplingParams(), info).max_tokens == 7
    assert check_tokens(prompt, SamplingParams(max_tokens=5), info).max_tokens == 5
    clamped = check_tokens(prompt, SamplingParams(max_tokens=100, min_tokens=50), info)
    assert (clamped.max_tokens, clamped.min_tokens) == (7, 7)
    assert check_tokens(pack_i32([1] * 9), SamplingParams(), info).max_tokens == 1


def test_prompt_that_fills_the_context_is_too_long() -> None:
    with pytest.raises(ContextTooLong, match=r"10 tokens.*context of 10") as caught:
        check_tokens(pack_i32([1] * 10), SamplingParams(), model_info(max_context=10))
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("blob", "words"),
    [(pack_i32([1, 256]), "256"), (pack_i32([-1, 5]), "-1"), (b"abc", "multiple of 4"), (b"", "empty")],
)
def test_bad_token_ids(blob: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check_tokens(blob, SamplingParams(), model_info())
    assert caught.value.field == "prompt"


def spawn(**changes: Any) -> m.Spawn:
    return m.Spawn(**({"req": 1, "model": None} | changes))


BAD_SPAWNS: list[tuple[dict[str, Any], type[LlmosError], str, str]] = [
    ({"model": "nope"}, NotFound, "model", "served are: echo, plain"),
    ({"text": "a", "token_ids": b"abcd"}, InvalidRequest, "prompt", "at most one of text, token_ids and messages"),
    ({"text": "", "token_ids": b""}, InvalidRequest, "prompt", "2 are"),
    ({"messages": ()}, InvalidRequest, "prompt", "empty"),
    ({"messages": CHAT, "model": "plain"}, InvalidRequest, "messages", "no chat template"),
    ({"text": "x" * (5 * 1024 * 1024)}, InvalidRequest, "prompt", "5242880 bytes"),
    ({"client_request_id": "x" * 65}, InvalidRequest, "client_request_id", "64"),
    ({"nice": -1}, PermissionRefused, "nice", "administrators only"),
    ({"nice": 20}, InvalidRequest, "nice", "20 is outside"),
    ({"parent": -1}, InvalidRequest, "parent", "-1 is outside"),
    ({"after": (0,)}, InvalidRequest, "after", "0 is outside"),
]


@pytest.mark.parametrize(("changes", "kind", "field", "words"), BAD_SPAWNS)
def test_bad_spawns_name_their_field(changes: dict[str, Any], kind: type[LlmosError], field: str, words: str) -> None:
    with pytest.raises(LlmosError) as caught:
        check_spawn(spawn(**changes), MODELS, is_administrator=False)
    assert type(caught.value) is kind
    assert caught.value.field == field
    assert words in caught.value.message


@pytest.mark.parametrize("prompt", [{}, {"text": ""}, {"text": "a"}, {"token_ids": b""}, {"messages": CHAT}])
def test_a_spawn_may_have_a_prompt(prompt: dict[str, Any]) -> None:
    assert check_spawn(spawn(**prompt), MODELS, is_administrator=False).model == "echo"


BAD_TURNS: list[tuple[Any, type[LlmosError], str, str]] = [
    (m.Append(1, 0, "echo", "x", None), InvalidRequest, "rid", "0 is outside [1, 9223372036854775807]"),
    (m.Append(1, 5, "nope", "x", None), NotFound, "model", "served are"),
    (m.Append(1, 5, "echo", None, None), InvalidRequest, "prompt", "exactly one"),
    (m.Append(1, 5, "echo", "x", b"abcd"), InvalidRequest, "prompt", "exactly one"),
    (m.Append(1, 5, "echo", "", None), InvalidRequest, "prompt", "empty"),
    (m.Append(1, 5, "echo", None, b""), InvalidRequest, "prompt", "empty"),
    (m.Append(1, 5, "echo", "x" * (5 * 1024 * 1024), None), InvalidRequest, "prompt", "5242880 bytes"),
    (m.Continue(1, -1, "echo", SamplingParams()), InvalidRequest, "rid", "-1 is outside"),
    (m.Continue(1, 5, "nope", SamplingParams()), NotFound, "model", "served are"),
    (m.Continue(1, 5, "echo", SamplingParams(), 0.0), InvalidRequest, "deadline_ms", "0.0 is outside"),
    (m.Continue(1, 5, "echo", SamplingParams(top_p=2.0)), InvalidRequest, "top_p", "2.0"),
    (m.Continue(1, 5, "echo", SamplingParams(stop_token_ids=(256,))), InvalidRequest, "stop_token_ids", "256"),
    (m.Attach(1, 2**63), InvalidRequest, "rid", "9223372036854775808"),
    (m.Attach(1, 5, -1), InvalidRequest, "offset", "-1 is outside [0, 9223372036854775807]"),
    (m.Attach(1, 5, 2**63), InvalidRequest, "offset", "9223372036854775808"),
]


@pytest.mark.parametrize(("message", "kind", "field", "words"), BAD_TURNS)
def test_bad_turns_name_their_field(message: Any, kind: type[LlmosError], field: str, words: str) -> None:
    checks: dict[type, Any] = {
        m.Append: check_append,
        m.Continue: check_continue,
        m.Attach: lambda m, _: check_attach(m),
    }
    with pytest.raises(LlmosError) as caught:
        checks[type(message)](message, MODELS)
    assert type(caught.value) is kind
    assert caught.value.field == field
    assert words in caught.value.message


def test_continue_is_completed_like_generate() -> None:
    given = SamplingParams(top_k=5, stop=("x",))
    checked = check_continue(m.Continue(1, 5, "echo", given, 1.0), MODELS)
    assert checked.params == check_generate(generate(params=given), MODELS, is_administrator=False).params
    assert checked.params.max_tokens is None


def test_an_empty_prompt_is_only_good_for_a_spawn() -> None:
    assert len(check_ids(b"", model_info(), may_be_empty=True)) == 0
    with pytest.raises(InvalidRequest, match="empty"):
        check_ids(b"", model_info())
