"""Sampling parameters of all rows as arrays, so that a step reads them without a loop over rows. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmos.protocol.params import SamplingParams

NO_TOP_K = 2**31 - 1


class SamplingColumns:
    """One entry per row. `special` rows need `adjust.adjust_logits`; `logprobs` is -1 where none were asked for."""

    def __init__(self, max_rows: int) -> None:
        self.temperature = np.zeros(max_rows, dtype=np.float32)
        self.top_k = np.full(max_rows, NO_TOP_K, dtype=np.int64)
        self.top_p = np.ones(max_rows, dtype=np.float32)
        self.log_min_p = np.full(max_rows, -np.inf, dtype=np.float32)
        self.seed = np.zeros(max_rows, dtype=np.int64)
        self.special = np.zeros(max_rows, dtype=bool)
        self.logprobs = np.full(max_rows, -1, dtype=np.int64)
        self.has_grammar = np.zeros(max_rows, dtype=bool)

    def set(self, row: int, params: SamplingParams) -> None:
        """`None` counts as the neutral value: temperature 1, nothing filtered."""
        assert params.seed is not None, f"row {row} has no seed"
        self.temperature[row] = 1.0 if params.temperature is None else params.temperature
        self.top_k[row] = params.top_k or NO_TOP_K
        self.top_p[row] = 1.0 if params.top_p is None else params.top_p
        self.log_min_p[row] = math.log(params.min_p) if params.min_p else -math.inf
        self.seed[row] = params.seed
        self.special[row] = is_special(params)
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.has_grammar[row] = params.grammar is not None


def is_special(params: SamplingParams) -> bool:
    """Whether the row's logits are changed before they are sampled."""
    return bool(
        params.repetition_penalty not in (None, 1.0)
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or (params.min_tokens and params.stop_token_ids)
        or params.grammar is not None
    )
