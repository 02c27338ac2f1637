from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as tiny
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from llmos.errors import InvalidRequest, LlmosError, ModelError, NotFound
from llmos.protocol.messages import ChatMessage
from llmos.protocol.params import SamplingParams
from llmos.services.tokenizer.models import ModelTable, load_model, without_prefix_space

GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def test_text_gets_the_special_tokens_of_the_post_processor(tmp_path: Path) -> None:
    path = tiny.model_dir(tmp_path, tiny.with_bos(tiny.byte_level()))
    reference = AutoTokenizer.from_pretrained(path)
    for text in tiny.SAMPLES:
        assert load_model("m", path).encode_text(text) == reference.encode(text)
    assert load_model("m", path).encode_text("") == [0]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram"])
def test_text_that_continues_gets_nothing_around_it(tmp_path: Path, kind: str) -> None:
    """No special tokens, and no space where the tokenizer puts one before a text: that of the pieces is that of the whole."""
    model = load_model("m", tiny.model_dir(tmp_path, tiny.with_bos(tiny.ALL[kind]())))
    bos = tiny.ALL[kind]().token_to_id("<s>")
    assert model.encode_text("fox")[0] == bos
    text, more = "The quick", "er fox, doesn't it?"
    ids = model.encode_text(text) + model.encode_text(more, continues=True)
    assert ids.count(bos) == 1
    assert model.open_stream(()).step(tuple(ids), True).text == text + more
    assert model.encode_text("", continues=True) == []
    spaced = model.encode_text("one") + model.encode_text(" two", continues=True)
    assert model.open_stream(()).step(tuple(spaced), True).text == "one two"


def test_only_a_tokenizer_that_adds_a_space_is_loaded_twice() -> None:
    assert without_prefix_space(tiny.byte_level()) is tiny.byte_level()
    for tokenizer in (tiny.unigram(), tiny.byte_fallback()):
        other = without_prefix_space(tokenizer)
        assert other is not tokenizer
        assert other.get_vocab() == tokenizer.get_vocab()
    nested = Tokenizer.from_str(tiny.byte_level().to_str())
    nested.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    assert nested.encode("fox").ids != tiny.byte_level().encode("fox").ids
    assert without_prefix_space(nested).encode("fox").ids == tiny.byte_level().encode("fox").ids


@pytest.mark.parametrize("flag", [True, False])
def test_the_post_processor_outranks_the_settings(tmp_path: Path, flag: bool) -> None:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"add_bos_token": flag, "add_eos_token": flag}
    for name, tokenizer in (("bos", tiny.with_bos(tiny.byte_level())), ("plain", tiny.byte_level())):
        path = tiny.model_dir(tmp_path / name, tokenizer, tokenizer_config=config)
        assert load_model("m", path).encode_text("fox") == AutoTokenizer.from_pretrained(path).encode("fox")


def test_tokens_that_only_tokenizer_config_knows_are_added(tmp_path: Path) -> None:
    size = tiny.byte_level().get_vocab_size()
    entries = {
        str(size): {"content": "<|new|>", "special": True},
        str(size + 1): {"content": "<tool>", "special": False},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": entries,
        "eos_token": {"__type": "AddedToken", "content": "<|new|>", "special": True},
    }
    path = tiny.model_dir(tmp_path, tiny.byte_level(), tokenizer_config=config, config={"max_position_embeddings": 8})
    model, reference = load_model("m", path), AutoTokenizer.from_pretrained(path)
    ids = model.encode_text("a<|new|>b<tool>")
    assert ids == reference.encode("a<|new|>b<tool>")
    assert model.open_stream(()).step(tuple(ids), True).text == "ab<tool>"
    assert model.info.eos_token_ids == (size,)
    assert model.info.vocab_size == size + 2


def test_special_tokens_map_is_read_where_tokenizer_config_is_silent(tmp_path: Path) -> None:
    special = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}
    path = tiny.model_dir(
        tmp_path,
        tiny.byte_level(),
        tokenizer_config={"chat_template": "{{ bos_token }}"},
        special_tokens_map=special,
        config={"max_position_embeddings": 8},
    )
    model = load_model("m", path)
    assert model.info.eos_token_ids == (tiny.byte_level().token_to_id("<|im_end|>"),)
    assert model.encode_chat((ChatMessage("user", "x"),)) == [0]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, GREEDY),
        ({}, GREEDY),
        ({"temperature": 0.6, "top_p": 0.9}, GREEDY),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        (
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_k": 20,
                "top_p": 0.8,
                "min_p": 0.05,
                "repetition_penalty": 1.05,
            },
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.05},
        ),
    ],
)
def test_generation_defaults(tmp_path: Path, generation: Any, expected: Any) -> None:
    path = tiny.model_dir(tmp_path, generation_config=generation)
    if isinstance(expected, dict):
        neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        expected = SamplingParams(**(neutral | expected))
    assert load_model("m", path).info.defaults == expected


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 3}, (7, 9)),
        ({}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({}, {}, (1,)),  # eos_token of tokenizer_config.json
    ],
)
def test_end_of_sequence_tokens(tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    config |= {"max_position_embeddings": 64}
    path = tiny.model_dir(tmp_path, tiny.byte_level(), generation_config=generation, config=config)
    assert load_model("m", path).info.eos_token_ids == expected


@pytest.mark.parametrize(("limit", "expected"), [(0, 2048), (100, 100), (4096, 2048)])
def test_context_is_the_models_own_unless_the_configuration_says_less(
    tmp_path: Path, limit: int, expected: int
) -> None:
    assert load_model("m", tiny.model_dir(tmp_path), max_context=limit).info.max_context == expected


def test_a_text_model_inside_a_bigger_one(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 99, "max_position_embeddings": 77, "eos_token_id": 5}}
    info = load_model("m", tiny.model_dir(tmp_path, config=config)).info
    assert (info.vocab_size, info.max_context, info.eos_token_ids) == (99, 77, (5,))


