"""The whole daemon with a decoder, an encoder and a cross-encoder: vectors and log-likelihoods equal transformers', whoever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from daemon import Daemon, running, wait_until
from small_encoders import cosine_distance, hidden_states, make_encoder, make_tokenizer, pooled, sentence_layout
from small_models import make_model
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmos import AsyncClient, Client, ContextTooLong, InvalidRequest
from llmos.client.types import Likelihood
from llmos.ctl.main import app
from llmos.protocol.codec import pack_i32
from llmos.services.executor.encoder.fake import fake_vector

pytestmark = pytest.mark.slow
WORDS = ["the quick brown fox", "a", "jumps over 13 lazy dogs!", "hello world", "to be, or not to be"]


class Served:
    """The daemon, and transformers' models of what it serves."""

    def __init__(self, daemon: Daemon, decoder: PreTrainedModel, encoder: PreTrainedModel) -> None:
        self.daemon, self.decoder, self.encoder = daemon, decoder, encoder

    def vector(self, text: str) -> torch.Tensor:
        ids = make_tokenizer().encode(text).ids
        hidden = pooled(hidden_states(self.encoder, ids), "mean_tokens")
        return torch.nn.functional.normalize(hidden, dim=0)

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(self.decoder(torch.tensor([ids])).logits[0].float(), -1)

    def check(self, likelihood: Likelihood, ids: list[int]) -> None:
        expected = self.logprobs(ids)
        assert [token.token_id for token in likelihood.tokens] == ids
        assert math.isnan(likelihood.tokens[0].logprobs.logprob)
        for position in range(1, len(ids)):
            found = likelihood.tokens[position].logprobs
            assert found.logprob == pytest.approx(expected[position - 1, ids[position]].item(), abs=1e-4)
            assert found.top_logprobs[0] == pytest.approx(expected[position - 1].max().item(), abs=1e-4)

    def child(self, name: str) -> psutil.Process | None:
        """None: it has just died, or another one did while we looked."""
        with contextlib.suppress(psutil.Error):
            return self.daemon.children().get(name)
        return None

    def kill(self, name: str) -> None:
        """And wait until another one is there."""
        victim = self.child(name)
        assert victim is not None
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: (found := self.child(name)) is not None and found.pid != victim.pid, f"another {name}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home: Path = tmp_path_factory.mktemp("models")
    decoder = make_model("llama-tied", home / "decoder")
    make_tokenizer().save(str(home / "decoder/tokenizer.json"))
    encoder = make_encoder("bert", home / "encoder")
    sentence_layout(home / "encoder", "mean_tokens", normalize=True)
    make_encoder("bert", home / "judge", "classify", num_labels=1)
    config = f"""
[microkernel]
max_step_tokens = 64
[[models]]
name = "decoder"
path = "{home}/decoder"
dtype = "float32"
page_size = 8
num_pages = 60
threads = 1
[[models]]
name = "encoder"
path = "{home}/encoder"
threads = 1
[[models]]
name = "judge"
path = "{home}/judge"
backend = "fake"
"""
    with running(config) as daemon:
        yield Served(daemon, decoder, encoder)


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.daemon.run_dir, timeout_s=60) as connected:
        yield connected


def test_vectors_equal_transformers(served: Served, client: Client):
    found = client.embed(WORDS, model="encoder")
    for text, embedding in zip(WORDS, found):
        assert cosine_distance(torch.from_numpy(np.asarray(embedding.vector)), served.vector(text)) < 1e-5
        assert embedding.usage.prompt_tokens == len(make_tokenizer().encode(text).ids)
    one = client.embed(make_tokenizer().encode(WORDS[0]).ids, model="encoder")
    assert one.vector == found[0].vector


