"""The one pass over all logits: what each tile of a row knows, from which `sampling_choose` chooses.

A program per (entry, tile): batch size does not change how a row is cut, so sums have the same bits in every batch. A tile leaves its
largest logit and where that is, its sum of exponentials, its best noisy token, and whether it is finite; and the peak (largest logit) of
each of its groups of GROUP tokens, by which a filter later finds the few groups that can hold what it keeps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmos.kernels import row_table
from llmos.kernels.sampling_noise import gumbel, stream_key

# Fields of `floats` [batch, FLOAT_FIELDS, tiles] and `ints` [batch, INT_FIELDS, tiles].
RAW_MAX, RAW_SUM, MAX, SUM, NOISY = (tl.constexpr(i) for i in range(5))
ARGMAX, NOISY_ID, BAD = (tl.constexpr(i) for i in range(3))
FLOAT_FIELDS, INT_FIELDS = 5, 3

MIN_TEMPERATURE = tl.constexpr(1e-30)  # smaller ones would divide 0 by 0 in float32

_RECORD = tl.constexpr(row_table.RECORD_WORDS)
_LENGTH, _TEMPERATURE, _TOP_K, _TOP_P, _LOG_MIN_P, _SEED_LOW, _SEED_HIGH, _LOGPROBS, _ADJUSTED = (
    tl.constexpr(column)
    for column in (
        row_table.LENGTH,
        row_table.TEMPERATURE,
        row_table.TOP_K,
        row_table.TOP_P,
        row_table.LOG_MIN_P,
        row_table.SEED_LOW,
        row_table.SEED_HIGH,
        row_table.LOGPROBS,
        row_table.ADJUSTED,
    )
)


@triton.jit
def temperature_of(record):  # type: ignore[no-untyped-def]
    return tl.load(record + _TEMPERATURE).to(tl.float32, bitcast=True)


@triton.jit
def filters_of(record):  # type: ignore[no-untyped-def]
    """top_k, top_p, log_min_p."""
    top_p = tl.load(record + _TOP_P).to(tl.float32, bitcast=True)
    return tl.load(record + _TOP_K), top_p, tl.load(record + _LOG_MIN_P).to(tl.float32, bitcast=True)


@triton.jit
def is_filtered(record, vocab_size):  # type: ignore[no-untyped-def]
    top_k, top_p, log_min_p = filters_of(record)
    return (top_k < vocab_size) | (top_p < 1.0) | (log_min_p > float("-inf"))


@triton.jit
def key_of(record):  # type: ignore[no-untyped-def]
    return stream_key(tl.load(record + _SEED_LOW), tl.load(record + _SEED_HIGH), tl.load(record + _LENGTH))


@triton.jit
def wants_logprobs(record):  # type: ignore[no-untyped-def]
    """-1, or how many best tokens are reported."""
    return tl.load(record + _LOGPROBS)


@triton.jit
def is_adjusted(record):  # type: ignore[no-untyped-def]
    return tl.load(record + _ADJUSTED) != 0


@triton.jit
def load_scores(logits, adjusted, changed, token_ids, inside, ADJUST: tl.constexpr):  # type: ignore[no-untyped-def]
    """What an entry's tokens are sampled by, float32, -inf outside. logits, adjusted: the entry's own."""
    if ADJUST:
        if changed:
            scores = tl.load(adjusted + token_ids, mask=inside, other=float("-inf"))
        else:
            scores = tl.load(logits + token_ids, mask=inside, other=float("-inf")).to(tl.float32)
        return scores
    else:
        return tl.load(logits + token_ids, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def scan_kernel(  # type: ignore[no-untyped-def]
    logits,
    adjusted,
    rows,
    records,
    floats,
    ints,
    peaks,
    raw_peaks,
    logits_stride,
    vocab_size,
    num_tiles,
    num_groups,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    ADJUST: tl.constexpr,
    REPORT: tl.constexpr,
    FLOATS: tl.constexpr,
    INTS: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    row = tl.load(rows + entry).to(tl.int64)
    if row < 0:
        return
    record = records + row * _RECORD
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < vocab_size
    group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    own_floats = floats + entry * num_tiles * FLOATS + tile
    own_ints = ints + entry * num_tiles * INTS + tile

    raw = tl.load(logits + entry * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
    bad = (raw != raw) | (tl.abs(raw) == float("inf"))
    any_bad = tl.max(bad.to(tl.int32), 0)
    tl.store(own_ints + BAD * num_tiles, any_bad)
    if any_bad > 0:  # the row gets no token; what else is known of the tile is not looked at
        return
    raw = tl.where(inside, raw, float("-inf"))
    scores = raw
    changed = is_adjusted(record) if ADJUST else False
    if changed:
        scores = tl.load(adjusted + entry * vocab_size + token, mask=inside, other=float("-inf"))
    if REPORT:
        reported = wants_logprobs(record)
        if reported >= 0:
            raw_max = tl.max(raw, 0)
            tl.store(own_floats + RAW_MAX * num_tiles, raw_max)
            tl.store(own_floats + RAW_SUM * num_tiles, tl.sum(tl.exp(raw - raw_max), 0))
            if reported > 0:
                peak = tl.max(tl.reshape(raw, [TILE // GROUP, GROUP]), 1)
                tl.store(raw_peaks + entry * num_groups + group, peak, mask=group < num_groups)

    largest, where = tl.max(scores, 0, return_indices=True)
    tl.store(own_floats + MAX * num_tiles, largest)
    tl.store(own_ints + ARGMAX * num_tiles, tile * TILE + where)
    temperature = temperature_of(record)
    if temperature > 0:
        base = tl.where(largest == float("-inf"), 0.0, largest)  # a tile of masked tokens: -inf less -inf would be NaN
        relative = tl.div_rn(scores - base, tl.maximum(temperature, MIN_TEMPERATURE))
        noisy, noisy_where = tl.max(relative + gumbel(key_of(record), token), 0, return_indices=True)
        tl.store(own_floats + NOISY * num_tiles, noisy)
        tl.store(own_ints + NOISY_ID * num_tiles, tile * TILE + noisy_where)
        if is_filtered(record, vocab_size):
            tl.store(own_floats + SUM * num_tiles, tl.sum(tl.exp(relative), 0))
            peak = tl.max(tl.reshape(scores, [TILE // GROUP, GROUP]), 1)
            tl.store(peaks + entry * num_groups + group, peak, mask=group < num_groups)
