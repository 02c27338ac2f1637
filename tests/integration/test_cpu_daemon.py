"""The whole daemon with the CPU executor, against transformers: greedy tokens and log-probabilities, and the shipped demo model."""

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

STREAMS = 32
OUTPUT = 64


def reference(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[tuple[int, ...], list[float]]:
    """Greedy continuation by transformers, and the log-probability of each of its tokens, in float32."""
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        logprobs = torch.log_softmax(model(out).logits[0].float(), dim=-1)
    tokens = out[0, len(prompt) :].tolist()
    return tuple(tokens), [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens)]


@pytest.mark.parametrize("kind", ["llama3-rope-untied", "mistral", "qwen2", "qwen3"])
def test_parity_through_the_whole_system_under_pressure(kind: str, tmp_path: Path):
    """32 streams in a pool for about 10, prompts in chunks, half of them with a common prefix: same tokens as transformers alone."""
    model = make_model(kind, tmp_path / "model")
    rng = random.Random(kind)
    common = [rng.randrange(160) for _ in range(40)]
    prompts = [
        (common if index % 2 else []) + [rng.randrange(160) for _ in range(rng.randint(1, 60))]
        for index in range(STREAMS)
    ]
    config = f"""
[microkernel]
max_step_tokens = 48
[[models]]
name = "small"
path = "{tmp_path / "model"}"
dtype = "float32"
page_size = 8
num_pages = 160
threads = 1
"""
    with running(config) as daemon:

        async def all_streams() -> list:
            async with AsyncClient(daemon.run_dir) as client:
                calls = (client.generate(p, temperature=0.0, max_tokens=OUTPUT, logprobs=0) for p in prompts)
                return await asyncio.gather(*calls)

        with Client(daemon.run_dir) as client:
            alone = client.generate(prompts[1], temperature=0.0, max_tokens=OUTPUT, logprobs=0)
            together = asyncio.run(all_streams())
            (lane,) = client.status().lanes
    assert lane.preemptions > 0
    assert lane.prefix_hit_tokens > 0
    for prompt, completion in [(prompts[1], alone), *zip(prompts, together)]:
        tokens, logprobs = reference(model, prompt, OUTPUT)
        assert completion.token_ids == tokens
        found = [entry.logprob for entry in completion.logprobs]
        assert found == pytest.approx(logprobs, abs=1e-4)


def test_sampling_is_the_same_alone_and_among_31_others(tmp_path: Path):
    make_model("llama-tied", tmp_path / "model")
    config = f'[[models]]\nname = "small"\npath = "{tmp_path / "model"}"\nthreads = 1\n'
    with running(config) as daemon:

        async def run(count: int) -> list:
            async with AsyncClient(daemon.run_dir) as client:
                calls = (
                    client.generate([1, 2, 3, index], seed=index, temperature=1.0, top_p=0.9, max_tokens=48)
                    for index in range(count)
                )
                return await asyncio.gather(*calls)

        alone, together = asyncio.run(run(1)), asyncio.run(run(32))
    assert together[0].token_ids == alone[0].token_ids
    assert len({completion.token_ids for completion in together}) == 32


def test_the_demo_model_answers():
    with running("") as daemon, Client(daemon.run_dir) as client:
        answer = client.generate([{"role": "user", "content": "What is the capital of France?"}], max_tokens=40)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
