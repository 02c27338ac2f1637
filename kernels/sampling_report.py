"""Log-probabilities of the chosen token and of the best ones, of the model's own logits, for the rows that ask.

The best tokens come one by one: the largest of the groups' peaks names the group, the group names the token and its next peak. Twenty at
most are asked for, so this is cheaper than any sort. Of equal logits the smallest id comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmos.kernels import row_table
from llmos.kernels.sampling_scan import RAW_MAX, RAW_SUM, wants_logprobs

_RECORD = tl.constexpr(row_table.RECORD_WORDS)


@triton.jit
def report_kernel(  # type: ignore[no-untyped-def]
    logits,
    rows,
    records,
    floats,
    raw_peaks,
    tokens,
    logprobs,
    top_ids,
    top_logprobs,
    logits_stride,
    vocab_size,
    num_tiles,
    num_groups,
    GROUP: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    MAX_TOP: tl.constexpr,
    FLOATS: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry).to(tl.int64)
    token = tl.load(tokens + entry)
    if (row < 0) | (token < 0):
        return
    wanted = wants_logprobs(records + row * _RECORD)
    if wanted < 0:
        return
    own = logits + entry * logits_stride
    tile = tl.arange(0, BLOCK_TILES)
    exists = tile < num_tiles
    own_floats = floats + entry * num_tiles * FLOATS + tile
    maxima = tl.load(own_floats + RAW_MAX * num_tiles, mask=exists, other=float("-inf"))
    sums = tl.load(own_floats + RAW_SUM * num_tiles, mask=exists, other=0.0)
    largest = tl.max(maxima, 0)
    total = largest + tl.log(tl.sum(sums * tl.exp(maxima - largest), 0))
    tl.store(logprobs + entry, tl.load(own + token).to(tl.float32) - total)
    if wanted > 0:
        group = tl.arange(0, BLOCK_GROUPS)
        peaks = tl.load(raw_peaks + entry * num_groups + group, mask=group < num_groups, other=float("-inf"))
        last = tl.full([], float("inf"), tl.float32)
        last_id = tl.full([], -1, tl.int32)
        for number in range(0, tl.minimum(tl.minimum(wanted, MAX_TOP), vocab_size)):
            _, found = tl.max(peaks, 0, return_indices=True)
            ids = found * GROUP + tl.arange(0, GROUP)
            values = tl.load(own + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
            left = (values < last) | ((values == last) & (ids > last_id))
            last, where = tl.max(tl.where(left, values, float("-inf")), 0, return_indices=True)
            last_id = found * GROUP + where
            tl.store(top_ids + entry * MAX_TOP + number, last_id)
            tl.store(top_logprobs + entry * MAX_TOP + number, last - total)
            left = (values < last) | ((values == last) & (ids > last_id))
            peaks = tl.where(group == found, tl.max(tl.where(left, values, float("-inf")), 0), peaks)
