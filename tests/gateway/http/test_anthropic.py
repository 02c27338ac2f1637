"""The official Anthropic client against an HTTP worker whose microkernel echoes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anthropic
import pytest
from http_world import HttpWorld

AS_TEXT = "system:be brief\nuser:hi\n"
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(world: HttpWorld) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=world.url, api_key=world.admin.text, max_retries=0) as made:
        yield made


def echo(count: int) -> str:
    return (AS_TEXT * 10)[:count]


def test_in_one_piece(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="echo", max_tokens=20, system="be brief", messages=TALK)  # type: ignore[arg-type]
    assert answer.content[0].text == echo(20)  # type: ignore[union-attr]
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(AS_TEXT), 20)


def test_as_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="echo", max_tokens=30, system="be brief", messages=TALK) as stream:  # type: ignore[arg-type]
        assert "".join(stream.text_stream) == echo(30)
        whole = stream.get_final_message()
    assert whole.content[0].text == echo(30)  # type: ignore[union-attr]
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 30


def test_stop_sequences_and_blocks(client: anthropic.Anthropic) -> None:
    blocks = [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "cache_control": {"type": "ephemeral"}}]
    answer = client.messages.create(
        model="echo",
        max_tokens=60,
        system=[{"type": "text", "text": "be brief"}],
        messages=[{"role": "user", "content": blocks}],  # type: ignore[typeddict-item]
        stop_sequences=["user"],
    )
    assert answer.content[0].text == "system:be brief\n"  # type: ignore[union-attr]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "user")


def test_count_tokens(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="echo", system="be brief", messages=TALK)  # type: ignore[arg-type]
    assert counted.input_tokens == len(AS_TEXT)


def test_the_async_client(world: HttpWorld) -> None:
    async def both() -> None:
        async with anthropic.AsyncAnthropic(base_url=world.url, api_key=world.admin.text, max_retries=0) as client:
            answer = await client.messages.create(model="echo", max_tokens=9, system="be brief", messages=TALK)  # type: ignore[arg-type]
            assert answer.content[0].text == echo(9)  # type: ignore[union-attr]
            async with client.messages.stream(
                model="echo",
                max_tokens=9,
                system="be brief",
                messages=TALK,  # type: ignore[arg-type]
            ) as stream:
                assert "".join([text async for text in stream.text_stream]) == echo(9)

    asyncio.run(both())


def test_refusals_have_anthropics_shape(client: anthropic.Anthropic, world: HttpWorld) -> None:
    with pytest.raises(anthropic.BadRequestError, match="tools is not supported") as refusal:
        client.messages.create(
            model="echo",
            max_tokens=9,
            messages=TALK,  # type: ignore[arg-type]
            tools=[{"name": "f", "input_schema": {"type": "object"}}],
        )
    assert refusal.value.body["type"] == "error"  # type: ignore[index]
    assert refusal.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nothing", max_tokens=9, messages=TALK)  # type: ignore[arg-type]
    with pytest.raises(anthropic.BadRequestError, match="the last one must be the user's"):
        client.messages.create(model="echo", max_tokens=9, messages=[*TALK, {"role": "assistant", "content": "so"}])  # type: ignore[list-item]
    stranger = anthropic.Anthropic(base_url=world.url, api_key="llmos_sk_no", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model="echo", max_tokens=9, messages=TALK)  # type: ignore[arg-type]
