"""Small random encoders of every supported family, as directories that sentence-transformers could read, and what they should give by
transformers and the definition of pooling. For tests only."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    MPNetConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

torch.set_num_threads(1)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB = 160
LONGEST = 60  # tokens of a text

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
_SHIFTED = SMALL | {"max_position_embeddings": LONGEST + 2, "pad_token_id": 1, "type_vocab_size": 1}
CONFIGS = {
    "bert": lambda **more: BertConfig(**SMALL, max_position_embeddings=LONGEST, **more),
    "bert-tanh-gelu": lambda **more: BertConfig(
        **SMALL, max_position_embeddings=LONGEST, hidden_act="gelu_new", layer_norm_eps=1e-5, **more
    ),
    "roberta": lambda **more: RobertaConfig(**_SHIFTED, **more),
    "xlm-roberta": lambda **more: XLMRobertaConfig(**_SHIFTED, **more),
    "camembert": lambda **more: CamembertConfig(**_SHIFTED, **more),
    "distilbert": lambda **more: DistilBertConfig(
        vocab_size=VOCAB, dim=48, hidden_dim=80, n_layers=3, n_heads=4, initializer_range=0.3,
        max_position_embeddings=LONGEST, **more,
    ),
    "mpnet": lambda **more: MPNetConfig(**SMALL, max_position_embeddings=LONGEST + 2, pad_token_id=1, **more),
}  # fmt: skip
_CLASSES = {"embed": AutoModel, "masked": AutoModelForMaskedLM, "classify": AutoModelForSequenceClassification}


def make_encoder(kind: str, directory: Path, task: str = "embed", **config: object) -> PreTrainedModel:
    """Build, save and return a model; every parameter is random, norms and biases too."""
    torch.manual_seed(len(kind))
    made = _CLASSES[task].from_config(CONFIGS[kind](**config), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    made.save_pretrained(directory)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return made


@functools.cache
def make_tokenizer() -> Tokenizer:
    """WordPiece over letters with BERT's [CLS] and [SEP]."""
    pieces = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    made = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def sentence_layout(
    directory: Path, *modes: str, normalize: bool = False, dense: tuple[int, int, torch.nn.Module] | None = None
) -> torch.nn.Linear | None:
    """The files that sentence-transformers writes beside a model; returns the dense layer, if one is asked for."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    pooling = {"word_embedding_dimension": 48} | {f"pooling_mode_{mode}": True for mode in modes}
    write(directory / "1_Pooling" / "config.json", pooling)
    layer = None
    if dense is not None:
        from safetensors.torch import save_file

        layer = torch.nn.Linear(*dense[:2])
        modules.append(("2_Dense", "Dense"))
        settings = {
            "in_features": dense[0], "out_features": dense[1], "bias": True,
            "activation_function": f"torch.nn.modules.activation.{type(dense[2]).__name__}",
        }  # fmt: skip
        write(directory / "2_Dense" / "config.json", settings)
        save_file({"linear.weight": layer.weight, "linear.bias": layer.bias}, directory / "2_Dense/model.safetensors")
    if normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    entries = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(modules)
    ]
    write(directory / "modules.json", entries)
    return layer


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, ids: Sequence[int], types: Sequence[int] | None = None) -> torch.Tensor:
    """Vectors of one text's tokens, computed alone."""
    base = model.base_model if hasattr(model, "base_model") else model
    extra = {"token_type_ids": torch.tensor([types])} if types is not None else {}
    return base(torch.tensor([ids]), **extra).last_hidden_state[0]


def pooled(hidden: torch.Tensor, mode: str) -> torch.Tensor:
    """By the definition."""
    if mode == "cls_token":
        return hidden[0]
    if mode == "max_tokens":
        return hidden.max(0).values
    total = hidden.sum(0)
    return total / (len(hidden) if mode == "mean_tokens" else len(hidden) ** 0.5)


def cosine_distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return 1.0 - F.cosine_similarity(left.double(), right.double(), dim=0).item()
