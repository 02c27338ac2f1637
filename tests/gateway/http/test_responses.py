"""/v1/responses by the official client: at once, as a stream, in the background, found again and read on from any event."""

from __future__ import annotations

import openai
import pytest
from http_world import HttpWorld
from loop_thread import wait_until

PROMPT = "user:hi\n"


def echo(count: int, prompt: str = PROMPT) -> str:
    return (prompt * (count // len(prompt) + 1))[:count]


def test_in_one_piece_and_found_again(client: openai.OpenAI) -> None:
    made = client.responses.create(model="echo", input="hi", max_output_tokens=20)
    assert made.output_text == echo(20)
    assert (made.status, made.incomplete_details and made.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (len(PROMPT), 20)
    found = client.responses.retrieve(made.id)
    assert (found.output_text, found.status, found.usage) == (made.output_text, made.status, made.usage)


def test_instructions_and_an_earlier_answer_are_part_of_the_input(client: openai.OpenAI) -> None:
    first = client.responses.create(model="echo", input="hi", max_output_tokens=4)
    items = [{"role": "user", "content": "hi"}, first.output[0].model_dump(), {"role": "user", "content": "on"}]
    whole = f"system:be brief\nuser:hi\nassistant:{first.output_text}\nuser:on\n"
    again = client.responses.create(model="echo", instructions="be brief", input=items, max_output_tokens=60)  # type: ignore[arg-type]
    assert again.output_text == echo(60, whole)


def test_a_stream_can_be_read_on_from_every_event(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="echo", input="hi", max_output_tokens=20, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == echo(20)
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))
    rid = events[0].response.id  # type: ignore[union-attr]
    for place, number in enumerate(numbers):
        rest = list(client.responses.retrieve(rid, stream=True, starting_after=number))
        deltas = "".join(event.delta for event in rest if event.type == "response.output_text.delta")
        had = "".join(event.delta for event in events[: place + 1] if event.type == "response.output_text.delta")
        assert had + deltas == echo(20), number
        assert [event.type for event in rest][-4:] == kinds[max(place + 1, len(kinds) - 4) :], number
        assert [event.sequence_number for event in rest][-4:] == numbers[max(place + 1, len(kinds) - 4) :]


def test_the_background_goes_on_without_a_reader(client: openai.OpenAI, world: HttpWorld) -> None:
    made = client.responses.create(model="echo", input="hi", max_output_tokens=40, background=True)
    assert made.status == "queued"
    assert made.background
    wait_until(lambda: client.responses.retrieve(made.id).status == "incomplete")
    assert client.responses.retrieve(made.id).output_text == echo(40)


def test_cancel(client: openai.OpenAI, world: HttpWorld) -> None:
    world.kernel.paused = True
    made = client.responses.create(model="echo", input="hi", background=True)
    assert client.responses.retrieve(made.id).status in ("queued", "in_progress")
    assert client.responses.cancel(made.id).status == "cancelled"
    world.kernel.paused = False
    assert client.responses.retrieve(made.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.responses.cancel(made.id)


@pytest.mark.parametrize("name", ["resp_1_4711", "resp_x_1", "nothing", "resp_1_0"])
def test_what_is_not_there(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(name)


def test_another_tenant_does_not_find_it(client: openai.OpenAI, world: HttpWorld) -> None:
    made = client.responses.create(model="echo", input="hi", max_output_tokens=4)
    bob = world.add_key("bob")
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=bob.text, max_retries=0) as other:
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.cancel(made.id)
