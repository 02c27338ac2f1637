"""The encoder that BERT, RoBERTa, DistilBERT and MPNet share: token ids in, one vector per token out. Device-agnostic torch.

One token is one row: what is not attention runs over all texts of a step without padding. For attention, texts are grouped by their
length rounded up, so a text's numbers do not depend on who is computed beside it. Activations are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos.services.executor.checkpoint import Checkpoint
from llmos.services.executor.encoder.names import NAMES, UNUSED, UNUSED_PARTS
from llmos.services.executor.encoder.spec import EncoderSpec
from llmos.services.executor.models.decoder import Linear, LinearFactory

_ROUND = 16  # text lengths in attention; a multiple of what vector units like
_MAX_DISTANCE = 128  # of MPNet's relative positions
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer."""

    qkv: Linear
    attention_out: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    output_norm: Norm


@dataclass(frozen=True, slots=True)
class Group:
    """Texts of about one length. index: int64[texts, length], places of their tokens in the batch, padded with the text's own first one.
    mask: what is added to the scores, float32[texts, 1 or heads, 1 or length, length]. `inside`: bool[texts, length]."""

    index: Tensor
    mask: Tensor
    inside: Tensor


class Encoder:
    """Token ids in, token vectors out; and the head, if it has one."""

    def __init__(
        self,
        spec: EncoderSpec,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        linear: LinearFactory,
        device: torch.device,
        tick: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.device = device
        self.tick = tick
        self._act = _ACTIVATIONS[spec.activation]
        loader = _Loader(spec, checkpoint, dtype, linear, device)
        self.words = loader.table("word_embeddings", spec.vocab_size)
        self.positions = loader.table("position_embeddings", spec.num_positions)
        self.types = loader.table("token_type_embeddings", spec.num_types) if spec.num_types else None
        self.norm = loader.norm("embeddings.LayerNorm")
        self.layers: list[Layer] = []
        for index in range(spec.num_layers):
            self.layers.append(loader.layer(index))
            tick()
        self._relative = loader.relative() if spec.relative_buckets else None
        self.head = loader.head() if spec.num_labels else None
        loader.finish()

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor, lengths: list[int]) -> Tensor:
        """ids, positions (in the text), types: int64[tokens], texts one after the other -> float32[tokens, hidden]."""
        hidden = self.words[ids].float() + self.positions[positions + self.spec.first_position].float()
        if self.types is not None:
            hidden += self.types[types].float()
        hidden = self.norm(hidden)
        groups = self._groups(lengths)
        for layer in self.layers:
            hidden = layer.attention_norm(hidden + layer.attention_out(self._attend(layer.qkv(hidden), groups)))
            hidden = layer.output_norm(hidden + layer.down(self._act(layer.up(hidden))))
            self.tick()
        return hidden

    def classify(self, first: Tensor) -> Tensor:
        """The vectors of the texts' first tokens -> float32[texts, labels]."""
        assert self.head is not None
        before, last = self.head
        inner = before(first)
        return last(F.relu(inner) if self.spec.family == "distilbert" else torch.tanh(inner))

    def _attend(self, qkv: Tensor, groups: list[Group]) -> Tensor:
        heads, size = self.spec.num_heads, self.spec.head_dim
        out = torch.empty(qkv.shape[0], heads * size, device=qkv.device)
        for group in groups:
            texts, length = group.index.shape
            q, k, v = qkv[group.index].view(texts, length, 3, heads, size).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
            out[group.index[group.inside]] = mixed.transpose(1, 2).reshape(texts, length, heads * size)[group.inside]
        return out

    def _groups(self, lengths: list[int]) -> list[Group]:
        by_length: dict[int, list[tuple[int, int]]] = {}  # padded length -> (first token, length)
        first = 0
        for length in lengths:
            by_length.setdefault(-(-length // _ROUND) * _ROUND, []).append((first, length))
            first += length
        return [self._group(padded, texts) for padded, texts in sorted(by_length.items())]

    def _group(self, padded: int, texts: list[tuple[int, int]]) -> Group:
        firsts, lengths = torch.tensor(texts, device=self.device).T
        places = torch.arange(padded, device=self.device)
        inside = places < lengths[:, None]
        index = firsts[:, None] + torch.where(inside, places, 0)
        mask = torch.zeros(len(texts), 1, 1, padded, device=self.device)
        mask.masked_fill_(~inside[:, None, None, :], float("-inf"))
        if self._relative is not None:
            mask = mask + self._relative_bias(padded)
        return Group(index, mask, inside)

    def _relative_bias(self, length: int) -> Tensor:
        """float32[1, heads, length, length]: MPNet's scores know how far apart two tokens are."""
        assert self._relative is not None
        places = torch.arange(length, device=self.device)
        behind = places[:, None] - places[None, :]
        half = self.spec.relative_buckets // 2
        exact = half // 2
        distance = behind.abs()
        far = exact + (
            torch.log(distance.clamp(min=1).float() / exact) / math.log(_MAX_DISTANCE / exact) * (half - exact)
        ).long().clamp(max=half - exact - 1)
        bucket = torch.where(distance < exact, distance, far) + half * (behind < 0)
        return self._relative[bucket].permute(2, 0, 1)[None]


class _Loader:
    """Takes tensors from the checkpoint under the names of the family."""

    def __init__(
        self, spec: EncoderSpec, checkpoint: Checkpoint, dtype: torch.dtype, linear: LinearFactory, device: torch.device
    ) -> None:
        self.spec = spec
        self.names = NAMES[spec.family]
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._linear = linear
        self._device = device
        has_prefix = f"{self.names.prefix}embeddings.word_embeddings.weight" in checkpoint
        self.prefix = self.names.prefix if has_prefix else ""

    def table(self, name: str, rows: int) -> Tensor:
        return self._own(f"{self.prefix}embeddings.{name}.weight", rows, self.spec.hidden_size)

    def relative(self) -> Tensor:
        name = f"{self.prefix}encoder.relative_attention_bias.weight"
        return self._own(name, self.spec.relative_buckets, self.spec.num_heads).float()

    def layer(self, index: int) -> Layer:
        names, hidden, inner = self.names, self.spec.hidden_size, self.spec.intermediate_size
        prefix = names.layers.format(i=index)
        at = self.prefix + prefix
        return Layer(
            qkv=self._merged([at + name for name in (names.query, names.key, names.value)], hidden, hidden),
            attention_out=self._merged([at + names.attention_out], hidden, hidden),
            attention_norm=self.norm(prefix + names.attention_norm),
            up=self._merged([at + names.up], inner, hidden),
            down=self._merged([at + names.down], hidden, inner),
            output_norm=self.norm(prefix + names.output_norm),
        )

    def head(self) -> tuple[Linear, Linear]:
        before, last = self.names.head
        hidden = self.spec.hidden_size
        return self._merged([before], hidden, hidden), self._merged([last], self.spec.num_labels, hidden)

    def norm(self, name: str) -> Norm:
        """Old checkpoints call weight and bias gamma and beta."""
        at, size = self.prefix + name, self.spec.hidden_size
        names = ("gamma", "beta") if f"{at}.gamma" in self._checkpoint else ("weight", "bias")
        weight, bias = (self._own(f"{at}.{part}", size).float() for part in names)
        return Norm(weight, bias, self.spec.norm_eps)

    def finish(self) -> None:
        """Complain about layers that config.json does not know."""
        owned = self.prefix + self.names.layers.split("{", 1)[0]
        unused = tuple(self.prefix + part for part in UNUSED_PARTS)
        ignored = [name for name in self._checkpoint.names() if name.startswith(UNUSED) or name in unused]
        self._checkpoint.finish(ignore=tuple(ignored), owned=owned)

    def _merged(self, names: list[str], out_features: int, in_features: int) -> Linear:
        """One product for projections that read the same input."""
        weights = [self._checkpoint.take(f"{name}.weight", out_features, in_features) for name in names]
        biases = [self._checkpoint.take(f"{name}.bias", out_features) for name in names]
        weight, bias = torch.cat(weights).to(self._dtype), torch.cat(biases).to(self._dtype)
        return self._linear(weight.to(self._device), bias.to(self._device))

    def _own(self, name: str, *shape: int) -> Tensor:
        """A copy: what stays in memory must not be a mapping of a file that may change under us."""
        return self._checkpoint.take(name, *shape).to(self._dtype, copy=True).to(self._device)
