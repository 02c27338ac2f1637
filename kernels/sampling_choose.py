"""From what the tiles of a row know (`sampling_scan`) to its token. One program per entry; greedy and unfiltered rows are done at once.

A filter keeps what lies above a threshold, which is found without a sort. Distances to the largest logit over the temperature are floats
>= 0, whose bits, as integers, have the same order: a *key*; a small key is a likely token. The set that top-k or top-p keeps is
{key <= K} for the smallest K at which enough tokens (or enough probability) are counted, and K is found by bisection.

1. The noisy winner of the whole row, known already, is the winner of any set that holds it. So it is enough to measure what is more
   likely than it: one pass over the groups that have such tokens. (Not where top-p counts shares of what top-k left.)
2. Else a bound for K comes from the groups' peaks alone: k peaks are k tokens. The groups with a peak inside the bound are listed; they
   hold all that the filters can keep, mostly a few hundred tokens, and K is found on them.

Sums are over fixed tiles in a fixed order, so a row's token does not depend on its batch; equal keys are kept or dropped together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmos.kernels import row_table
from llmos.kernels.sampling_noise import gumbel
from llmos.kernels.sampling_scan import (
    ARGMAX,
    BAD,
    MAX,
    MIN_TEMPERATURE,
    NOISY,
    NOISY_ID,
    SUM,
    filters_of,
    is_adjusted,
    is_filtered,
    key_of,
    load_scores,
    temperature_of,
)

_RECORD = tl.constexpr(row_table.RECORD_WORDS)
_LAST_KEY = tl.constexpr(0x7F7F_FFFF)  # of the largest finite distance


@triton.jit
def choose_kernel(  # type: ignore[no-untyped-def]
    logits,
    adjusted,
    rows,
    records,
    floats,
    ints,
    peaks,
    lists,
    tokens,
    logits_stride,
    vocab_size,
    num_tiles,
    num_groups,
    GROUP: tl.constexpr,
    LIST_GROUPS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    ADJUST: tl.constexpr,
    FLOATS: tl.constexpr,
    INTS: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry).to(tl.int64)
    if row < 0:
        tl.store(tokens + entry, -1)
        return
    record = records + row * _RECORD
    tile = tl.arange(0, BLOCK_TILES)
    exists = tile < num_tiles
    own_floats = floats + entry * num_tiles * FLOATS + tile
    own_ints = ints + entry * num_tiles * INTS + tile
    bad = tl.max(tl.load(own_ints + BAD * num_tiles, mask=exists, other=0), 0)
    maxima = tl.load(own_floats + MAX * num_tiles, mask=exists, other=float("-inf"))
    largest, best = tl.max(maxima, 0, return_indices=True)
    token = tl.load(ints + entry * num_tiles * INTS + ARGMAX * num_tiles + best)
    usable = (bad == 0) & (largest > float("-inf")) & (largest < float("inf"))
    temperature = temperature_of(record)
    if usable & (temperature > 0):
        temperature = tl.maximum(temperature, MIN_TEMPERATURE)
        shift = tl.div_rn(maxima - largest, temperature)
        noisy = tl.load(own_floats + NOISY * num_tiles, mask=exists, other=float("-inf")) + shift
        _, best = tl.max(noisy, 0, return_indices=True)
        token = tl.load(ints + entry * num_tiles * INTS + NOISY_ID * num_tiles + best)
        if is_filtered(record, vocab_size):
            sums = tl.load(own_floats + SUM * num_tiles, mask=exists, other=0.0)
            total = tl.sum((sums * tl.exp(shift)).to(tl.float64), 0)
            changed = is_adjusted(record) if ADJUST else False
            token = _filtered(
                logits + entry * logits_stride,
                adjusted + entry * vocab_size,
                changed,
                record,
                peaks + entry * num_groups,
                lists + entry * num_groups,
                largest,
                temperature,
                total,
                token,
                vocab_size,
                num_groups,
                GROUP,
                LIST_GROUPS,
                BLOCK_GROUPS,
                ADJUST,
            )
    tl.store(tokens + entry, tl.where(usable, token, -1))


@triton.jit
def _filtered(  # type: ignore[no-untyped-def]
    logits,
    adjusted,
    changed,
    record,
    peaks,
    groups,
    largest,
    temperature,
    total,
    winner,
    vocab_size,
    num_groups,
    GROUP: tl.constexpr,
    LIST_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    ADJUST: tl.constexpr,
):
    """The token of a row with filters. winner: the unfiltered choice."""
    top_k, top_p, log_min_p = filters_of(record)
    limited = top_k < vocab_size
    shares_of_k = limited & (top_p < 1.0)
    wanted_mass = tl.where(top_p < 1.0, top_p.to(tl.float64) * total, float("inf"))
    floor = tl.minimum((0.0 - log_min_p).to(tl.int32, bitcast=True), _LAST_KEY)
    group = tl.arange(0, BLOCK_GROUPS)
    peak_keys = _keys(tl.load(peaks + group, mask=group < num_groups, other=float("-inf")), largest, temperature)

    bound = _LAST_KEY
    accepted = 0
    if not shares_of_k:
        own = load_scores(logits, adjusted, changed, winner, winner >= 0, ADJUST)
        winner_key = _keys(own, largest, temperature)
        count = _list_groups(groups, group, peak_keys, winner_key - 1)
        above, mass = _measure(
            logits, adjusted, changed, groups, count, winner_key - 1, largest, temperature, vocab_size, GROUP, LIST_GROUPS, ADJUST
        )  # fmt: skip
        accepted = ((above < top_k) & (mass < wanted_mass) & (winner_key <= floor)).to(tl.int32)
        bound = tl.minimum(floor, winner_key - 1)  # if it is refused, all that is kept lies above it
    token = winner
    if accepted == 0:
        if limited & (top_k <= num_groups):
            bound = tl.minimum(bound, _smallest_key(peak_keys, tl.full([BLOCK_GROUPS], 1.0, tl.float32), top_k, bound))
        if (not limited) & (top_p < 1.0):
            weights = tl.exp(0.0 - peak_keys.to(tl.float32, bitcast=True))
            bound = tl.minimum(bound, _smallest_key(peak_keys, weights, wanted_mass, bound))
        count = _list_groups(groups, group, peak_keys, bound)
        if limited:
            bound = _smallest_listed(
                logits, adjusted, changed, groups, count, bound, top_k.to(tl.float64), False, largest, temperature, vocab_size,
                GROUP, LIST_GROUPS, ADJUST,
            )  # fmt: skip
        if top_p < 1.0:
            if limited:
                _, mass = _measure(
                    logits, adjusted, changed, groups, count, bound, largest, temperature, vocab_size, GROUP, LIST_GROUPS, ADJUST
                )  # fmt: skip
                wanted_mass = top_p.to(tl.float64) * mass
            bound = _smallest_listed(
                logits, adjusted, changed, groups, count, bound, wanted_mass, True, largest, temperature, vocab_size,
                GROUP, LIST_GROUPS, ADJUST,
            )  # fmt: skip
        bound = tl.minimum(bound, floor)
        token = _noisiest(
            logits, adjusted, changed, groups, count, bound, key_of(record), largest, temperature, vocab_size,
            GROUP, LIST_GROUPS, ADJUST,
        )  # fmt: skip
    return token


@triton.jit
def _keys(scores, largest, temperature):  # type: ignore[no-untyped-def]
    """int32 with the order of falling scores: the bits of (largest - score) / temperature, which is +0 or more."""
    return tl.div_rn(largest - scores, temperature).to(tl.int32, bitcast=True)


@triton.jit
def _smallest_key(keys, weights, target, high):  # type: ignore[no-untyped-def]
    """The smallest K with sum(weights of keys <= K) >= target; `high` if there is none below."""
    low = -1
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum(tl.where(keys <= middle, weights, 0.0), 0) >= target
        low = tl.where(reached, low, middle)
        high = tl.where(reached, middle, high)
    return high


@triton.jit
def _list_groups(groups, group, peak_keys, bound):  # type: ignore[no-untyped-def]
    """Write the numbers of the groups whose peak is inside the bound, in order; returns how many."""
    wanted = peak_keys <= bound
    place = tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.debug_barrier()  # whoever still reads the list before
    tl.store(groups + place, group, mask=wanted)
    tl.debug_barrier()
    return tl.sum(wanted.to(tl.int32), 0)


@triton.jit
def _load_keys(  # type: ignore[no-untyped-def]
    logits, adjusted, changed, groups, count, first, largest, temperature, vocab_size,
    GROUP: tl.constexpr, LIST_GROUPS: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """Keys and ids of the tokens of LIST_GROUPS listed groups, ids ascending; the key of infinity where there is no token."""
    number = first + tl.arange(0, LIST_GROUPS)
    listed = number < count
    group = tl.load(groups + number, mask=listed, other=0)
    ids = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [LIST_GROUPS * GROUP])
    listed = tl.reshape(tl.broadcast_to(listed[:, None], [LIST_GROUPS, GROUP]), [LIST_GROUPS * GROUP])
    scores = load_scores(logits, adjusted, changed, ids, listed & (ids < vocab_size), ADJUST)
    return _keys(scores, largest, temperature), ids


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    logits, adjusted, changed, groups, count, key, largest, temperature, vocab_size,
    GROUP: tl.constexpr, LIST_GROUPS: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """How many listed tokens have at most this key, and the sum of their exponentials."""
    tokens = tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float64)
    for first in range(0, count, LIST_GROUPS):
        keys, _ = _load_keys(
            logits, adjusted, changed, groups, count, first, largest, temperature, vocab_size, GROUP, LIST_GROUPS, ADJUST
        )  # fmt: skip
        inside = keys <= key
        tokens += tl.sum(inside.to(tl.int32), 0)
        mass += tl.sum(tl.where(inside, tl.exp(0.0 - keys.to(tl.float32, bitcast=True)), 0.0), 0).to(tl.float64)
    return tokens, mass


@triton.jit
def _smallest_listed(  # type: ignore[no-untyped-def]
    logits, adjusted, changed, groups, count, high, target, BY_MASS: tl.constexpr, largest, temperature, vocab_size,
    GROUP: tl.constexpr, LIST_GROUPS: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """`_smallest_key` over the listed tokens, by number or by mass. Ends early when one token is left between the ends."""
    low = tl.full([], -1, tl.int32)
    low_tokens = tl.full([], 0, tl.int32)
    high_tokens, _ = _measure(
        logits, adjusted, changed, groups, count, high, largest, temperature, vocab_size, GROUP, LIST_GROUPS, ADJUST
    )  # fmt: skip
    while (high - low > 1) & (high_tokens - low_tokens > 1):
        middle = low + (high - low) // 2
        tokens, mass = _measure(
            logits, adjusted, changed, groups, count, middle, largest, temperature, vocab_size, GROUP, LIST_GROUPS, ADJUST
        )  # fmt: skip
        if BY_MASS:
            reached = mass >= target
        else:
            reached = tokens.to(tl.float64) >= target
        low = tl.where(reached, low, middle)
        low_tokens = tl.where(reached, low_tokens, tokens)
        high = tl.where(reached, middle, high)
        high_tokens = tl.where(reached, tokens, high_tokens)
    return high


@triton.jit
def _noisiest(  # type: ignore[no-untyped-def]
    logits, adjusted, changed, groups, count, bound, stream, largest, temperature, vocab_size,
    GROUP: tl.constexpr, LIST_GROUPS: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """The listed token with a key inside the bound whose score plus noise is largest; the smallest id of equals."""
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    for first in range(0, count, LIST_GROUPS):
        keys, ids = _load_keys(
            logits, adjusted, changed, groups, count, first, largest, temperature, vocab_size, GROUP, LIST_GROUPS, ADJUST
        )  # fmt: skip
        noisy = tl.where(keys <= bound, gumbel(stream, ids) - keys.to(tl.float32, bitcast=True), float("-inf"))
        value, where = tl.max(noisy, 0, return_indices=True)
        better = value > best
        found = tl.load(groups + first + where // GROUP) * GROUP + where % GROUP
        token = tl.where(better, found, token)
        best = tl.where(better, value, best)
    return token
