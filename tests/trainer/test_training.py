"""Tokenizer, packing, optimizer and schedule."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmos.services.trainer import chat
from llmos.services.trainer.muon import orthogonalized
from llmos.services.trainer.packing import PROMPT_WEIGHT, Packer, loss_weights
from llmos.services.trainer.schedule import CONTINUED, FIRST_REST, FRESH, Limits, Plan
from llmos.services.trainer.training import train
from llmos.services.trainer.vocabulary import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(seed=3, num_documents=400, vocab_size=600)


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        "12 + 345 = 357",
        "我们有三本书。",
        "🎉🙂👩‍👩‍👧",
        "  two  spaces\n\ttab",
        "naïve Ελλάδα",
        "<b>&amp;</b>",
    ],
)
def test_any_text_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_are_tokens_of_their_own(tokenizer) -> None:
    tokens = tokenizer.encode("12345", add_special_tokens=False).tokens
    assert tokens == list("12345")


def test_special_tokens_have_the_first_ids(tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in chat.SPECIAL_TOKENS] == list(range(len(chat.SPECIAL_TOKENS)))
    assert tokenizer.encode("hi").ids[0] == chat.BEGIN_ID


def test_tokenizer_is_a_function_of_the_seed(tokenizer) -> None:
    assert train_tokenizer(seed=3, num_documents=400, vocab_size=600).to_str() == tokenizer.to_str()


def test_answers_weigh_in_full_and_prompts_little(tokenizer) -> None:
    assistant = chat.SPECIAL_TOKENS.index(chat.ASSISTANT)
    user = chat.SPECIAL_TOKENS.index(chat.USER)
    ids = [chat.BEGIN_ID, user, 100, chat.END_ID, assistant, 101, chat.END_ID, user, 102]
    little = PROMPT_WEIGHT
    assert loss_weights(ids, assistant) == [0.0, little, little, little, little, 1.0, 1.0, little, little]
    assert loss_weights([chat.BEGIN_ID, 100, 101, chat.END_ID], assistant) == [0.0, 1.0, 1.0, 1.0]


def test_batches_continue_one_stream(tokenizer) -> None:
    packer = Packer(tokenizer, seed=1)
    first, second = packer.batch(2, 16), packer.batch(1, 32)
    assert first.inputs.shape == first.targets.shape == first.weights.shape == (2, 16)
    assert first.inputs.flatten()[0] == chat.BEGIN_ID
    assert torch.equal(first.targets.flatten()[:-1], first.inputs.flatten()[1:])
    assert first.targets.flatten()[-1] == second.inputs.flatten()[0]  # nothing lost, nothing twice
    whole = Packer(tokenizer, seed=1).batch(1, 64)
    assert torch.equal(torch.cat((first.inputs.flatten(), second.inputs.flatten())), whole.inputs.flatten())


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_orthogonalized_has_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalized(batch))
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_schedule_cools_down_at_the_first_rest_and_at_the_end() -> None:
    fresh, continued = (Plan(0, Limits(1, None), schedule) for schedule in (FRESH, CONTINUED))
    assert fresh.learning_rate_share(0.1) == fresh.learning_rate_share(0.5) == 1.0
    assert fresh.learning_rate_share(FIRST_REST) < 0.1
    assert fresh.learning_rate_share(1.0) == continued.learning_rate_share(1.0) == 0.0


def test_the_limit_that_comes_first_ends_the_run() -> None:
    now = time.monotonic()
    assert Limits(10, None).progress(5, now) == 0.5
    assert Limits(10, 1.0).progress(0, now - 45) == pytest.approx(0.75, abs=0.05)
    assert Limits(10, 1.0).progress(20, now) == 1.0


def test_training_is_repeatable_and_rests_once(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("llmos.services.trainer.training.ROW_LENGTHS", (32, 64))
    losses, rests = [], []
    for _ in range(2):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
        summary = train(
            LlamaForCausalLM(config), tokenizer, Plan(0, Limits(12, None), FRESH, batch_tokens=64), rests.append
        )
        losses.append(summary.loss)
        assert (summary.steps, summary.tokens) == (12, 12 * 64)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(rests) == 2
