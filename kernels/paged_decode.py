"""Decode attention over pages: one query token per batch entry against everything in its pages, one launch per layer.

A fixed number of programs walks the slices of a `DecodePlan`, whatever the lengths are: they are read on the device, so the launch can
live in a CUDA graph. The query heads of a KV head are the rows of one matrix product (padded to 16), so K and V are read once. A head
that is split over programs leaves float32 partial results; the last program to arrive merges them in order, in the same launch.
A tile is a page or a part of one: contiguous memory. Slots behind the newest token and pages before the window are never used, whatever
they hold.

`paged_decode_reference` in `reference.py` says the same in plain torch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmos.kernels.checks import FLOATS, INT32, Arguments, check_one_of, check_range
from llmos.kernels.configs import decode_config
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
    DecodePlan,
    first_page,
    step_pages,
    unit_pages,
)
from llmos.kernels.tiles import dot, load_tile, log2_weights


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    rows: Tensor,
    context: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    plan: DecodePlan,
    out: Tensor,
) -> Tensor:
    """Attend, write `out` [batch, heads, head_dim] and return it.

    q: [batch, heads, head_dim]. k_pages, v_pages: [num_pages, kv_heads, page_size, head_dim] of q's type, any distance between pages.
    page_table: int32[max_rows, max_pages]. rows, context: int32[batch], those of `plan.prepare`: the entry's row in the page table, and
    its tokens to attend to, the newest included; 0 makes the entry inactive: its row is not looked at, its output is zeros.
    window: the plan's. softcap: 0, or scores become softcap * tanh(score / softcap).
    The caller vouches for values: 0 <= context <= max_pages * page_size, pages in range, `plan.prepare` before the first layer.
    """
    sizes = _check(q, k_pages, v_pages, page_table, rows, context, window, softcap, plan, out)
    page_size, head_dim = sizes["page_size"], sizes["head_dim"]
    config = decode_config(head_dim, k_pages.dtype)
    _decode_kernel[(plan.num_programs,)](
        q,
        k_pages,
        v_pages,
        page_table,
        plan.entries,
        plan.programs,
        plan.counters,
        plan.partials,
        plan.stats,
        out,
        float(scale),
        float(softcap),
        window,
        plan.split_pages,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        k_pages.stride(0),
        v_pages.stride(0),
        page_table.stride(0),
        KV_HEADS=sizes["kv_heads"],
        GROUPS=sizes["heads"] // sizes["kv_heads"],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=16,
        PAGE=page_size,
        TILE=min(page_size, config.tile),
        HAS_WINDOW=window > 0,
        HAS_SOFTCAP=softcap > 0,
        DETERMINISTIC=plan.deterministic,
        MAX_SPLITS=plan.max_splits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _check(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    rows: Tensor,
    context: Tensor,
    window: int,
    softcap: float,
    plan: DecodePlan,
    out: Tensor,
) -> Arguments:
    sizes = Arguments(
        heads=plan.num_heads,
        kv_heads=plan.num_kv_heads,
        head_dim=plan.head_dim,
        page_size=plan.page_size,
        batch=plan.batch,
    )
    sizes.tensor("plan", plan.entries, "max_batch columns", INT32)
    sizes.tensor("q", q, "batch heads head_dim", FLOATS)
    sizes.tensor("k_pages", k_pages, "num_pages kv_heads page_size head_dim", (q.dtype,), contiguous=3)
    sizes.tensor("v_pages", v_pages, "num_pages kv_heads page_size head_dim", (q.dtype,), contiguous=3)
    sizes.tensor("page_table", page_table, "max_rows max_pages", INT32)
    sizes.tensor("rows", rows, "batch", INT32)
    sizes.tensor("context", context, "batch", INT32)
    sizes.tensor("out", out, "batch heads head_dim", (q.dtype,))
    check_one_of("window", window, (plan.window,))
    check_range("softcap", softcap, 0.0, 1e6)
    return sizes


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    q,  # [batch, KV_HEADS * GROUPS, HEAD_DIM]
    k_pages,  # [num_pages, KV_HEADS, PAGE, HEAD_DIM]
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
    window,
    split_pages,
    q_entry_stride,
    q_head_stride,
    out_entry_stride,
    out_head_stride,
    k_page_stride,
    v_page_stride,
    table_row_stride,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    program = tl.program_id(0)
    record = programs + program * 8
    entry = tl.load(record + ENTRY)
    first_unit = tl.load(record + FIRST_UNIT)
    context = tl.load(record + CONTEXT)
    row = tl.load(record + ROW)
    unit = tl.load(record + SLICE_BEGIN)
    slice_end = tl.load(record + SLICE_END)
    group = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    used = (group < GROUPS)[:, None] & (dim < HEAD_DIM)[None, :]

    while unit < slice_end:
        pages = unit_pages(context, window, PAGE)
        step = step_pages(pages, split_pages, MAX_SPLITS)
        head = (unit - first_unit) // pages
        begin = (unit - first_unit) - head * pages
        if DETERMINISTIC:
            # A slice begins with the first cut in it; what is before belongs to the program that met the cut before.
            begin = (begin + step - 1) // step * step
            end = tl.minimum(begin + step, pages)
            unit = first_unit + head * pages + begin
        else:
            end = tl.minimum(begin + (slice_end - unit), pages)
        if begin < end and unit < slice_end:
            heads = head * GROUPS + group
            queries = tl.load(
                q + entry.to(tl.int64) * q_entry_stride + heads[:, None] * q_head_stride + dim[None, :],
                mask=used,
                other=0.0,
            )
            maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
            total = tl.zeros([BLOCK_M], dtype=tl.float32)
            attended = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            skipped = first_page(context, window, PAGE)
            oldest = tl.maximum(context - window, 0) if HAS_WINDOW else 0
            first_tile = tl.maximum((skipped + begin) * (PAGE // TILE), oldest // TILE)
            last_tile = tl.minimum((skipped + end) * (PAGE // TILE), (context + TILE - 1) // TILE)
            table = page_table + row.to(tl.int64) * table_row_stride
            for tile in tl.range(first_tile, last_tile):
                page = tl.load(table + tile // (PAGE // TILE)).to(tl.int64)
                slot = head * PAGE + tile % (PAGE // TILE) * TILE
                position = tile * TILE + tl.arange(0, TILE)
                visible = position < context
                k = load_tile(
                    k_pages + page * k_page_stride, slot, tl.arange(0, TILE), HEAD_DIM, BLOCK_D, visible, False
                )
                v = load_tile(
                    v_pages + page * v_page_stride, slot, tl.arange(0, TILE), HEAD_DIM, BLOCK_D, visible, True
                )
                scores = log2_weights(dot(queries, tl.trans(k)), scale, softcap, HAS_SOFTCAP)
                if HAS_WINDOW:
                    scores = tl.where(visible & (position >= oldest), scores, float("-inf"))
                else:
                    scores = tl.where(visible[None, :], scores, float("-inf"))
                new_maximum = tl.maximum(maximum, tl.max(scores, 1))
                weights = tl.exp2(scores - new_maximum[:, None])
                decay = tl.exp2(maximum - new_maximum)
                total = total * decay + tl.sum(weights, 1)
                attended = attended * decay[:, None] + dot(weights.to(v.dtype), v)
                maximum = new_maximum
