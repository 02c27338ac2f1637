"""The shipped model: small, complete, loadable offline, and right about a handful of its own card's prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from llmos.services.trainer import chat
from llmos.services.trainer.evaluation import Answerer
from llmos.services.trainer.export import MAX_TOTAL_BYTES, read_record, total_bytes
from llmos.services.trainer.items import Item
from llmos.services.trainer.stories import TASK, is_sound

FOLDER = Path(__file__).parents[2] / "llmos" / "assets" / "demo-model"


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_the_files_are_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert total_bytes(FOLDER) < MAX_TOTAL_BYTES


def test_weights_are_bfloat16_and_counted_in_the_record() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118 - not a dict
        assert {entry.get_dtype() for entry in slices} == {"BF16"}
        count = 0
        for entry in slices:
            size = 1
            for extent in entry.get_shape():
                size *= extent
            count += size
    assert count == read_record(FOLDER).parameters


def test_configuration_suits_the_paged_kernels() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 2048
    assert config["eos_token_id"] == generation["eos_token_id"] == chat.END_ID
    assert generation["do_sample"] is False


def test_the_template_renders_as_the_training_text_did(tokenizer) -> None:
    turns = [chat.Turn("system", "Answer briefly."), chat.Turn("user", " Hi! "), chat.Turn("assistant", "Hello!")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == chat.render(turns)
    prompted = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompted == chat.render(turns[:2]) + chat.ASSISTANT
    with pytest.raises(Exception, match="roles are"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


@pytest.mark.parametrize("text", ["The fox has 12 apples.", "我喜欢一只猫。", "🎉🙂👩‍👩‍👧", "a  b\n c", "Ελλάδα"])
def test_the_tokenizer_round_trips(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens(tokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids(list(chat.SPECIAL_TOKENS)) == list(range(6))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("Label the sentiment: The film was boring. Never again.", "The review is negative."),
        ("What is 47 + 85?", "7+5=12, 4+8+1=13, so 47 + 85 = 132."),
        ("Sort these numbers: 42, 7, 19", "7, 19, 42"),
        ("Translate to Chinese: I like a red hat.", "我喜欢一顶红色的帽子。"),
    ],
)
def test_the_model_answers(answerer: Answerer, prompt: str, answer: str) -> None:
    assert answerer.answer([prompt]) == [answer]


def test_the_model_tells_a_story(answerer: Answerer) -> None:
    (text,) = answerer.answer(["Tell me a story about a fox and sharing."])
    assert is_sound(Item(TASK, "fox|sharing", "", ""), text)


def test_the_model_keeps_up_over_several_turns(answerer: Answerer) -> None:
    chat_so_far = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of Japan?"},
        {"role": "assistant", "content": "The capital of Japan is Tokyo."},
        {"role": "user", "content": "Sort these numbers: 9, 3, 51"},
        {"role": "assistant", "content": "3, 9, 51"},
        {"role": "user", "content": "What is the opposite of big?"},
    ]
    assert answerer.answer_chats([chat_so_far]) == ["The opposite of big is small."]
