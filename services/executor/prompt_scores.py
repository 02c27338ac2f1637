"""Log-probabilities of a prompt's own tokens, from the hidden states that its prefill leaves behind. For every backend on torch.

A chunk that computes tokens [start, end) knows what the model expected at start + 1 .. end; records (llmos/protocol/prompt_logprobs.py)
are made of those that belong to the prompt. The output layer runs over a few positions at a time: all at once would need vocabulary x
chunk numbers. A row whose numbers are not finite is reported, as by the sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from llmos.protocol.messages import RowResult
from llmos.protocol.prompt_logprobs import record_words
from llmos.services.executor.rows import Chunk, Ints, RowTable

_MAX_LOGITS = 2**24  # numbers at a time: 64 MiB
_NO_TOKEN = -1


def score_prompts(
    logits: Callable[[Tensor], Tensor],
    vocab_size: int,
    hidden: Tensor,
    first: int,
    chunks: Sequence[Chunk],
    rows: RowTable,
) -> tuple[tuple[RowResult, ...], list[int]]:
    """Records of the chunks whose rows asked for them, and rows that failed. hidden: [tokens, hidden] of a step's batch, in which the
    chunks follow each other from `first` on. `logits`: hidden [n, hidden] -> float32 [n, vocabulary]."""
    results: list[RowResult] = []
    failed: list[int] = []
    for chunk in chunks:
        top = rows.param(chunk.row).prompt_logprobs
        if top is not None:
            end = min(chunk.end, int(rows.prompt_len[chunk.row]) - 1)
            targets = rows.tokens[chunk.row, chunk.start + 1 : end + 1].astype(np.int64)
            records = _records(logits, max(1, _MAX_LOGITS // vocab_size), hidden[first:], targets, top)
            if records is None:
                failed.append(chunk.row)
            elif chunk.start == 0:
                own = _first_record(int(rows.tokens[chunk.row, 0]), top)
                results.append(RowResult(chunk.row, 0, own.tobytes() + records.tobytes()))
            elif len(records):
                results.append(RowResult(chunk.row, chunk.start + 1, records.tobytes()))
        first += chunk.length
    return tuple(results), failed


def _first_record(token: int, top: int) -> Ints:
    """Nothing is expected of the first token."""
    record = np.full(record_words(top), _NO_TOKEN, "<i4")
    record[0] = token
    floats = record.view("<f4")
    floats[1] = floats[2 + top :] = np.nan
    return record


def _records(logits: Callable[[Tensor], Tensor], block: int, hidden: Tensor, targets: Ints, top: int) -> Ints | None:
    """int32[n, words], `block` at a time; None if a number is not finite."""
    words = np.full((len(targets), record_words(top)), _NO_TOKEN, "<i4")
    words[:, 0] = targets
    floats = words.view("<f4")
    floats[:, 2 + top :] = -np.inf  # where the vocabulary is smaller than `top`
    for at in range(0, len(targets), block):
        end = min(at + block, len(targets))
        raw = logits(hidden[at:end]).float()
        total = raw.logsumexp(1, keepdim=True)
        if not bool(total.isfinite().all()) or not bool(raw.sum(1).isfinite().all()):
            return None
        wanted = torch.from_numpy(targets[at:end]).to(raw.device)[:, None]
        floats[at:end, 1] = (raw.gather(1, wanted) - total)[:, 0].cpu().numpy()
        if top:
            best, ids = torch.topk(raw, min(top, raw.shape[1]), dim=1)
            words[at:end, 2 : 2 + ids.shape[1]] = ids.cpu().numpy()
            floats[at:end, 2 + top : 2 + top + ids.shape[1]] = (best - total).cpu().numpy()
    return words
