"""Writes a model directory that AutoModelForCausalLM and AutoTokenizer load offline, and its training record.

Invariants: weights are bfloat16 safetensors; tied weights are stored once; the files together stay below 16 MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from llmos.services.trainer import chat
from llmos.services.trainer.vocabulary import write_tokenizer

MAX_TOTAL_BYTES = 16_000_000
RECORD = "training.json"
STATED_DEFAULTS = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "max_position_embeddings",
    "mlp_bias",
    "rms_norm_eps",
    "rope_parameters",
)


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What the card says about the run; written by the run itself."""

    command: str
    seed: int
    steps: int
    tokens: int
    seconds: float
    loss: float
    machine: str
    threads: int
    parameters: int
    lengths: list[int]
    versions: dict[str, str]


def export_model(model: LlamaForCausalLM, tokenizer: Tokenizer, record: TrainingRecord, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, folder)
    config = {
        **model.config.to_diff_dict(),
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        # The names that readers older than transformers 5 look for.
        "torch_dtype": "bfloat16",
        "rope_theta": model.config.rope_parameters["rope_theta"],
        # Defaults that readers other than transformers should not have to know.
        **{name: getattr(model.config, name) for name in STATED_DEFAULTS},
    }
    _write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": chat.BEGIN_ID,
        "eos_token_id": chat.END_ID,
        "pad_token_id": chat.PAD_ID,
        "do_sample": False,
        "max_new_tokens": 256,
    }
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / RECORD, asdict(record))
    _write_weights(model, folder / "model.safetensors")
    assert total_bytes(folder) < MAX_TOTAL_BYTES


def read_record(folder: Path) -> TrainingRecord:
    return TrainingRecord(**json.loads((folder / RECORD).read_text()))


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _write_weights(model: LlamaForCausalLM, path: Path) -> None:
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes for the owner only
    partial.replace(path)  # readers see the old file or the new one


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
