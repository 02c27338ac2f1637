"""Changed logits of the rows that ask for it (ADJUSTED): only allowed tokens, penalties, biases, no stop tokens before the least number.

Everything is computed from the row's tokens at each step; there is no state to keep. Four launches: copy the logits to a workspace;
count the row's tokens; penalise; bias. Counting costs what the history is long, not what the vocabulary is large: `counts` is all zeros
between steps, the second pass takes each number out with an exchange, so of equal tokens exactly one applies the penalty.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmos.kernels import row_table

_RECORD = tl.constexpr(row_table.RECORD_WORDS)
_LENGTH, _PROMPT_LENGTH, _ADJUSTED, _REPETITION, _PRESENCE, _FREQUENCY, _MIN_TOKENS, _NUM_STOPS, _NUM_BIASES, _MASK = (
    tl.constexpr(column)
    for column in (
        row_table.LENGTH,
        row_table.PROMPT_LENGTH,
        row_table.ADJUSTED,
        row_table.REPETITION,
        row_table.PRESENCE,
        row_table.FREQUENCY,
        row_table.MIN_TOKENS,
        row_table.NUM_STOPS,
        row_table.NUM_BIASES,
        row_table.MASK,
    )
)


@triton.jit
def adjusted_record(rows, records, entry):  # type: ignore[no-untyped-def]
    """The entry's row, and whether its logits are changed."""
    row = tl.load(rows + entry).to(tl.int64)
    wanted = tl.load(records + row * _RECORD + _ADJUSTED, mask=row >= 0, other=0)
    return row, wanted != 0


@triton.jit
def copy_kernel(  # type: ignore[no-untyped-def]
    logits,
    adjusted,
    rows,
    records,
    allowed,
    logits_stride,
    allowed_stride,
    vocab_size,
    MASKS: tl.constexpr,
    TILE: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row, wanted = adjusted_record(rows, records, entry)
    if wanted:
        token = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = token < vocab_size
        value = tl.load(logits + entry * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
        if MASKS:
            mask = tl.load(records + row * _RECORD + _MASK).to(tl.int64)
            if mask >= 0:
                word = tl.load(allowed + mask * allowed_stride + token // 32, mask=inside, other=0)
                value = tl.where(((word >> (token % 32)) & 1) != 0, value, float("-inf"))
        tl.store(adjusted + entry * vocab_size + token, value, mask=inside)


@triton.jit
def count_kernel(rows, records, tokens, counts, token_stride, vocab_size, num_programs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """counts[entry, token]: bit 0 if the row has the token, above it how often its output has."""
    entry = tl.program_id(0).to(tl.int64)
    row, wanted = adjusted_record(rows, records, entry)
    if wanted:
        record = records + row * _RECORD
        if penalises(record):
            length = tl.load(record + _LENGTH)
            prompt = tl.load(record + _PROMPT_LENGTH)
            for block in range(tl.program_id(1), tl.cdiv(length, BLOCK), num_programs):
                position = block * BLOCK + tl.arange(0, BLOCK)
                token = tl.load(tokens + row * token_stride + position, mask=position < length, other=-1)
                place = counts + entry * vocab_size + token
                known = (token >= 0) & (token < vocab_size)
                tl.atomic_or(place, tl.full([BLOCK], 1, tl.int32), mask=known, sem="relaxed")
                tl.atomic_add(place, tl.full([BLOCK], 2, tl.int32), mask=known & (position >= prompt), sem="relaxed")


@triton.jit
def penalise_kernel(  # type: ignore[no-untyped-def]
    adjusted, rows, records, tokens, counts, token_stride, vocab_size, num_programs, BLOCK: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64)
    row, wanted = adjusted_record(rows, records, entry)
    if wanted:
        record = records + row * _RECORD
        if penalises(record):
            length = tl.load(record + _LENGTH)
            repetition = tl.load(record + _REPETITION).to(tl.float32, bitcast=True)
            presence = tl.load(record + _PRESENCE).to(tl.float32, bitcast=True)
            frequency = tl.load(record + _FREQUENCY).to(tl.float32, bitcast=True)
            for block in range(tl.program_id(1), tl.cdiv(length, BLOCK), num_programs):
                position = block * BLOCK + tl.arange(0, BLOCK)
                token = tl.load(tokens + row * token_stride + position, mask=position < length, other=-1)
                known = (token >= 0) & (token < vocab_size)
                place = entry * vocab_size + token
                count = tl.atomic_xchg(counts + place, tl.zeros([BLOCK], tl.int32), mask=known, sem="relaxed")
                mine = known & (count != 0)
                value = tl.load(adjusted + place, mask=mine, other=0.0)
                value = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
                times = count >> 1
                value = tl.where(times > 0, value - (presence + frequency * times.to(tl.float32)), value)
                tl.store(adjusted + place, value, mask=mine)


@triton.jit
def bias_kernel(  # type: ignore[no-untyped-def]
    adjusted,
    rows,
    records,
    stops,
    bias_ids,
    bias_values,
    stop_stride,
    bias_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row, wanted = adjusted_record(rows, records, entry)
    if wanted:
        record = records + row * _RECORD
        own = adjusted + entry * vocab_size
        number = tl.arange(0, BLOCK)
        num_biases = tl.load(record + _NUM_BIASES)
        for first in range(0, num_biases, BLOCK):
            inside = first + number < num_biases
            token = tl.load(bias_ids + row * bias_stride + first + number, mask=inside, other=-1)
            value = tl.load(bias_values + row * bias_stride + first + number, mask=inside, other=0.0)
            # Atomic because a token may be named twice.
            tl.atomic_add(own + token, value, mask=(token >= 0) & (token < vocab_size), sem="relaxed")
        tl.debug_barrier()
        num_stops = tl.load(record + _NUM_STOPS)
        output = tl.load(record + _LENGTH) - tl.load(record + _PROMPT_LENGTH)
        if output < tl.load(record + _MIN_TOKENS):
            for first in range(0, num_stops, BLOCK):
                inside = first + number < num_stops
                token = tl.load(stops + row * stop_stride + first + number, mask=inside, other=-1)
                masked = (token >= 0) & (token < vocab_size)
                tl.store(own + token, tl.full([BLOCK], float("-inf"), tl.float32), mask=masked)


@triton.jit
def penalises(record):  # type: ignore[no-untyped-def]
    """Does the row have any penalty?"""
    repetition = tl.load(record + _REPETITION).to(tl.float32, bitcast=True)
    presence = tl.load(record + _PRESENCE).to(tl.float32, bitcast=True)
    frequency = tl.load(record + _FREQUENCY).to(tl.float32, bitcast=True)
    return (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)
