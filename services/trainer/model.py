"""The shape of the demonstration model: a small Llama with the head size the GPU kernels are built for."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmos.services.trainer import chat
from llmos.services.trainer.vocabulary import MAX_POSITIONS


def new_model(seed: int, vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=chat.BEGIN_ID,
        eos_token_id=chat.END_ID,
        pad_token_id=chat.PAD_ID,
    )
    return LlamaForCausalLM(config)


def num_parameters(model: LlamaForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
