"""Small random models of every supported architecture, made with transformers and saved to a directory. For tests only."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

torch.set_num_threads(1)

SMALL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    # Large enough that logits differ clearly between tokens: greedy choices then do not hang on rounding.
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama3-rope-untied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "llama-linear-bias": lambda: LlamaConfig(
        **SMALL,
        attention_bias=True,
        mlp_bias=True,
        head_dim=8,
        rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    ),
    "llama-yarn": lambda: LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SMALL, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen2-window": lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
}


def make_model(kind: str, directory: Path, *, seed: int = 0, max_shard_size: str = "1GB") -> PreTrainedModel:
    """Build, save and return a model; every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model
