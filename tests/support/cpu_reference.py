"""The CPU backend on small random models, and transformers' word on what they should say. For tests only."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from plan_driver import Seq
from small_models import SMALL, make_model

from llmos.config import ModelConfig
from llmos.services.executor.backend import Limits
from llmos.services.executor.cpu import CpuBackend

TOLERANCE = 1e-4
NEW_TOKENS = 64


@functools.cache
def saved_model(kind: str, max_shard_size: str = "1GB"):
    """(transformers model, directory); built once per test process."""
    holder = tempfile.TemporaryDirectory()
    model = make_model(kind, Path(holder.name), max_shard_size=max_shard_size)
    model.keep_directory = holder  # deleted with the model
    return model, Path(holder.name)


def open_cpu(directory: Path, *, max_rows: int = 32, **changes) -> CpuBackend:
    settings = {"page_size": 8, "num_pages": 256, "threads": 1} | changes
    config = ModelConfig(name="m", backend="cpu", **settings)
    return CpuBackend.open(config, directory, Limits(max_rows, 2048), lambda: None)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(SMALL["vocab_size"], (length,), generator=generator).tolist()


def generate(model, tokens: list[int], count: int = NEW_TOKENS) -> list[int]:
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return found[0].tolist()


def check_logprobs(model, seq: Seq) -> None:
    """Chosen and best log-probabilities of every output position."""
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([seq.tokens])).logits[0].float(), -1)
    assert len(seq.logprobs) == len(seq.output)
    for index, (token, found) in enumerate(zip(seq.output, seq.logprobs)):
        expected = logprobs[len(seq.prompt) + index - 1]
        assert abs(found.logprob - expected[token].item()) < TOLERANCE
        best = expected.topk(len(found.top_ids)).values
        assert torch.allclose(torch.tensor(found.top_logprobs), best, atol=TOLERANCE, rtol=0)
        assert torch.allclose(expected[list(found.top_ids)], best, atol=TOLERANCE, rtol=0)


def open_poisoned(directory: Path) -> CpuBackend:
    """A model whose token 7 has an embedding of NaN."""
    backend = open_cpu(directory, num_pages=16)
    embedding = backend.decoder.embedding.clone()
    embedding[7] = float("nan")
    backend.decoder.embedding = embedding
    return backend
