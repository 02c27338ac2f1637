"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share; what differs is data in the `ModelSpec`.

Weights are merged at load (q, k and v; gate and up) and go through a `Linear` factory, so that a backend decides how they are
stored and multiplied. Activations are float32; the KV cache has the model's dtype. One token is one row of the batch, and nothing
here knows pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos.services.executor.models.rope import Rope
from llmos.services.executor.spec import ModelSpec

Linear = Callable[[Tensor], Tensor]
LinearFactory = Callable[[Tensor, Tensor | None], Linear]


class Attention(Protocol):
    """What the decoder needs of an attention backend; see `attention.PagedAttention`."""

    def store(self, layer: int, kv: Tensor) -> None: ...

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor: ...


class Weights(Protocol):
    """Where the decoder takes its tensors from; see `checkpoint.Checkpoint`."""

    def take(self, name: str, *shape: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Token ids in, logits out."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, dtype: torch.dtype, linear: LinearFactory, tick: Callable[[], None]
    ) -> None:
        self.spec = spec
        self.rope = Rope(spec.rope, spec.head_dim)
        self.tick = tick
        self._eps = torch.tensor(spec.norm_eps)
        loader = _LayerLoader(spec, weights, dtype, linear)
        # Copied: what stays in memory must not be a mapping of a file that may change under us.
        shape = (spec.vocab_size, spec.hidden_size)
        embedding = weights.take("model.embed_tokens.weight", *shape)
        self.embedding = embedding.to(dtype, copy=True)
        self.layers: list[Layer] = []
        for index in range(spec.num_layers):
            self.layers.append(loader.load(f"model.layers.{index}."))
            tick()
        self.norm = loader.norm("model.norm.weight", spec.hidden_size)
        head = self.embedding if spec.tie_embeddings else weights.take("lm_head.weight", *shape)
        self.lm_head = linear(head.to(dtype), None)

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """token_ids, positions: int64[tokens] -> hidden states before the last norm, float32[tokens, hidden]."""
        cos, sin = self.rope.at(positions)
        hidden = self.embedding.index_select(0, token_ids).float()
        for index, layer in enumerate(self.layers):
            x = self._norm(hidden, layer.input_norm)
            hidden += layer.output(self._attend(index, layer, x, cos, sin, attention))
            gate, up = layer.gate_up(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden += layer.down(F.silu(gate).mul_(up))
            self.tick()
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] from `forward` -> float32[rows, vocab]."""
        return self.lm_head(self._norm(hidden, self.norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension: `F.rms_norm`, which is ten small operations on the CPU, in half its time."""
        length = torch.linalg.vector_norm(x, 2, -1, True)
        inverse = torch.addcmul(self._eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()
        return x.mul(inverse).mul_(weight)

    def _attend(self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        spec = self.spec
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, spec.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv[:, :heads] = self._norm(qkv[:, :heads], layer.q_norm)
            qkv[:, heads:-kv_heads] = self._norm(qkv[:, heads:-kv_heads], layer.k_norm)
        rotated = qkv[:, :-kv_heads]
        half_turned = torch.roll(rotated, spec.head_dim // 2, -1)
        rotated.mul_(cos).addcmul_(half_turned, sin)
        kv = qkv[:, heads:]
        attention.store(index, kv)
        return attention.attend(index, qkv[:, :heads], kv)


class _LayerLoader:
    """Takes one layer's tensors from the checkpoint and merges them."""

    def __init__(self, spec: ModelSpec, weights: Weights, dtype: torch.dtype, linear: LinearFactory) -> None:
        self.spec = spec
        self._weights = weights
        self._dtype = dtype
        self._linear = linear

    def load(self, prefix: str) -> Layer:
        spec = self.spec
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return Layer(
            input_norm=self.norm(prefix + "input_layernorm.weight", spec.hidden_size),
            qkv=self._merge(attn, {"q_proj": q, "k_proj": kv, "v_proj": kv}, spec.hidden_size, spec.qkv_bias),
            q_norm=self.norm(attn + "q_norm.weight", spec.head_dim) if spec.qk_norm else None,
            k_norm=self.norm(attn + "k_norm.weight", spec.head_dim) if spec.qk_norm else None,
            output=self._merge(attn, {"o_proj": spec.hidden_size}, q, spec.o_bias),
            mlp_norm=self.norm(prefix + "post_attention_layernorm.weight", spec.hidden_size),
            gate_up=self._merge(
                mlp,
                {"gate_proj": spec.intermediate_size, "up_proj": spec.intermediate_size},
                spec.hidden_size,
                spec.mlp_bias,
            ),
            down=self._merge(mlp, {"down_proj": spec.hidden_size}, spec.intermediate_size, spec.mlp_bias),
        )

    def norm(self, name: str, size: int) -> Tensor:
        return self._weights.take(name, size).to(self._dtype).to(torch.float32, copy=True)

    def _merge(self, prefix: str, parts: dict[str, int], in_features: int, bias: bool) -> Linear:
        """One product for projections that read the same input. `parts`: projection -> output features."""
        weights = [
            self._weights.take(f"{prefix}{part}.weight", size, in_features).to(self._dtype)
            for part, size in parts.items()
        ]
        biases = (
            [self._weights.take(f"{prefix}{part}.bias", size).to(self._dtype) for part, size in parts.items()]
            if bias
            else []
        )
        return self._linear(torch.cat(weights), torch.cat(biases) if bias else None)
