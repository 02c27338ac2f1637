"""Encoders and scored prompts over HTTP, with the official OpenAI client where it knows the route."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from gateway_world import model_info
from http_world import HttpWorld


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    running = HttpWorld()
    running.models = (
        model_info(),
        model_info("enc", task="embed"),
        model_info("judge", task="classify"),
        model_info("many", task="classify", labels=("a", "b", "c")),
    )
    with running:
        yield running


def post(world: HttpWorld, path: str, **body: Any) -> httpx.Response:
    with world.http() as http:
        return http.post(path, json=body, headers={"authorization": f"Bearer {world.admin.text}"})


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_of_texts_and_of_tokens(client: openai.OpenAI, form: Any) -> None:
    found = client.embeddings.create(model="enc", input=["hello", "a"], encoding_format=form)
    shown = [each.embedding for each in found.data]
    if form == "base64":
        import base64

        shown = [list(struct.unpack("<3f", base64.b64decode(each))) for each in shown]  # type: ignore[arg-type]
    assert shown == [[5.0, 0.0, float(ord("h"))], [1.0, 0.0, float(ord("a"))]]
    assert (found.usage.prompt_tokens, found.usage.total_tokens, found.model) == (6, 6, "enc")
    assert client.embeddings.create(model="enc", input=[7, 8]).data[0].embedding == [2.0, 0.0, 7.0]
    assert len(client.embeddings.create(model="enc", input=[[7, 8], [9]]).data) == 2


def test_fewer_dimensions_are_a_direction_of_length_one(client: openai.OpenAI) -> None:
    [found] = client.embeddings.create(model="enc", input="hey", dimensions=1).data
    assert found.embedding == [1.0]
    [found] = client.embeddings.create(model="enc", input="hey", dimensions=3).data
    assert math.hypot(*found.embedding) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(openai.BadRequestError) as refusal:
        client.embeddings.create(model="enc", input="hey", dimensions=4)
    assert refusal.value.param == "dimensions"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "echo", "input": "x"}, "model"),
        ({"model": "nothing", "input": "x"}, "model"),
        ({"model": "enc", "input": ""}, "input"),
        ({"model": "enc", "input": []}, "input"),
        ({"model": "enc", "input": ["x", 1]}, "input"),
        ({"model": "enc", "input": [-1]}, "input"),
        ({"model": "enc", "input": "x" * 513}, "input"),
        ({"model": "enc", "input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"model": "enc", "input": "x", "task": "query"}, "task"),
        ({"model": "enc", "input": ["x"] * 2049}, "input"),
    ],
)
def test_refused_by_name(world: HttpWorld, body: dict[str, Any], param: str) -> None:
    answer = post(world, "/v1/embeddings", **body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_an_encoder_does_not_chat(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="enc", messages=[{"role": "user", "content": "x"}])
    assert refusal.value.param == "model"


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_rerank_puts_the_best_first(world: HttpWorld, prefix: str) -> None:
    body = {"model": "judge", "query": "q", "documents": ["aa", {"text": "aaaa"}, "a"]}
    answer = post(world, f"{prefix}/rerank", **body).json()
    assert [each["index"] for each in answer["results"]] == [1, 0, 2]
    assert [round(each["relevance_score"], 6) for each in answer["results"]] == [0.05, 0.03, 0.02]
    assert answer["results"][0]["document"] == {"text": "aaaa"}
    answer = post(world, f"{prefix}/rerank", **body, top_n=1, return_documents=False).json()
    assert [list(each) for each in answer["results"]] == [["index", "relevance_score"]]


def test_score_pairs_one_with_all_or_each_with_its_own(world: HttpWorld) -> None:
    one = post(world, "/score", model="judge", text_1="q", text_2=["a", "bb"]).json()
    assert [round(each["score"], 6) for each in one["data"]] == [0.02, 0.03]
    each = post(world, "/v1/score", model="judge", text_1=["q", "qq"], text_2=["a", "bb"]).json()
    assert [round(found["score"], 6) for found in each["data"]] == [0.02, 0.04]
    wrong = post(world, "/score", model="judge", text_1=["q", "qq"], text_2=["a", "b", "c"])
    assert wrong.json()["error"]["param"] == "text_2"
    several = post(world, "/score", model="many", text_1="q", text_2="a")
    assert (several.status_code, several.json()["error"]["param"]) == (400, "model")
    embeds = post(world, "/score", model="enc", text_1="q", text_2="a")
    assert embeds.json()["error"]["param"] == "text_2"


def test_classify_names_the_best_class(world: HttpWorld) -> None:
    answer = post(world, "/classify", model="many", input=["hello", "x"]).json()
    assert [each["label"] for each in answer["data"]] == ["c", "c"]
    assert answer["data"][0]["probs"] == [5.0, 0.0, float(ord("h"))]
    assert post(world, "/classify", model="judge", input="x").json()["data"][0]["label"] == "LABEL_0"


# ---------------------------------------------------------------- scored prompts


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, max_tokens: int) -> None:
    """As lm-eval asks for a log-likelihood."""
    answer = client.completions.create(model="echo", prompt="hello", max_tokens=max_tokens, logprobs=1, echo=True)
    [choice] = answer.choices
    assert choice.text == "hello" + "he"[:max_tokens]
    found = choice.logprobs
    assert found is not None
    assert found.tokens == list("hello" + "he"[:max_tokens])
    assert found.token_logprobs[:5] == [None, -0.5, -1.0, -1.5, -2.0]
    assert found.top_logprobs[:2] == [None, {"e": -1.0}]
    assert found.text_offset[:5] == [0, 1, 2, 3, 4]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, max_tokens)


def test_several_prompts_of_tokens_are_scored(client: openai.OpenAI) -> None:
    prompts = [[104, 105], [97, 98, 99]]
    answer = client.completions.create(model="echo", prompt=prompts, max_tokens=1, logprobs=0, echo=True)
    assert [choice.text for choice in answer.choices] == ["hih", "abca"]
    assert [len(choice.logprobs.token_logprobs) for choice in answer.choices] == [3, 4]


def test_scores_do_not_come_as_a_stream(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="echo", prompt="x", logprobs=1, echo=True, stream=True)
    assert refusal.value.param == "echo"


def test_nothing_at_all_may_be_asked_for(client: openai.OpenAI) -> None:
    [choice] = client.completions.create(model="echo", prompt="hello", max_tokens=0).choices
    assert (choice.text, choice.logprobs) == ("", None)