def test_a_directory_without_tokenizer_serves_token_ids_only(tmp_path: Path) -> None:
    model = load_model("m", tiny.model_dir(tmp_path))
    assert model.info.vocab_size == 512
    assert not model.info.has_chat_template
    assert model.describe() == "m: vocab 512, no tokenizer (token ids only)"
    with pytest.raises(InvalidRequest, match="no tokenizer") as caught:
        model.encode_text("x")
    assert caught.value.field == "text"
    with pytest.raises(InvalidRequest) as caught:
        model.encode_chat((ChatMessage("user", "x"),))
    assert caught.value.field == "messages"
    assert model.open_stream(("a",)).step((5, 6), True).text == ""


def test_a_fake_model_needs_no_directory(tmp_path: Path) -> None:
    info = load_model("m", tmp_path / "nothing", fake=True).info
    assert (info.vocab_size, info.max_context, info.eos_token_ids) == (32_000, 8192, ())
    path = tiny.model_dir(tmp_path / "text", tiny.byte_level(), config=None)
    model = load_model("m", path, fake=True, max_context=100)
    assert (model.info.vocab_size, model.info.max_context) == (32_000, 100)
    assert model.encode_text("fox") == tiny.byte_level().encode("fox").ids


def test_pieces_are_readable(tmp_path: Path) -> None:
    model = load_model("m", tiny.model_dir(tmp_path / "a", tiny.byte_level()))
    assert "".join(model.pieces(model.encode_text("The fox\n naïve"))) == "The fox\n naïve"
    assert model.pieces([0, 10**6]) == ("<s>", "")
    model = load_model("m", tiny.model_dir(tmp_path / "b", tiny.byte_fallback()))
    assert "".join(model.pieces(model.encode_text("The fox"))) == " The fox"


def test_named_templates_and_template_file(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "TOOLS"}, {"name": "default", "template": "abc"}]
    path = tiny.model_dir(tmp_path, tiny.byte_level(), tokenizer_config={"chat_template": named})
    talk = (ChatMessage("user", "x"),)
    assert load_model("m", path).encode_chat(talk) == load_model("m", path).encode_text("abc")
    (path / "chat_template.jinja").write_text("file")
    assert load_model("m", path).encode_chat(talk) == load_model("m", path).encode_text("file")


def break_file(name: str, content: str) -> Any:
    return lambda path: (path / name).write_text(content)


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (break_file("config.json", "{"), "config.json"),
        (break_file("config.json", "[1]"), "config.json"),
        (break_file("config.json", '{"vocab_size": 5}'), "max_position_embeddings"),
        (break_file("config.json", '{"vocab_size": -5, "max_position_embeddings": 5}'), "vocab_size"),
        (break_file("config.json", '{"max_position_embeddings": "long"}'), "max_position_embeddings"),
        (break_file("tokenizer.json", '{"version": "1.0"}'), "tokenizer.json"),
        (break_file("tokenizer.json", "\x00\x01"), "tokenizer.json"),
        (
            break_file("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"special": true}}}'),
            "added_tokens_decoder",
        ),
        (break_file("tokenizer_config.json", '{"chat_template": "{% for %}"}'), "chat_template"),
        (break_file("tokenizer_config.json", '{"chat_template": 5}'), "chat_template"),
        (break_file("generation_config.json", '{"do_sample": true, "temperature": -1}'), "temperature"),
        (break_file("generation_config.json", '{"do_sample": true, "top_p": "high"}'), "top_p"),
        (break_file("generation_config.json", '{"do_sample": true, "temperature": NaN}'), "temperature"),
        (break_file("generation_config.json", '{"eos_token_id": "</s>"}'), "eos_token_id"),
        (break_file("config.json", '{"auto_map": {"AutoConfig": "evil.Config"}}'), "auto_map"),
        (break_file("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}'), "auto_map"),
    ],
)
def test_a_broken_directory_is_a_model_error_that_names_the_place(tmp_path: Path, damage: Any, field: str) -> None:
    path = tiny.model_dir(tmp_path, tiny.byte_level())
    damage(path)
    with pytest.raises(ModelError) as caught:
        load_model("m", path)
    assert caught.value.field == field


def test_a_missing_directory_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load_model("m", tmp_path / "nothing")


def test_an_older_format_is_converted_or_refused_by_name(tmp_path: Path) -> None:
    path = tiny.model_dir(tmp_path / "bad", config={"model_type": "llama", "max_position_embeddings": 8})
    (path / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing and tokenizer\.model can not be converted"):
        load_model("m", path)
    path = tiny.model_dir(tmp_path / "gpt2", config={"model_type": "gpt2", "n_positions": 8})
    spec = json.loads(tiny.byte_level().to_str())["model"]
    (path / "vocab.json").write_text(json.dumps(spec["vocab"]))
    merges = [" ".join(pair) for pair in spec["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    model = load_model("m", path)
    assert model.encode_text("The fox") == tiny.byte_level().encode("The fox").ids
    assert model.info.max_context == 8


def test_one_bad_model_harms_no_other() -> None:
    table = ModelTable()
    with pytest.raises(NotFound) as caught:
        table.get("x")
    assert caught.value.field == "model"
    table.add_failed("bad", ModelError("corrupt", field="tokenizer.json"))
    with pytest.raises(ModelError):
        table.check()
    with pytest.raises(ModelError, match="corrupt"):
        table.get("bad")
    assert issubclass(ModelError, LlmosError)
