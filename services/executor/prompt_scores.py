"""Log-probabilities of a prompt's own tokens, from the hidden states that its prefill leaves behind. For every backend on torch.

A chunk that computes tokens [start, end) knows what the model expected at start + 1 .. end; records (llmos/protocol/prompt_logprobs.py)
are made of those that belong to the prompt. The output layer runs over a few positions at a time: all at once would need vocabulary x
chunk numbers. A row whose numbers are not finite is reported, as by the sampler.

    wanted_scores (host) -> make_records (device, some positions at a time) -> finish_scores (host)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmos.services.executor.rows import Chunk, Ints, RowTable

if TYPE_CHECKING:
    from llmos.protocol.messages import RowResult

Words = npt.NDArray[np.int32]
_MAX_LOGITS = 2**24  # numbers at a time: 64 MiB
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one chunk is asked for. `first`: where it begins in the step's batch; the position there expects `targets[0]`, which is the
    token after `start`. `opening`: the prompt's first token, if the chunk computes it; nothing is expected of that one."""

    row: int
    start: int
    first: int
    targets: Ints
    top: int
    opening: int | None

    @property
    def words(self) -> int:
        """4-byte words of one record."""
        return 2 * (1 + self.top)


def wanted_scores(first: int, chunks: Sequence[Chunk], rows: RowTable) -> list[Wanted]:
    """Of a step's chunks, which follow each other in its batch from `first` on, those whose rows asked for scores."""
    found = []
    for chunk in chunks:
        top = rows.param(chunk.row).prompt_logprobs
        if top is not None:
            end = min(chunk.end, int(rows.prompt_len[chunk.row]) - 1)
            targets = rows.tokens[chunk.row, chunk.start + 1 : end + 1].astype(np.int64)
            opening = int(rows.tokens[chunk.row, 0]) if chunk.start == 0 else None
            if len(targets) or opening is not None:
                found.append(Wanted(chunk.row, chunk.start, first, targets, top, opening))
        first += chunk.length
    return found


def make_records(logits: Tensor, targets: Tensor, top: int) -> Tensor:
    """logits [n, vocabulary] of positions that expect `targets` (int64[n]) -> int32[n, words]; NaN where they are not finite."""
    raw = logits.float()
    total = raw.logsumexp(1, keepdim=True)
    own = raw.gather(1, targets[:, None]) - total
    own = torch.where(raw.sum(1, keepdim=True).isfinite(), own, float("nan"))
    count = min(top, raw.shape[1])
    best, ids = torch.topk(raw, count, dim=1)
    ids, values = ids.int(), best - total
    if count < top:  # the vocabulary is smaller
        missing = (raw.shape[0], top - count)
        ids = torch.cat((ids, ids.new_full(missing, _NO_TOKEN)), 1)
        values = torch.cat((values, values.new_full(missing, float("-inf"))), 1)
    return torch.cat((targets[:, None].int(), own.view(torch.int32), ids, values.view(torch.int32)), 1)


def finish_scores(wanted: Sequence[Wanted], records: Sequence[Words]) -> tuple[tuple[RowResult, ...], list[int]]:
    """The results, and the rows that failed."""
    from llmos.protocol.messages import RowResult

    results: list[RowResult] = []
    failed: list[int] = []
    for each, words in zip(wanted, records):
        if not np.isfinite(words.view("<f4")[:, 1]).all():
            failed.append(each.row)
        elif each.opening is not None:
            results.append(RowResult(each.row, 0, _opening(each.opening, each.top).tobytes() + words.tobytes()))
        else:
            results.append(RowResult(each.row, each.start + 1, words.tobytes()))
    return tuple(results), failed


def score_prompts(
    logits: Callable[[Tensor], Tensor],
    vocab_size: int,
    hidden: Tensor,
    first: int,
    chunks: Sequence[Chunk],
    rows: RowTable,
) -> tuple[tuple[RowResult, ...], list[int]]:
    """All of it at once. hidden: [tokens, hidden] of a step's batch. `logits`: hidden [n, hidden] -> [n, vocabulary]."""
    wanted = wanted_scores(first, chunks, rows)
    block = max(1, _MAX_LOGITS // vocab_size)
    records = []
    for each in wanted:
        words = np.empty((len(each.targets), each.words), "<i4")
        for at in range(0, len(words), block):
            targets = torch.from_numpy(each.targets[at : at + block])
            position = each.first + at
            found = make_records(logits(hidden[position : position + len(targets)]), targets, each.top)
            words[at : at + block] = found.numpy()
        records.append(words)
    return finish_scores(wanted, records)


def _opening(token: int, top: int) -> Words:
    """The record of a prompt's first token."""
    record = np.full(2 * (1 + top), _NO_TOKEN, "<i4")
    record[0] = token
    floats = record.view("<f4")
    floats[1] = floats[2 + top :] = np.nan
    return record
