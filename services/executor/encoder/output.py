"""From token vectors to a text's result: pooling, dense layers, normalisation, or the scores of a classification head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos.services.executor.checkpoint import Checkpoint
from llmos.services.executor.encoder.model import Encoder
from llmos.services.executor.encoder.pipeline import Dense, Pipeline
from llmos.services.executor.models.decoder import Linear, LinearFactory

_LEAST_NORM = 1e-12
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}


class TextOutput:
    """`size` numbers for each text."""

    def __init__(
        self, encoder: Encoder, pipeline: Pipeline, dtype: torch.dtype, linear: LinearFactory, directory: Path
    ) -> None:
        self._encoder = encoder
        self._pipeline = pipeline
        self._dense = [(_load(dense, dtype, linear, encoder.device), dense.activation) for dense in pipeline.dense]
        labels = encoder.spec.num_labels
        self.size = labels or pipeline.output_size(encoder.spec.hidden_size)

    def __call__(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """hidden: float32[tokens, hidden], texts one after the other -> float32[texts, size]."""
        if self._encoder.spec.num_labels:
            return self._scores(hidden, lengths)
        texts = hidden.split(lengths)
        parts = [torch.stack([_POOL[name](text) for text in texts]) for name in self._pipeline.poolings]
        pooled = torch.cat(parts, 1)
        for layer, activation in self._dense:
            pooled = _ACTIVATIONS[activation](layer(pooled))
        return F.normalize(pooled, dim=1, eps=_LEAST_NORM) if self._pipeline.normalize else pooled

    def _scores(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        starts = torch.tensor([0, *lengths[:-1]], device=hidden.device).cumsum(0)
        numbers = self._encoder.classify(hidden[starts]).float()
        kind = self._encoder.spec.score
        if kind == "none":
            return numbers
        return torch.sigmoid(numbers) if kind == "sigmoid" else torch.softmax(numbers, 1)


_POOL: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda text: text[0],
    "max": lambda text: text.amax(0),
    "mean": lambda text: text.mean(0),
    "mean_sqrt_len": lambda text: text.sum(0) / len(text) ** 0.5,
}


def _load(dense: Dense, dtype: torch.dtype, linear: LinearFactory, device: torch.device) -> Linear:
    checkpoint = Checkpoint(dense.folder)
    weight = checkpoint.take("linear.weight", dense.out_features, dense.in_features).to(dtype).to(device)
    bias = checkpoint.take("linear.bias", dense.out_features).to(dtype).to(device) if dense.bias else None
    layer = linear(weight, bias)
    checkpoint.finish()
    return layer
