"""Turns the endless documents into rows of token ids with a loss weight for each token.

Invariants: rows are cut from one continuous stream, so no token is lost and positions inside a row vary; tokens the
model is asked to say weigh 1, tokens of the prompt weigh little (operands can not be predicted, phrasings can).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tokenizers import Tokenizer

from llmos.services.trainer import chat
from llmos.services.trainer.corpus import documents

PROMPT_WEIGHT = 0.1
CHUNK_DOCUMENTS = 512


@dataclass(frozen=True, slots=True)
class Batch:
    inputs: torch.Tensor  # [rows, length] int64
    targets: torch.Tensor  # [rows, length] int64: inputs shifted by one
    weights: torch.Tensor  # [rows, length] float32: of the targets


class Packer:
    """Cuts batches of any shape from one token stream."""

    def __init__(self, tokenizer: Tokenizer, seed: int, focus: tuple[str, ...] = ()) -> None:
        self._stream = _chunks(tokenizer, documents(seed, focus))
        self._ids = np.empty(0, dtype=np.int64)
        self._weights = np.empty(0, dtype=np.float32)

    def batch(self, rows: int, length: int) -> Batch:
        needed = rows * length + 1
        while len(self._ids) < needed:
            ids, weights = next(self._stream)
            self._ids = np.concatenate((self._ids, ids))
            self._weights = np.concatenate((self._weights, weights))
        ids, weights = self._ids[:needed], self._weights[1:needed]
        self._ids, self._weights = self._ids[needed - 1 :], self._weights[needed - 1 :]
        return Batch(
            torch.from_numpy(ids[:-1].reshape(rows, length).copy()),
            torch.from_numpy(ids[1:].reshape(rows, length).copy()),
            torch.from_numpy(weights.reshape(rows, length).copy()),
        )


def loss_weights(ids: list[int], assistant_id: int) -> list[float]:
    """Weight of each token as a target: answers (with their end token) and plain text count in full."""
    if ids[1] > assistant_id:  # no role token after the first: plain text
        return [0.0] + [1.0] * (len(ids) - 1)
    weights, answering = [], False
    for token in ids:
        weights.append(1.0 if answering else PROMPT_WEIGHT)
        if token == assistant_id:
            answering = True
        elif token == chat.END_ID:
            answering = False
    weights[0] = 0.0  # where a document starts in the stream can not be predicted
    return weights


def _chunks(tokenizer: Tokenizer, source: Iterator[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    assistant_id = chat.SPECIAL_TOKENS.index(chat.ASSISTANT)
    while True:
        encodings = tokenizer.encode_batch(list(islice(source, CHUNK_DOCUMENTS)), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        weights = [loss_weights(document, assistant_id) for document in ids]
        yield np.concatenate(ids), np.concatenate(weights).astype(np.float32)
