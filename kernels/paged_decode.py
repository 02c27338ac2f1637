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
from torch import Tensor

from llmos.kernels.checks import FLOATS, INT32, Arguments, check_one_of, check_range, check_scale
from llmos.kernels.configs import decode_config
from llmos.kernels.decode_kernel import decode_kernel
from llmos.kernels.decode_plan import DecodePlan
from llmos.kernels.descriptors import page_descriptor

_MERGE_ELEMENTS = 8192  # partial results that the merging program holds at once: 64 registers per thread


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
    descriptors: bool = False,
    plan: DecodePlan,
    out: Tensor,
) -> Tensor:
    """Attend, write `out` [batch, heads, head_dim] and return it.

    q: [batch, heads, head_dim]. k_pages, v_pages: [num_pages, kv_heads, page_size, head_dim] of q's type, any distance between pages.
    page_table: int32[max_rows, max_pages]. rows, context: int32[batch], those of `plan.prepare`: the entry's row in the page table, and
    its tokens to attend to, the newest included; 0 makes the entry inactive: its row is not looked at, its output is zeros.
    window: the plan's. softcap: 0, or scores become softcap * tanh(score / softcap).
    descriptors: load pages by tensor descriptors instead of pointers (Hopper and later).
    The caller vouches for values: 0 <= context <= max_pages * page_size, pages in range, `plan.prepare` before the first layer.
    """
    sizes = _check(q, k_pages, v_pages, page_table, rows, context, scale, window, softcap, plan, out)
    page_size, head_dim = sizes["page_size"], sizes["head_dim"]
    groups, block_d = sizes["heads"] // sizes["kv_heads"], triton.next_power_of_2(head_dim)
    config = decode_config(head_dim, k_pages.dtype)
    tile = min(page_size, config.tile)
    decode_kernel[(plan.num_programs,)](
        q,
        page_descriptor("k_pages", k_pages, tile) if descriptors else k_pages,
        page_descriptor("v_pages", v_pages, tile) if descriptors else v_pages,
        page_table,
        plan.entries,
        plan.programs,
        plan.counters,
        plan.partials,
        plan.stats,
        out,
        float(scale),
        float(softcap),
        plan.batch,
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
        GROUPS=groups,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=16,
        PAGE=page_size,
        TILE=tile,
        HAS_WINDOW=window > 0,
        HAS_SOFTCAP=softcap > 0,
        DESCRIPTORS=descriptors,
        DETERMINISTIC=plan.deterministic,
        MAX_SPLITS=plan.max_splits,
        **merge_constants(groups, block_d),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    return out


def merge_constants(groups: int, block_d: int) -> dict[str, int]:
    """How many parts of how many heads the merging program takes at once."""
    padded = triton.next_power_of_2(groups)
    return {"MERGE_GROUPS": padded, "MERGE_PARTS": max(1, _MERGE_ELEMENTS // (padded * block_d))}


def _check(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    rows: Tensor,
    context: Tensor,
    scale: float,
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
    check_scale(scale)
    check_one_of("window", window, (plan.window,))
    check_range("softcap", softcap, 0.0, 1e6)
    return sizes
