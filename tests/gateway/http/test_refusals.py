"""What is refused, and in which words: every field has a fate, and errors have OpenAI's shape with `param` and `code`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from http_world import HttpWorld

from llmos.errors import Overloaded, Unavailable
from llmos.keys.roles import Role
from llmos.services.gateway.http import anthropic_messages, openai_chat, openai_completions, openai_responses
from llmos.services.gateway.http.failures import as_http, error_response

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"prompt": "hi", "max_tokens": 2}
RESPONSE = {"input": "hi", "max_output_tokens": 2}


@pytest.fixture(scope="module")
def client(world: HttpWorld) -> Iterator[httpx.Client]:
    with world.http() as made:
        yield made


def error(client: httpx.Client, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    answer = client.post(path, content=body) if isinstance(body, bytes) else client.post(path, json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


@pytest.mark.parametrize(
    ("path", "base", "refused"),
    [
        ("/v1/chat/completions", CHAT, openai_chat.REFUSED),
        ("/v1/completions", TEXT, openai_completions.REFUSED),
        ("/v1/responses", RESPONSE, openai_responses.REFUSED),
    ],
)
def test_each_unsupported_field_is_refused_by_its_name(
    client: httpx.Client, path: str, base: dict[str, Any], refused: dict[str, Any]
) -> None:
    for name, rule in refused.items():
        found = error(client, path, base | {name: "something else"})
        assert (found["param"], found["code"]) == (name, "unsupported_parameter")
        assert found["message"].startswith(f"{name} is not supported: ")
        for value in rule.neutral:
            assert client.post(path, json=base | {name: value}).status_code == 200, name


def test_anthropics_unsupported_fields(client: httpx.Client) -> None:
    base = {"model": "echo", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    for name, rule in anthropic_messages.REFUSED.items():
        answer = client.post("/v1/messages", json=base | {name: "something else"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f"{name} is not supported: ")
        for value in rule.neutral:
            assert client.post("/v1/messages", json=base | {name: value}).status_code == 200, name


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/completions", b"{", None, "invalid_json"),
        ("/v1/completions", b"\xff\xfe", None, "invalid_json"),
        ("/v1/completions", b'{"prompt":' + b"[" * 100_000, None, "invalid_json"),
        ("/v1/completions", b"[]", None, "invalid_type"),
        ("/v1/completions", b"", None, "invalid_json"),
        ("/v1/completions", {"max_tokens": 2}, "prompt", "missing_required_parameter"),
        ("/v1/completions", TEXT | {"max_token": 2}, "max_token", "unknown_parameter"),
        ("/v1/completions", TEXT | {"max_tokens": "2"}, "max_tokens", "invalid_type"),
        ("/v1/completions", TEXT | {"max_tokens": -1}, "max_tokens", "invalid_type"),
        ("/v1/completions", TEXT | {"temperature": -1}, "temperature", "invalid_type"),
        ("/v1/completions", TEXT | {"n": 1000}, "n", "invalid_type"),
        ("/v1/completions", TEXT | {"prompt": ["a"] * 257}, "prompt", "invalid_value"),
        ("/v1/completions", TEXT | {"prompt": ["a"] * 100, "n": 3}, "n", "invalid_value"),
        ("/v1/completions", TEXT | {"prompt": []}, "prompt", "invalid_value"),
        ("/v1/completions", TEXT | {"prompt": ["a", [1]]}, "prompt", "invalid_type"),
        ("/v1/completions", TEXT | {"prompt": [1, 2**40]}, "prompt", "invalid_type"),
        ("/v1/completions", TEXT | {"prompt": [1, 4000]}, "prompt", "invalid_value"),
        ("/v1/completions", TEXT | {"prompt": "a" * 600}, "prompt", "context_length_exceeded"),
        ("/v1/completions", TEXT | {"stop": ["a"] * 17}, "stop", "invalid_value"),
        ("/v1/completions", TEXT | {"logit_bias": {"4000": 1}}, "logit_bias", "invalid_value"),
        ("/v1/completions", TEXT | {"logit_bias": {"x": 1}}, "logit_bias", "invalid_type"),
        ("/v1/completions", TEXT | {"service_tier": "gold"}, "service_tier", "invalid_value"),
        ("/v1/completions", TEXT | {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"messages": []}, "messages", "invalid_type"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ("/v1/chat/completions", CHAT | {"max_completion_tokens": 2}, "max_completion_tokens", "invalid_value"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0].role",
            "invalid_value",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x", "name": "bob"}]},
            "messages[0].name",
            "unsupported_parameter",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "invalid_type",
        ),
    ],
)
def test_a_mistake_is_named(client: httpx.Client, path: str, body: Any, param: str | None, code: str) -> None:
    found = error(client, path, body)
    assert (found["param"], found["code"], found["type"]) == (param, code, "invalid_request_error"), found


def test_an_unknown_model(client: httpx.Client) -> None:
    found = error(client, "/v1/completions", TEXT | {"model": "gpt"}, 404)
    assert (found["param"], found["code"]) == ("model", "model_not_found")


def test_what_changes_nothing_is_said_to(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/completions", json=TEXT | {"user": "u", "metadata": {"a": "b"}, "safety_identifier": None}
    )
    assert answer.status_code == 200
    assert answer.headers["llmos-no-effect"] == "user, metadata"


def test_priority_is_the_administrators(world: HttpWorld) -> None:
    with world.http(world.add_key("eve", Role.INSPECT)) as eve:
        found = error(eve, "/v1/completions", TEXT | {"service_tier": "priority"}, 403)
        assert (found["param"], found["code"]) == ("service_tier", "permission_denied")
        assert error(eve, "/v1/completions", TEXT | {"priority": -1}, 403)["param"] == "priority"
        assert eve.post("/v1/completions", json=TEXT | {"service_tier": "flex"}).status_code == 200
    assert list(world.kernel.ended.values())[-1].nice == 10


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "0"])
def test_a_bad_deadline(client: httpx.Client, value: str) -> None:
    answer = client.post("/v1/completions", json=TEXT, headers={"llmos-deadline-ms": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "llmos-deadline-ms")


def test_too_many_at_once_may_come_again_later(world: HttpWorld) -> None:
    world.kernel.paused = True
    with world.http(world.add_key("frank")) as frank:
        answer = frank.post("/v1/completions", json=TEXT | {"prompt": ["a"] * 65})
    world.kernel.paused = False
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"


def test_retry_after_is_the_microkernels_guess() -> None:
    assert error_response(as_http(Overloaded("full", retry_after_s=2.2))).headers["retry-after"] == "3"
    assert error_response(as_http(Unavailable("gone"))).headers["retry-after"] == "2"


def test_a_sequence_that_is_killed_is_no_answer(world: HttpWorld) -> None:
    world.kernel.window = 8
    with (
        world.http() as client,
        client.stream("POST", "/v1/completions", json=TEXT | {"stream": True, "max_tokens": 300}) as answer,
    ):
        rid = int(answer.headers["llmos-rid"])
        lines = answer.iter_lines()
        next(lines)
        with world.http() as other:
            assert other.post(f"/llmos/v1/sequences/{rid}/kill").json() == {"killed": [rid]}
        rest = list(lines)
    world.kernel.window = 4096
    assert any('"code":"killed"' in line for line in rest)
