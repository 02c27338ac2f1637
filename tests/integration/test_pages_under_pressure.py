"""Forks, swapping and preemption on the real CPU executor: what moves pages about must not change a token."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
from daemon import running
from small_models import make_model

from llmos import AsyncClient, Client

pytestmark = pytest.mark.slow
OUTPUT = 48


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[int, ...]:
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return tuple(out[0, len(prompt) :].tolist())


def config(directory: Path, pages: int, extra: str = "") -> str:
    return (
        f'[[models]]\nname = "small"\npath = "{directory}"\ndtype = "float32"\npage_size = 8\nnum_pages = {pages}\n'
        f"threads = 1\n{extra}"
    )


@pytest.mark.parametrize("host_gib", [0.0, 0.05])
def test_preempted_and_swapped_streams_give_transformers_tokens(tmp_path: Path, host_gib: float):
    """12 streams in a pool for about 4: most are preempted, with a host cache by swapping, without by recomputing."""
    model = make_model("llama3-rope-untied", tmp_path / "model")
    rng = random.Random(1)
    prompts = [[rng.randrange(160) for _ in range(rng.randint(5, 40))] for _ in range(12)]
    extra = f"host_cache_gib = {host_gib}\n" if host_gib else ""
    with running(config(tmp_path / "model", 40, extra)) as daemon:

        async def all_streams() -> list:
            async with AsyncClient(daemon.run_dir) as client:
                return await asyncio.gather(
                    *(client.generate(prompt, temperature=0.0, max_tokens=OUTPUT) for prompt in prompts)
                )

        answers = asyncio.run(all_streams())
        with Client(daemon.run_dir) as client:
            lane = client.status().lanes[0]
    assert [answer.token_ids for answer in answers] == [greedy(model, prompt, OUTPUT) for prompt in prompts]
    assert lane.preemptions > 0
    assert (lane.swaps_out > 0) == (host_gib > 0)
    assert lane.swaps_in == lane.swaps_out
    assert lane.host_pages_free == lane.host_pages_total


@pytest.mark.parametrize("pages", ["keep", "swap", "drop"])
def test_suspend_and_resume_with_every_fate_of_pages(tmp_path: Path, pages: str):
    model = make_model("qwen2", tmp_path / "model")
    prompt = [3, 1, 4, 1, 5]
    with (
        running(config(tmp_path / "model", 200, "host_cache_gib = 0.05\n")) as daemon,
        Client(daemon.run_dir) as client,
    ):
        stream = client.generate(prompt, temperature=0.0, max_tokens=300, stream=True)
        ids = list(next(stream).token_ids)
        seq = client.sequence(stream.rid)
        seq.suspend(pages=pages)
        row = seq.stat().row
        assert (row.pages > 0, row.host_pages > 0) == (pages == "keep", pages == "swap")
        client.generate([7] * 100, max_tokens=5)  # others use the pages meanwhile
        seq.resume()
        for chunk in stream:
            ids += chunk.token_ids
    assert tuple(ids) == greedy(model, prompt, 300)


def test_forks_of_a_conversation_answer_like_conversations_of_their_own(tmp_path: Path):
    model = make_model("qwen3", tmp_path / "model")
    prompt = [random.Random(2).randrange(160) for _ in range(45)]
    tails = [[index, index + 1] for index in range(6)]
    with running(config(tmp_path / "model", 200)) as daemon, Client(daemon.run_dir) as client:
        root = client.spawn(prompt)
        first = root.generate(temperature=0.0, max_tokens=10).token_ids
        kids = root.fork(len(tails))
        answers = []
        for kid, tail in zip(kids, tails):
            kid.append(tail)
            answers.append(kid.generate(temperature=0.0, max_tokens=20).token_ids)
        usage = kids[0].stat().usage
        again = root.generate(temperature=0.0, max_tokens=20).token_ids
    assert first == greedy(model, prompt, 10)
    assert answers == [greedy(model, [*prompt, *first, *tail], 20) for tail in tails]
    assert again == greedy(model, [*prompt, *first], 20)
    assert usage.cached_tokens >= len(prompt) + len(first) - 1


def test_the_second_request_computes_only_what_differs(tmp_path: Path):
    make_model("llama-tied", tmp_path / "model")
    common = [random.Random(3).randrange(160) for _ in range(400)]
    with running(config(tmp_path / "model", 300)) as daemon, Client(daemon.run_dir) as client:
        first = client.generate([*common, 1], temperature=0.0, max_tokens=4)
        second = client.generate([*common, 2, 3], temperature=0.0, max_tokens=4)
        alone = client.generate([*common, 2, 3], temperature=0.0, max_tokens=4)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 400
    assert alone.token_ids == second.token_ids
