"""A backend without a model: a token is a hash of (seed, position). Same ABI, same checks, no torch.

It honours lengths, pages and seeds but no sampling parameter that needs logits; where log-probabilities are asked for it reports
certainty (0.0). `step_s`, in a process LLMOS_FAKE_STEP_MS (milliseconds), makes a step last at least that long.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from llmos.codes import FinishReason
from llmos.config import ModelConfig
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowLogprobs, StepPlan, TokenLogprobs
from llmos.services.executor import noise
from llmos.services.executor.backend import Capabilities, Limits, StepOutput
from llmos.services.executor.rows import RowTable
from llmos.services.executor.spec import CONFIG_FILE, limit_context, read_spec

DEFAULT_VOCAB = 32_000  # where the directory has no config.json
DEFAULT_CONTEXT = 8192
DEFAULT_PAGES = 4096
STEP_MS_VARIABLE = "LLMOS_FAKE_STEP_MS"


def fake_token(seed: int, position: int, vocab_size: int) -> int:
    """The token that the fake backend puts at `position` (from the start of the prompt) for a request with this seed."""
    return noise.stream_key(seed, position, noise.FAKE_DOMAIN) % vocab_size


class FakeBackend:
    """Executes plans by hashing."""

    def __init__(
        self, limits: Limits, *, vocab_size: int = DEFAULT_VOCAB, max_context: int = DEFAULT_CONTEXT,
        num_pages: int = DEFAULT_PAGES, page_size: int = 16, step_s: float = 0.0,
    ) -> None:  # fmt: skip
        context = min(max_context, num_pages * page_size)
        self.capabilities = Capabilities(
            num_pages, page_size, limits.max_rows, limits.max_step_tokens, context, vocab_size, "none", "fake"
        )
        self.description = f"fake model, {vocab_size} tokens"
        self.step_s = step_s
        self.rows = RowTable(limits.max_rows, context, page_size, num_pages)

    @classmethod
    def open(cls, model: ModelConfig, directory: Path, limits: Limits) -> FakeBackend:
        """Vocabulary and context of the model directory, if there is one."""
        vocab_size, context = DEFAULT_VOCAB, model.max_context or DEFAULT_CONTEXT
        if (directory / CONFIG_FILE).exists():
            spec = read_spec(directory)
            vocab_size, context = spec.vocab_size, limit_context(spec, model.max_context)
        return cls(
            limits, vocab_size=vocab_size, max_context=context, num_pages=model.num_pages or DEFAULT_PAGES,
            page_size=model.page_size, step_s=float(os.environ.get(STEP_MS_VARIABLE, "0")) / 1000,
        )  # fmt: skip

    def reset(self) -> None:
        self.rows.clear()

    def execute(self, plan: StepPlan) -> StepOutput:
        started = time.monotonic()
        work = self.rows.apply(plan)
        self.rows.computed_to(work)
        sampling = [*work.decode.tolist(), *(chunk.row for chunk in work.chunks if chunk.sample)]
        rows = np.array(sampling, dtype=np.int64)
        positions = self.rows.length[rows].tolist()
        seeds = self.rows.sampling.seed[rows].tolist()
        vocab_size = self.capabilities.vocab_size
        tokens = [fake_token(seed, position, vocab_size) for seed, position in zip(seeds, positions)]
        self.rows.append(rows, np.array(tokens, dtype=np.int64))
        logprobs = tuple(
            RowLogprobs(row, position, _certain(token, self.rows.sampling.logprobs[row]))
            for row, position, token in zip(sampling, positions, tokens)
            if self.rows.sampling.logprobs[row] >= 0
        )
        samples = pack_i32(value for entry in zip(sampling, positions, tokens) for value in entry)
        failed = pack_i32(value for row in work.skipped for value in (row, FinishReason.NUMERICAL_ERROR))
        if (left := self.step_s - (time.monotonic() - started)) > 0:
            time.sleep(left)
        return StepOutput(samples, logprobs, failed)


def _certain(token: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(0.0, (token,), (0.0,)) if count else TokenLogprobs(0.0)
