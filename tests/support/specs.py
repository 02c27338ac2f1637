"""Specs of models that do not exist. For tests only."""

from __future__ import annotations

from llmos.services.executor.spec import ModelSpec, RopeSpec


def make_spec(**changes) -> ModelSpec:
    fields = {
        "architecture": "LlamaForCausalLM", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "norm_eps": 1e-6, "max_context": 1024, "tie_embeddings": True,
        "qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False, "rope": RopeSpec("default", 1e4),
        "windows": (0, 0), "dtype": "float32",
    }  # fmt: skip
    return ModelSpec(**fields | changes)
