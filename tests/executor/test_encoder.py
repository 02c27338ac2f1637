"""The encoder backend against transformers in float32 and pooling by its definition; and what its directories may not say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_encoders import (
    CONFIGS,
    LONGEST,
    VOCAB,
    cosine_distance,
    hidden_states,
    make_encoder,
    pooled,
    sentence_layout,
    write,
)

from llmos.codes import FinishReason
from llmos.config import ModelConfig
from llmos.errors import ModelError
from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.messages import RowAdd, StepPlan
from llmos.protocol.params import SamplingParams
from llmos.services.executor.backend import Limits, open_backend
from llmos.services.executor.encoder.backend import EncoderBackend
from llmos.services.executor.encoder.fake import FakeEncoder, fake_vector

pytestmark = pytest.mark.slow
LENGTHS = (7, 1, 60, 16, 17, 33)


def open_encoder(directory: Path, **changes: object) -> EncoderBackend:
    config = ModelConfig(name="m", path=str(directory), threads=1, **changes)
    return open_backend(config, directory, Limits(8, 256), lambda: None)


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(5, VOCAB, (length,), generator=generator).tolist()


class Steps:
    """Gives texts to a backend as the microkernel would."""

    def __init__(self, backend) -> None:
        self.backend = backend
        self.numbers = itertools.count(1)
        self.rows: list[int] = []
        self.failed: dict[int, int] = {}

    def encode(self, *texts: list[int], second_at: int = 0) -> list[torch.Tensor | None]:
        adds = [
            RowAdd(row, 1, pack_i32(ids), len(ids), 0, pack_i32(range(4 * row, 4 * row + 4)), SamplingParams(seed=0), second_at)
            for row, ids in enumerate(texts)
        ]  # fmt: skip
        prefill = pack_i32(value for row, ids in enumerate(texts) for value in (row, 0, len(ids), 0))
        plan = StepPlan(1, next(self.numbers), pack_i32(self.rows), tuple(adds), b"", prefill, b"")
        output = self.backend.execute(plan)
        assert output.samples == b""
        failed = unpack_i32(output.failed)
        self.failed = dict(zip(failed[0::2], failed[1::2]))
        self.rows = list(range(len(texts)))
        found = {result.row: torch.from_numpy(np.frombuffer(result.values, "<f4").copy()) for result in output.results}
        assert all(result.start == 0 for result in output.results)
        return [found.get(row) for row in self.rows]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_of_differing_lengths_equals_transformers_one_by_one(kind, tmp_path):
    model = make_encoder(kind, tmp_path)
    steps = Steps(open_encoder(tmp_path))
    texts = [text(length) for length in LENGTHS]
    found = steps.encode(*texts)
    for ids, vector in zip(texts, found):
        expected = pooled(hidden_states(model, ids), "mean_tokens")
        assert torch.allclose(vector, expected, atol=1e-4, rtol=0)
        assert cosine_distance(vector, expected) < 1e-6
    assert cosine_distance(found[0], found[2]) > 1e-3, "the random model must tell texts apart"


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "mpnet"])
def test_alone_and_among_others_the_same_bits(kind, tmp_path):
    make_encoder(kind, tmp_path)
    steps = Steps(open_encoder(tmp_path))
    [alone] = steps.encode(text(20))
    among = steps.encode(text(31), text(20), text(2), text(22), text(60))[1]
    assert torch.equal(alone, among)


@pytest.mark.parametrize("mode", ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens"])
def test_pooling_and_normalisation_as_the_directory_says(mode, tmp_path):
    model = make_encoder("bert", tmp_path)
    sentence_layout(tmp_path, mode)
    plain = Steps(open_encoder(tmp_path)).encode(text(9), text(40))
    sentence_layout(tmp_path, mode, normalize=True)
    unit = Steps(open_encoder(tmp_path)).encode(text(9), text(40))
    for ids, vector, direction in zip((text(9), text(40)), plain, unit):
        expected = pooled(hidden_states(model, ids), mode)
        assert torch.allclose(vector, expected, atol=1e-4, rtol=0)
        assert torch.allclose(direction, F.normalize(expected, dim=0), atol=1e-5, rtol=0)
        assert direction.norm().item() == pytest.approx(1.0, abs=1e-6)


def test_several_poolings_and_a_dense_layer(tmp_path):
    model = make_encoder("bert", tmp_path)
    torch.manual_seed(3)
    layer = sentence_layout(tmp_path, "mean_tokens", "cls_token", normalize=True, dense=(96, 20, torch.nn.Tanh()))
    backend = open_encoder(tmp_path)
    assert backend.capabilities.output_size == 20
    [vector] = Steps(backend).encode(text(11))
    hidden = hidden_states(model, text(11))
    both = torch.cat([pooled(hidden, "cls_token"), pooled(hidden, "mean_tokens")])
    with torch.inference_mode():
        expected = F.normalize(torch.tanh(layer(both)), dim=0)
    assert torch.allclose(vector, expected, atol=1e-5, rtol=0)


def test_the_newer_way_to_write_the_pooling(tmp_path):
    model = make_encoder("bert", tmp_path)
    sentence_layout(tmp_path, "mean_tokens")
    write(
        tmp_path / "1_Pooling/config.json", {"embedding_dimension": 48, "pooling_mode": "cls", "include_prompt": True}
    )
    [vector] = Steps(open_encoder(tmp_path)).encode(text(11))
    assert torch.allclose(vector, hidden_states(model, text(11))[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("labels", [1, 3])
def test_classification_heads(kind, labels, tmp_path):
    model = make_encoder(kind, tmp_path, "classify", num_labels=labels)
    backend = open_encoder(tmp_path)
    assert backend.capabilities.output_size == labels
    texts = [text(9), text(30)]
    for ids, found in zip(texts, Steps(backend).encode(*texts)):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        expected = torch.sigmoid(logits) if labels == 1 else torch.softmax(logits, 0)
        assert torch.allclose(found, expected, atol=1e-5, rtol=0)


def test_a_cross_encoders_own_activation_and_pairs(tmp_path):
    settings = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}
    model = make_encoder("bert", tmp_path, "classify", num_labels=1, sentence_transformers=settings)
    ids = text(20)
    steps = Steps(open_encoder(tmp_path))
    [pair], [single] = steps.encode(ids, second_at=8), steps.encode(ids)
    with torch.inference_mode():
        types = torch.tensor([[0] * 8 + [1] * 12])
        expected = model(torch.tensor([ids]), token_type_ids=types).logits[0]
    assert torch.allclose(pair, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(pair, single, atol=1e-3)


def test_a_masked_language_model_embeds_and_old_names_of_norms_are_known(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_encoder("bert", tmp_path, "masked")
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.clone()
           for name, value in weights.items()}  # fmt: skip
    assert old.keys() != weights.keys()
    save_file(old, tmp_path / "model.safetensors")
    [vector] = Steps(open_encoder(tmp_path)).encode(text(12))
    assert torch.allclose(vector, pooled(hidden_states(model, text(12)), "mean_tokens"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype, tmp_path):
    model = make_encoder("bert", tmp_path)
    [vector] = Steps(open_encoder(tmp_path, dtype=dtype)).encode(text(25))
    assert cosine_distance(vector, pooled(hidden_states(model, text(25)), "mean_tokens")) < 2e-2


def test_bad_numbers_fail_alone(tmp_path):
    make_encoder("bert", tmp_path)
    backend = open_encoder(tmp_path)
    words = backend.encoder.words.clone()
    words[7] = float("nan")
    backend.encoder.words = words
    steps = Steps(backend)
    good, bad = steps.encode([9, 10, 11], [9, 7, 11])
    assert bad is None
    assert steps.failed == {1: FinishReason.NUMERICAL_ERROR}
    assert torch.equal(good, steps.encode([9, 10, 11])[0])


def test_capabilities(tmp_path):
    make_encoder("roberta", tmp_path)
    found = open_encoder(tmp_path).capabilities
    assert (found.max_context, found.output_size, found.num_pages) == (LONGEST, 48, 8 * 4)
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": False})
    assert open_encoder(tmp_path).capabilities.max_context == 20
    assert open_encoder(tmp_path, max_context=10, num_pages=3).capabilities.max_context == 10
    with pytest.raises(ModelError, match="max_context 21 is over"):
        open_encoder(tmp_path, max_context=21)


def test_the_fake_is_an_encoder_too(tmp_path):
    make_encoder("bert", tmp_path, "classify", num_labels=3)
    backend = open_encoder(tmp_path, backend="fake")
    assert isinstance(backend, FakeEncoder)
    [vector] = Steps(backend).encode([5, 6, 7], second_at=2)
    assert vector.numpy().tobytes() == fake_vector(pack_i32([5, 6, 7]), 2, 3)


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "mish"}, "hidden_act: 'mish' is not supported"),
        ({"num_attention_heads": 5}, "48 is not a multiple of the number of heads"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"auto_map": {"AutoModel": "x.py"}}, "brings code of its own"),
        ({"num_hidden_layers": 2}, "has no place in the model of config.json"),
        ({"vocab_size": 161}, r"shape \[160, 48\], config.json asks for \[161, 48\]"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_configurations_that_can_not_be_served(changes, words, tmp_path):
    make_encoder("bert", tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=words):
        open_encoder(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("modules.json", {}, "not a list"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": ""}], "has no Pooling"),
        ("modules.json", [{"type": "x.LSTM", "path": "1"}], "'LSTM'"),
        ("modules.json", [{"type": "x.Pooling", "path": "../1_Pooling"}], "no path inside"),
        ("modules.json", [{"type": "x.Transformer", "path": "0_Transformer"}], "must lie beside"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 47, "pooling_mode_cls_token": True}, "hidden size is 48"),
        ("1_Pooling/config.json", {}, "no kind of pooling"),
        ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}, "pooling_mode_lasttoken"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "'median'"),
    ],
)  # fmt: skip
def test_layouts_that_can_not_be_served(file, content, words, tmp_path):
    make_encoder("bert", tmp_path)
    sentence_layout(tmp_path, "mean_tokens")
    write(tmp_path / file, content)
    with pytest.raises(ModelError, match=words):
        open_encoder(tmp_path)
