"""The device side of `paged_decode`: walk a slice of the work list, attend page by page, merge what was split.

The order of every sum follows from where a head is cut and from nothing else: not from which program runs when, nor who merges.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmos.kernels.decode_plan import (
    ACTIVE,
    CONTEXT,
    ENTRY,
    ENTRY_COLUMNS,
    ENTRY_CONTEXT,
    ENTRY_FIRST_UNIT,
    ENTRY_ROW,
    FIRST_UNIT,
    PROGRAM_COLUMNS,
    ROW,
    SLICE_BEGIN,
    SLICE_END,
    TOTAL,
    first_page,
    step_pages,
    unit_pages,
)
from llmos.kernels.tiles import accumulate, cap_scores, dot, load_tile, score_factor


@triton.jit(do_not_specialize=["batch"])
def decode_kernel(  # type: ignore[no-untyped-def]
    q,  # [batch, KV_HEADS * GROUPS, HEAD_DIM]
    k_pages,  # [num_pages, KV_HEADS, PAGE, HEAD_DIM], see `load_tile`
    v_pages,  # like k_pages
    page_table,  # int32[max_rows, max_pages]
    entries,  # int32[max_batch, ENTRY_COLUMNS]
    programs,  # int32[num_programs, PROGRAM_COLUMNS]
    counters,  # int32[max_batch * KV_HEADS], zeros
    partials,  # float32[num_partials, GROUPS, HEAD_DIM]
    stats,  # float32[num_partials, 2, GROUPS]: maximum, sum of weights
    out,  # like q
    scale,
    softcap,
    batch,
    window,
    split_pages,
    q_entry_stride,
    q_head_stride,
    out_entry_stride,
    out_head_stride,
    k_page_stride,
    v_page_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MERGE_GROUPS: tl.constexpr,
    MERGE_PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    record = programs + program * PROGRAM_COLUMNS
    entry = tl.load(record + ENTRY)
    first_unit = tl.load(record + FIRST_UNIT)
    context = tl.load(record + CONTEXT)
    row = tl.load(record + ROW)
    unit = tl.load(record + SLICE_BEGIN)
    slice_end = tl.load(record + SLICE_END)
    group, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    used = (group < GROUPS)[:, None] & (dim < HEAD_DIM)[None, :]

    while unit < slice_end:
        pages = unit_pages(context, window, PAGE)
        step = step_pages(pages, split_pages, MAX_SPLITS)
        head = (unit - first_unit) // pages
        begin = unit - first_unit - head * pages
        if DETERMINISTIC:
            # What is before the first cut in this slice belongs to the program in whose slice it began.
            begin = tl.minimum((begin + step - 1) // step * step, pages)
            end = tl.minimum(begin + step, pages)
        else:
            end = tl.minimum(begin + slice_end - unit, pages)
        head_unit = first_unit + head * pages
        if (begin < end) & (head_unit + begin < slice_end):
            heads = head * GROUPS + group
            queries = tl.load(
                q + entry.to(tl.int64) * q_entry_stride + heads[:, None] * q_head_stride + dim[None, :],
                mask=used,
                other=0.0,
            )
            skipped = first_page(context, window, PAGE)
            maximum, total, attended = _attend(
                queries,
                k_pages,
                v_pages,
                page_table + row.to(tl.int64) * table_stride,
                head,
                skipped + begin,
                skipped + end,
                context,
                window,
                scale,
                softcap,
                k_page_stride,
                v_page_stride,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_M,
                PAGE,
                TILE,
                HAS_WINDOW,
                HAS_SOFTCAP,
                DESCRIPTORS,
            )
            target = out + entry.to(tl.int64) * out_entry_stride + head * GROUPS * out_head_stride
            if (begin == 0) & (end == pages):
                result = (
                    attended / tl.where(total > 0.0, total, 1.0)[:, None]
                )  # nothing was added up for an inactive entry
                pointers = target + group[:, None] * out_head_stride + dim[None, :]
                tl.store(pointers, result.to(out.dtype.element_ty), mask=used)
            else:
                pair = entry * KV_HEADS + head
                if DETERMINISTIC:
                    first_slot = pair * MAX_SPLITS
                    other_slots = first_slot
                    slot_step = 1
                    count = (pages + step - 1) // step
                    slot = first_slot + begin // step
                else:
                    # The program that a unit belongs to follows from how the line was cut.
                    all_units = tl.load(record + TOTAL)
                    active = tl.load(record + ACTIVE).to(tl.int64)
                    owner = (((head_unit + 1) * active - 1) // all_units).to(tl.int32)
                    last_owner = (((head_unit + pages) * active - 1) // all_units).to(tl.int32)
                    first_slot = 2 * owner + 1
                    other_slots = 2 * owner
                    slot_step = 2
                    count = last_owner - owner + 1
                    slot = tl.where(begin == 0, 2 * program + 1, 2 * program)
                row_offset = slot.to(tl.int64) * GROUPS + group
                tl.store(partials + row_offset[:, None] * HEAD_DIM + dim[None, :], attended, mask=used)
                stat = stats + slot.to(tl.int64) * 2 * GROUPS + group
                tl.store(stat, maximum, mask=group < GROUPS)
                tl.store(stat + GROUPS, total, mask=group < GROUPS)
                # The barriers make one thread's release and acquire hold for all threads of the program.
                tl.debug_barrier()
                arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel")
                tl.debug_barrier()
                if arrived == count - 1:
                    tl.store(counters + pair, 0)
                    _merge(
                        partials,
                        stats,
                        target,
                        out_head_stride,
                        first_slot,
                        other_slots,
                        slot_step,
                        count,
                        GROUPS,
                        HEAD_DIM,
                        BLOCK_D,
                        MERGE_GROUPS,
                        MERGE_PARTS,
                    )
        unit = head_unit + end
        if unit == first_unit + pages * KV_HEADS:
            entry += 1
            if (unit < slice_end) & (entry < batch):
                own = entries + entry * ENTRY_COLUMNS
                first_unit = tl.load(own + ENTRY_FIRST_UNIT)
                context = tl.load(own + ENTRY_CONTEXT)
                row = tl.load(own + ENTRY_ROW)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    queries,  # [BLOCK_M, BLOCK_D]
    k_pages,
    v_pages,
    table,  # the entry's row of the page table
    head,
    begin,  # pages [begin, end) of the entry
    end,
    context,
    window,
    scale,
    softcap,
    k_page_stride,
    v_page_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """(maximum [BLOCK_M], sum of weights [BLOCK_M], weighted sum of V [BLOCK_M, BLOCK_D]), weights are 2^(log2 - maximum)."""
    PARTS: tl.constexpr = PAGE // TILE
    factor = score_factor(scale, HAS_SOFTCAP)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    oldest = tl.maximum(context - window, 0) if HAS_WINDOW else 0
    # Only tiles in which something is visible, so the maximum is finite after the first.
    first_tile = tl.maximum(begin * PARTS, oldest // TILE)
    last_tile = tl.minimum(end * PARTS, (context + TILE - 1) // TILE)
    # The next page's number is carried into the iteration that needs it: as an indirect load in one iteration it would take a stage of
    # the pipeline away from K and V.
    page = tl.load(table + first_tile // PARTS, mask=first_tile < last_tile, other=0).to(tl.int64)
    for tile in tl.range(first_tile, last_tile):
        next_page = tl.load(table + tl.minimum(tile + 1, last_tile - 1) // PARTS).to(tl.int64)
        slot = tile % PARTS * TILE
        position = tile * TILE + tl.arange(0, TILE)
        visible = position < context
        k = load_tile(
            k_pages, page, k_page_stride, head, slot, visible, PAGE, TILE, HEAD_DIM, BLOCK_D, False, DESCRIPTORS
        )
        v = load_tile(
            v_pages, page, v_page_stride, head, slot, visible, PAGE, TILE, HEAD_DIM, BLOCK_D, True, DESCRIPTORS
        )
        scores = dot(queries, tl.trans(k), tl.zeros([BLOCK_M, TILE], dtype=tl.float32))
        scores = cap_scores(scores, scale, softcap, HAS_SOFTCAP)
        if HAS_WINDOW:
            visible = visible & (position >= oldest)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        maximum, total, attended = accumulate(scores, v, maximum, total, attended, factor, False)
        page = next_page
    return maximum * factor, total, attended


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    partials,
    stats,
    target,  # out of the first of the head's groups
    out_head_stride,
    first_slot,  # where part 0 is; part i > 0 is at other_slots + i * slot_step
    other_slots,
    slot_step,
    count,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_GROUPS: tl.constexpr,
    MERGE_PARTS: tl.constexpr,
):
    """Add up the parts of a head, MERGE_PARTS at a time, and write the result."""
    group, dim = tl.arange(0, MERGE_GROUPS), tl.arange(0, BLOCK_D)
    best = tl.full([MERGE_GROUPS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([MERGE_GROUPS], dtype=tl.float32)
    attended = tl.zeros([MERGE_GROUPS, BLOCK_D], dtype=tl.float32)
    for first in range(0, count, MERGE_PARTS):
        part = first + tl.arange(0, MERGE_PARTS)
        slot = tl.where(part == 0, first_slot, other_slots + part * slot_step).to(tl.int64)
        known = (part < count)[:, None] & (group < GROUPS)[None, :]
        stat = stats + slot[:, None] * (2 * GROUPS) + group[None, :]
        # Other programs wrote these: .cg reads past this multiprocessor's own cache.
        maxima = tl.load(stat, mask=known, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(stat + GROUPS, mask=known, other=0.0, cache_modifier=".cg")
        pointers = partials + ((slot[:, None] * GROUPS + group[None, :]) * HEAD_DIM)[:, :, None] + dim[None, None, :]
        loaded = known[:, :, None] & (dim < HEAD_DIM)[None, None, :]
        values = tl.load(pointers, mask=loaded, other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(maxima, 0))
        new_best = tl.where(group < GROUPS, new_best, 0.0)
        factors = tl.exp2(maxima - new_best[None, :])
        decay = tl.exp2(best - new_best)
        total = total * decay + tl.sum(factors * sums, 0)
        attended = attended * decay[:, None] + tl.sum(factors[:, :, None] * values, 0)
        best = new_best
    result = attended / tl.where(group < GROUPS, total, 1.0)[:, None]
    used = (group < GROUPS)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(target + group[:, None] * out_head_stride + dim[None, :], result.to(target.dtype.element_ty), mask=used)
