"""Changes to single rows' logits before sampling: penalties, logit bias, no stop tokens before `min_tokens`, and nothing that a row's
grammar does not allow.

Few rows ask for these, so this is a loop over them. Everything is computed from the row's tokens anew at each step: there is no
state to lose or to rebuild after a preemption.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmos.protocol.params import SamplingParams
from llmos.services.executor.grammars import Masks
from llmos.services.executor.rows import Ints, RowTable


def adjust_logits(logits: Tensor, rows: Ints, which: list[int], table: RowTable, masks: Masks | None = None) -> Tensor:
    """A copy of `logits` with the adjustments of rows[i] for i in `which`."""
    adjusted = logits.clone()
    for i in which:
        row = int(rows[i])
        params = table.param(row)
        tokens = table.tokens[row, : table.length[row]]
        output = tokens[table.prompt_len[row] :]
        _penalize(adjusted[i], params, tokens, output)
        _bias(adjusted[i], params)
        if masks is not None and params.grammar is not None:
            _mask(adjusted[i], masks.of(row))
        elif len(output) < params.min_tokens:
            adjusted[i, _inside(params.stop_token_ids, logits.shape[1])] = float("-inf")
    return adjusted


def _mask(logits: Tensor, mask: np.ndarray | None) -> None:
    """`mask` None: nothing is possible."""
    if mask is None:
        logits.fill_(float("-inf"))
        return
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=logits.shape[0])
    logits.masked_fill_(torch.from_numpy(bits) == 0, float("-inf"))


def _penalize(logits: Tensor, params: SamplingParams, tokens: np.ndarray, output: np.ndarray) -> None:
    repetition = params.repetition_penalty
    if repetition is not None and repetition != 1.0:
        seen = torch.from_numpy(np.unique(tokens).astype(np.int64))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if (params.presence_penalty or params.frequency_penalty) and output.size:
        ids, counts = np.unique(output, return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * torch.from_numpy(counts).float()
        logits[torch.from_numpy(ids.astype(np.int64))] -= penalty


def _bias(logits: Tensor, params: SamplingParams) -> None:
    for token, value in params.logit_bias:
        if token < logits.shape[0]:
            logits[token] += value


def _inside(tokens: tuple[int, ...], vocab_size: int) -> Tensor:
    """Token ids that exist in this model."""
    return torch.tensor([token for token in tokens if token < vocab_size], dtype=torch.int64)
