"""Sampling in plain torch, one row at a time with a sort: the definition of correct for `sampling.Sampler`. Float64 inside.

Written from the definitions, not from the kernels: the same noise (a counter-based hash), penalties, filters and ties.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmos.kernels import row_table
from llmos.kernels.row_table import DeviceRows

_MASK32, _MASK64 = 2**32 - 1, 2**64 - 1


def sample_reference(
    logits: Tensor, rows: Tensor, table: DeviceRows, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, list[list[tuple[int, float]]]]:
    """Of each entry: the token (int64, -1 = none), its log-probability (NaN where not asked for), the best tokens with theirs."""
    tokens = torch.full((len(rows),), -1, dtype=torch.int64)
    chosen = torch.full((len(rows),), math.nan, dtype=torch.float64)
    best: list[list[tuple[int, float]]] = [[] for _ in range(len(rows))]
    for entry, row in enumerate(rows.tolist()):
        raw = logits[entry].double().cpu()
        if row < 0 or not raw.isfinite().all():
            continue
        scores = adjust_reference(raw, row, table, allowed)
        if not scores.amax().isfinite():
            continue
        tokens[entry] = choose_reference(scores, row, table)
        count = int(table.records[row, row_table.LOGPROBS])
        if count >= 0:
            logprobs = raw.log_softmax(0)
            chosen[entry] = logprobs[tokens[entry]]
            order = logprobs.sort(descending=True, stable=True).indices[:count].tolist()
            best[entry] = [(token, float(logprobs[token])) for token in order]
    return tokens, chosen, best


def adjust_reference(raw: Tensor, row: int, table: DeviceRows, allowed: Tensor | None = None) -> Tensor:
    """Penalties, biases, no stop tokens before the least number of tokens, only allowed tokens."""
    scores = raw.clone()
    if not integer(table, row, row_table.ADJUSTED):
        return scores
    known = table.tokens[row, : integer(table, row, row_table.LENGTH)].tolist()
    output = known[integer(table, row, row_table.PROMPT_LENGTH) :]
    repetition = number(table, row, row_table.REPETITION)
    for token in set(known):
        scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
    for token in set(output):
        frequency = number(table, row, row_table.FREQUENCY)
        scores[token] -= number(table, row, row_table.PRESENCE) + frequency * output.count(token)
    for index in range(integer(table, row, row_table.NUM_BIASES)):
        token = int(table.bias_ids[row, index])
        if token < len(scores):
            scores[token] += float(table.bias_values[row, index])
    if len(output) < integer(table, row, row_table.MIN_TOKENS):
        stops = table.stops[row, : integer(table, row, row_table.NUM_STOPS)].tolist()
        scores[[token for token in stops if token < len(scores)]] = -math.inf
    mask = integer(table, row, row_table.MASK)
    if mask >= 0:
        assert allowed is not None
        words = allowed[mask].tolist()
        bits = [words[token // 32] >> (token % 32) & 1 for token in range(len(scores))]
        scores[~torch.tensor(bits, dtype=torch.bool)] = -math.inf
    return scores


def choose_reference(scores: Tensor, row: int, table: DeviceRows) -> int:
    """Filters, then Gumbel-max; or the largest."""
    temperature = number(table, row, row_table.TEMPERATURE)
    if temperature == 0:
        return int(scores.argmax())
    scores = (scores - scores.amax()) / max(temperature, 1e-30)
    vocab_size = len(scores)
    ordered = scores.sort(descending=True).values
    top_k, top_p = integer(table, row, row_table.TOP_K), number(table, row, row_table.TOP_P)
    least = ordered[min(top_k, vocab_size) - 1]
    kept = ordered[ordered >= least]
    share = kept.exp() / kept.exp().sum()
    if top_p < 1.0:
        least = kept[max(1, int((share.cumsum(0) - share < top_p).sum())) - 1]
    floor = max(float(least), number(table, row, row_table.LOG_MIN_P))
    seed = integer(table, row, row_table.SEED_LOW) & _MASK32 | integer(table, row, row_table.SEED_HIGH) << 32
    noisy = scores + gumbel_reference(seed, integer(table, row, row_table.LENGTH), vocab_size)
    return int(torch.where(scores >= floor, noisy, -math.inf).argmax())


def gumbel_reference(seed: int, position: int, vocab_size: int) -> Tensor:
    """Noise of all token ids at a position: float64[vocab_size]. The hash is defined in `sampling_noise.py`."""
    key = _mix64((seed & _MASK64) ^ _mix64(position ^ 0x6C6C_6D6F_7300_0001))
    ids = torch.arange(vocab_size, dtype=torch.int64)
    hashes = _mix32(_mix32((ids * 0x9E37_79B1 + (key & _MASK32)) & _MASK32) ^ (key >> 32))
    return -(-((hashes.double() + 0.5) / 2**32).log()).log()


def integer(table: DeviceRows, row: int, column: int) -> int:
    return int(table.records[row, column])


def number(table: DeviceRows, row: int, column: int) -> float:
    return float(table.records[row, column : column + 1].view(torch.float32))


def _mix64(value: int) -> int:
    value = (value + 0x9E37_79B9_7F4A_7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK64
    return value ^ (value >> 31)


def _mix32(value: Tensor) -> Tensor:
    """On int64 that hold 32 bits; a product of two is cut to its low half in two parts, lest it pass 63 bits."""
    value = _times32(value ^ (value >> 16), 0x85EB_CA6B)
    value = _times32(value ^ (value >> 13), 0xC2B2_AE35)
    return value ^ (value >> 16)


def _times32(value: Tensor, factor: int) -> Tensor:
    low = (value & 0xFFFF) * factor
    high = ((value >> 16) * factor & 0xFFFF) << 16
    return (low + high) & _MASK32
