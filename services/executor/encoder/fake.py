"""An encoder without a model: the numbers of a text are hashes of its tokens. Same ABI and checks, no torch.

It is made where the configured directory describes an encoder and the backend is `fake`. LLMOS_FAKE_POISON and LLMOS_FAKE_STEP_MS mean
what they mean to the fake decoder (fake.py).
"""

from __future__ import annotations

import os
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llmos.config import ModelConfig
from llmos.protocol.messages import RowResult, StepPlan
from llmos.services.executor.backend import Capabilities, Immediate, Limits, StepOutput
from llmos.services.executor.encoder.rows import Text, TextRows, failures, text_capabilities
from llmos.services.executor.encoder.spec import read_encoder_spec
from llmos.services.executor.fake import POISON_VARIABLE, POISONED_EXIT, STEP_MS_VARIABLE

EMBEDDING_SIZE = 8  # of one that embeds


def fake_vector(ids: bytes, second_at: int, size: int) -> bytes:
    """What the fake makes of these tokens (int32[n]): float32[size], each between 0 and 1."""
    seed = blake2b(ids, digest_size=8, key=second_at.to_bytes(4, "little")).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(seed, "little"))).random(size).astype("<f4").tobytes()


class FakeEncoder(Immediate):
    """Executes plans by hashing."""

    def __init__(self, capabilities: Capabilities, *, step_s: float = 0.0, poison: int | None = None) -> None:
        self.capabilities = capabilities
        self.description = f"fake encoder, vectors of {capabilities.output_size}"
        self.rows = TextRows(capabilities)
        self._step_s = step_s
        self._poison = poison

    @classmethod
    def open(cls, model: ModelConfig, directory: Path, limits: Limits) -> FakeEncoder:
        spec = read_encoder_spec(directory)
        capabilities = text_capabilities(
            model, limits, max_text=spec.max_text, vocab_size=spec.vocab_size, dtype="none", device="fake",
            output_size=spec.num_labels or EMBEDDING_SIZE,
        )  # fmt: skip
        poison = os.environ.get(POISON_VARIABLE)
        step_s = float(os.environ.get(STEP_MS_VARIABLE, "0")) / 1000
        return cls(capabilities, step_s=step_s, poison=int(poison) if poison else None)

    def reset(self) -> None:
        self.forget_submitted()
        self.rows.clear()

    def execute(self, plan: StepPlan) -> StepOutput:
        texts, skipped = self.rows.apply(plan)
        if any(self._poison in text.ids for text in texts if self._poison is not None):
            os._exit(POISONED_EXIT)
        if self._step_s:
            time.sleep(self._step_s)
        return StepOutput(b"", (), failures(skipped), tuple(map(self._result, texts)))

    def _result(self, text: Text) -> RowResult:
        second_at = int(np.argmax(text.types))  # 0 if there is none
        ids = text.ids.astype("<i4").tobytes()
        return RowResult(text.row, 0, fake_vector(ids, second_at, self.capabilities.output_size))
