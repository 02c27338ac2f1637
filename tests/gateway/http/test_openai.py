"""The official OpenAI client against an HTTP worker whose microkernel echoes: the right answer to everything is known."""

from __future__ import annotations

import asyncio

import openai
import pytest
from http_world import HttpWorld
from loop_thread import wait_until

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
AS_TEXT = "system:be brief\nuser:hi\n"  # what the fake template makes of it


def echo(prompt: str, count: int) -> str:
    return (prompt * (count // len(prompt) + 1))[:count]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "llmos"
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("nothing")
    assert refusal.value.code == "model_not_found"


def test_chat_in_one_piece(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=CHAT, max_tokens=30)
    assert answer.choices[0].message.content == echo(AS_TEXT, 30)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(AS_TEXT), 30)
    assert answer.id.startswith("chatcmpl-")


def test_chat_as_a_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="echo", messages=CHAT, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == echo(AS_TEXT, 30)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 30 + len(AS_TEXT)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_content_in_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": parts}], max_tokens=8)
    assert answer.choices[0].message.content == "user:ab\n"


def test_samples_come_by_index_and_share_the_prompt(client: openai.OpenAI, world: HttpWorld) -> None:
    answer = client.chat.completions.create(model="echo", messages=CHAT, max_tokens=9, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {echo(AS_TEXT, 9)}
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(AS_TEXT), 27)
    made = [seq for seq in world.kernel.ended.values() if seq.params is not None and seq.params.seed is not None][-3:]
    assert [seq.params.seed for seq in made if seq.params is not None] == [7, 8, 9]
    assert [seq.job for seq in made] == [made[0].rid] * 3  # accounted together


def test_a_stream_of_samples(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(model="echo", messages=CHAT, max_tokens=20, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: echo(AS_TEXT, 20), 1: echo(AS_TEXT, 20)}


def test_stop_strings_end_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=CHAT, max_tokens=60, stop=["user"])
    assert answer.choices[0].message.content == "system:be brief\n"
    assert answer.choices[0].finish_reason == "stop"
    text = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model="echo", messages=CHAT, max_tokens=60, stop="user", stream=True
        )
    )
    assert text == "system:be brief\n"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abcabca"]),
        (["abc", "xy"], ["abcabca", "xyxyxyx"]),
        ([97, 98], ["abababa"]),
        ([[97, 98], [99]], ["abababa", "ccccccc"]),
    ],
)
def test_completions_of_every_form_of_prompt(client: openai.OpenAI, prompt: object, texts: list[str]) -> None:
    answer = client.completions.create(model="echo", prompt=prompt, max_tokens=7)  # type: ignore[arg-type]
    assert [choice.text for choice in answer.choices] == texts
    found = [""] * len(texts)
    for chunk in client.completions.create(model="echo", prompt=prompt, max_tokens=7, stream=True):  # type: ignore[arg-type]
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == texts


def test_echo_repeats_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt=["ab", "c"], max_tokens=3, echo=True, n=2)
    assert [choice.text for choice in answer.choices] == ["ababa", "ababa", "cccc", "cccc"]
    by_tokens = client.completions.create(model="echo", prompt=[97, 98], max_tokens=3, echo=True)
    assert by_tokens.choices[0].text == "ababa"
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model="echo", prompt="ab", max_tokens=3, echo=True, stream=True)
    )
    assert text == "ababa"


def test_parameters_arrive(client: openai.OpenAI, world: HttpWorld) -> None:
    client.completions.create(
        model="echo",
        prompt="abc",
        max_tokens=3,
        temperature=0.25,
        top_p=0.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": 3.0},
        seed=-1,
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "priority": 4},
        extra_headers={"llmos-deadline-ms": "60000"},
    )
    seq = list(world.kernel.ended.values())[-1]
    params = seq.params
    assert params is not None
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.25, 0.5, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.5)
    assert (params.logit_bias, params.seed) == (((65, 3.0),), 2**63 - 1)
    assert seq.nice == 4
    assert seq.deadline_ms is not None
    assert 0 < seq.deadline_ms <= 60_000


def test_the_async_client(world: HttpWorld) -> None:
    async def both() -> None:
        async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=world.admin.text, max_retries=0) as client:
            answer = await client.chat.completions.create(model="echo", messages=CHAT, max_tokens=12)
            assert answer.choices[0].message.content == echo(AS_TEXT, 12)
            text = ""
            async for chunk in await client.chat.completions.create(
                model="echo", messages=CHAT, max_tokens=12, stream=True
            ):
                text += chunk.choices[0].delta.content or ""
            assert text == echo(AS_TEXT, 12)

    asyncio.run(both())


def test_a_stream_that_is_left_early_ends_its_sequence(client: openai.OpenAI, world: HttpWorld) -> None:
    world.kernel.window = 64
    stream = client.completions.create(model="echo", prompt="abc", max_tokens=400, stream=True)
    next(iter(stream))
    rid = next(iter(world.kernel.sequences))
    stream.close()

    wait_until(lambda: rid in world.kernel.ended)
    world.kernel.window = 4096
    assert world.kernel.ended[rid].reason == 3  # cancelled