def test_long_texts_are_refused_or_cut(served: Served, client: Client):
    text = "abcde " * 40
    with pytest.raises(ContextTooLong, match="encoder has a context of 60"):
        client.embed(text, model="encoder")
    cut = client.embed(text, model="encoder", truncate=True)
    assert cut.usage.prompt_tokens == 60
    ids = make_tokenizer().encode(text).ids[:59]
    expected = pooled(hidden_states(served.encoder, [*ids, 3]), "mean_tokens")
    assert cosine_distance(torch.from_numpy(np.asarray(cut.vector)), expected) < 1e-5


def test_pairs_are_judged_with_their_border(client: Client):
    query, texts = "what is a fox?", WORDS[:3]
    found = client.score(query, texts, model="judge")
    for text, score in zip(texts, found):
        pair = make_tokenizer().encode(query, text)
        expected = fake_vector(pack_i32(pair.ids), pair.type_ids.index(1), 1)
        assert np.float32(score).tobytes() == expected
    [verdict] = client.classify(WORDS[0], model="judge")
    assert (verdict.label, len(verdict.scores)) == ("0", 1)


def test_every_kind_refuses_the_other_by_name(client: Client):
    with pytest.raises(InvalidRequest, match="'encoder' is an encoder") as caught:
        client.generate([1, 2], model="encoder")
    assert caught.value.field == "model"
    with pytest.raises(InvalidRequest, match="'decoder' generates text"):
        client.embed("x", model="decoder")
    with pytest.raises(InvalidRequest, match="does not judge pairs"):
        client.score("x", ["y"], model="encoder")


def test_loglikelihoods_equal_transformers(served: Served, client: Client):
    ids = [5 + index * 7 % 150 for index in range(200)]
    served.check(client.loglikelihood(ids, model="decoder"), ids)
    context, rest = "the quick brown", " fox jumps"
    whole = make_tokenizer().encode(context + rest).ids
    found = client.loglikelihood(context, rest, model="decoder")
    served.check(found, whole)
    first = len(make_tokenizer().encode(context).ids)
    expected = served.logprobs(whole)
    total = sum(expected[i - 1, whole[i]].item() for i in range(first, len(whole)))
    assert found.total == pytest.approx(total, abs=1e-3)
    assert not found.is_greedy
    answer = client.generate(ids[:50], model="decoder", max_tokens=5, prompt_logprobs=1, temperature=0)
    assert len(answer.token_ids) == 5
    assert [token.token_id for token in answer.prompt_logprobs or ()] == ids[:50]


@pytest.mark.parametrize("victim", ["microkernel", "gateway", "executor.encoder"])
def test_whoever_is_killed_nothing_is_lost_or_changed(served: Served, victim: str):
    """Many texts and prompts under way; the same answers."""
    prompts = [[5 + (seed + index * 11) % 150 for index in range(60)] for seed in range(16)]
    texts = [f"{word} {number}" for number in range(40) for word in WORDS]

    async def scenario() -> tuple[list, list]:
        async with AsyncClient(served.daemon.run_dir, timeout_s=60) as client:
            vectors = asyncio.ensure_future(client.embed(texts, model="encoder"))
            likelihoods = asyncio.gather(*(client.loglikelihood(prompt, model="decoder") for prompt in prompts))
            while not (await client.ps()):
                pass
            await asyncio.to_thread(served.kill, victim)
            return await vectors, await likelihoods

    vectors, likelihoods = asyncio.run(scenario())
    for text, embedding in list(zip(texts, vectors))[::13]:
        assert cosine_distance(torch.from_numpy(np.asarray(embedding.vector)), served.vector(text)) < 1e-5
    for prompt, likelihood in zip(prompts, likelihoods):
        served.check(likelihood, prompt)


def test_ctl(served: Served):
    def ctl(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["--run-dir", str(served.daemon.run_dir), *arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert ctl("embed", WORDS[0], WORDS[1], "-m", "encoder").startswith("48 numbers, 18 tokens: ")
    assert '"vector"' in ctl("embed", WORDS[0], "-m", "encoder", "--json")
    assert ctl("classify", WORDS[0], "-m", "judge").startswith("0 0.")
    assert len(ctl("score", "q", *WORDS, "-m", "judge").splitlines()) == len(WORDS)
