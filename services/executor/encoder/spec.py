"""What an encoder is: `config.json` of a model directory, read into a frozen `EncoderSpec`. Imports no torch.

The families differ in names (names.py) and in the few ways below. Invariant, as for decoders: what `read_encoder_spec` returned is
complete and consistent; whatever is wrong becomes a `ModelError` that names file, key and problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmos.encoders import CLASSIFY, find_encoder, first_position, longest_text
from llmos.errors import ModelError
from llmos.services.executor.config_fields import ConfigFields, read_json
from llmos.services.executor.spec import CONFIG_FILE, DTYPES

SENTENCE_FILE = "sentence_bert_config.json"
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "tanh")
_DISTIL_EPS = 1e-12  # not in its config.json


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """One encoder. `dtype` is "" if config.json does not say. `num_labels`: 0 = it embeds, else it has a classification head whose
    numbers become scores by `score` (none, sigmoid, softmax). `num_types`: of token types, 0 = it knows none. `relative_buckets`: 0 =
    positions are only absolute."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    first_position: int
    num_types: int
    activation: str
    norm_eps: float
    relative_buckets: int
    max_text: int
    num_labels: int
    score: str
    dtype: str

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def is_encoder(directory: Path) -> bool:
    """Does config.json describe an encoder? A file that can not be read does not; whoever loads it says what is wrong."""
    try:
        return find_encoder(read_json(directory / CONFIG_FILE)) is not None
    except ModelError:
        return False


def read_encoder_spec(directory: Path) -> EncoderSpec:
    """Read and check `config.json`; raises `ModelError`."""
    fields = ConfigFields.read(directory, CONFIG_FILE)
    if fields.present("auto_map"):
        raise fields.error("auto_map", "the model brings code of its own, which llmos does not run")
    found = find_encoder(fields.raw)
    if found is None:
        raise fields.error("architectures", "names no encoder that is supported")
    family, task = found
    fields.require("quantization_config", None)
    fields.require("position_embedding_type", "absolute")
    fields.require("is_decoder", False)
    fields.require("add_cross_attention", False)
    distil = family == "distilbert"
    hidden = fields.integer("dim" if distil else "hidden_size")
    heads = fields.integer("n_heads" if distil else "num_attention_heads")
    if hidden % heads:
        raise fields.error("hidden_size", f"{hidden} is not a multiple of the number of heads ({heads})")
    sentence = read_json(directory / SENTENCE_FILE) if (directory / SENTENCE_FILE).exists() else {}
    positions = fields.integer("max_position_embeddings")
    max_text = longest_text(family, fields.raw, sentence) or 0
    if max_text < 1:
        raise fields.error("max_position_embeddings", f"{positions} leaves no position for a token")
    num_labels = _num_labels(fields) if task == CLASSIFY else 0
    return EncoderSpec(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("hidden_dim" if distil else "intermediate_size"),
        num_layers=fields.integer("n_layers" if distil else "num_hidden_layers", high=4096),
        num_heads=heads,
        num_positions=positions,
        first_position=first_position(family, fields.raw),
        num_types=0 if distil or family == "mpnet" else fields.integer("type_vocab_size", default=2),
        activation=_activation(fields, "activation" if distil else "hidden_act"),
        norm_eps=_DISTIL_EPS if distil else fields.number("layer_norm_eps", 1e-12, high=1.0),
        relative_buckets=fields.integer("relative_attention_num_buckets", default=32) if family == "mpnet" else 0,
        max_text=max_text,
        num_labels=num_labels,
        score=_score(fields, num_labels),
        dtype=_dtype(fields),
    )


def _activation(fields: ConfigFields, key: str) -> str:
    name = fields.text(key, "gelu")
    if name not in ACTIVATIONS:
        raise fields.error(key, f"{name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return name


def _dtype(fields: ConfigFields) -> str:
    key = "dtype" if fields.present("dtype") else "torch_dtype"
    dtype = fields.text(key, "")
    if dtype and dtype not in DTYPES:
        raise fields.error(key, f"{dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    return dtype


def _num_labels(fields: ConfigFields) -> int:
    """`num_labels`, or as many as have a name; transformers assumes two."""
    if fields.present("num_labels"):
        return fields.integer("num_labels", high=65_536)
    names = fields.table("id2label").raw
    return len(names) or 2


def _score(fields: ConfigFields, num_labels: int) -> str:
    """What makes scores of the head's numbers: as the file's cross-encoder settings say, else by what the classes are."""
    if not num_labels:
        return "none"
    settings = fields.table("sentence_transformers").raw
    chosen = settings.get("activation_fn", fields.raw.get("sbert_ce_default_activation_function"))
    if isinstance(chosen, str):
        name = chosen.rsplit(".", 1)[-1].lower()
        if name not in ("identity", "sigmoid"):
            raise fields.error(
                "sentence_transformers", f"activation {chosen!r} is not supported; supported: Identity, Sigmoid"
            )
        return "none" if name == "identity" else "sigmoid"
    if num_labels == 1 or fields.text("problem_type", "") == "multi_label_classification":
        return "sigmoid"
    return "softmax"
