"""Prefill attention over pages: chunks of several sequences, causal, each against its whole context so far, one launch per layer.

A program takes a block of query tokens of one sequence, with all query heads of a KV head as further rows, so that each tile of K and V
is read once for the group. Tiles that every query of a block sees are attended to without a mask. Sequences are found on the device by
bisection: lengths do not come to the host and no list is prepared.

What holds about bits: a token's result follows from its position, its q and its context alone. Neither the chunk that it is part of,
nor its place there, nor its batch mates change it, down to a chunk of one token, so a prompt may be cut, preempted and recomputed at
will. That rests on tiles that begin at fixed positions, on a configuration that follows from shapes only, on hidden tiles adding exact
zeros, and on the hardware's matrix product treating its rows alike (all known ones do). It does not hold between this kernel and
`paged_decode`, which adds up in another order: who needs equal bits there too decodes with this kernel, as chunks of one token, and pays
for it with a context that is not split over programs.

`paged_prefill_reference` in `reference.py` says the same in plain torch.
"""

from __future__ import annotations

import triton
from torch import Tensor

from llmos.kernels.checks import FLOATS, INT32, Arguments, check_one_of, check_range, check_scale
from llmos.kernels.configs import prefill_config
from llmos.kernels.decode_plan import HEAD_DIMS, PAGE_SIZES, check_groups
from llmos.kernels.descriptors import page_descriptor
from llmos.kernels.prefill_kernel import prefill_kernel


def paged_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    rows: Tensor,
    q_start: Tensor,
    q_len: Tensor,
    q_pos: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    descriptors: bool = False,
    out: Tensor,
) -> Tensor:
    """Attend, write the owned tokens of `out` [tokens, heads, head_dim] and return it.

    q: [tokens, heads, head_dim]. k_pages, v_pages: [num_pages, kv_heads, page_size, head_dim] of q's type, any distance between pages;
    the chunks' own K and V are in their pages already. page_table: int32[max_rows, max_pages].
    rows, q_start, q_len, q_pos: int32[sequences]: sequence i reads row rows[i] of the page table and owns tokens
    [q_start[i], q_start[i] + q_len[i]), which stand at positions q_pos[i], q_pos[i] + 1, ... of it.
    window: 0, or so many newest tokens are visible, the own one included. softcap: 0, or scores become softcap * tanh(score / softcap).
    descriptors: load pages by tensor descriptors instead of pointers (Hopper and later).
    The caller vouches for values: q_start ascending, q_start[i] + q_len[i] <= q_start[i + 1] and <= tokens, pages in range. q_len may be
    0: such a sequence's row is not looked at. Tokens that no sequence owns keep what `out` held.
    """
    sizes = _check(q, k_pages, v_pages, page_table, rows, q_start, q_len, q_pos, scale, window, softcap, out)
    if not sizes["tokens"] or not sizes["sequences"]:
        return out
    groups, head_dim, page_size = sizes["heads"] // sizes["kv_heads"], sizes["head_dim"], sizes["page_size"]
    config = prefill_config(head_dim, k_pages.dtype)
    tile = min(page_size, config.tile)
    blocks = sizes["tokens"] // (config.block_m // groups) + sizes["sequences"]  # at least as many as are needed
    prefill_kernel[(sizes["kv_heads"], blocks)](
        q,
        page_descriptor("k_pages", k_pages, tile) if descriptors else k_pages,
        page_descriptor("v_pages", v_pages, tile) if descriptors else v_pages,
        page_table,
        rows,
        q_start,
        q_len,
        q_pos,
        out,
        float(scale),
        float(softcap),
        window,
        sizes["sequences"],
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        k_pages.stride(0),
        v_pages.stride(0),
        page_table.stride(0),
        GROUPS=groups,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=config.block_m,
        PAGE=page_size,
        TILE=tile,
        HAS_WINDOW=window > 0,
        HAS_SOFTCAP=softcap > 0,
        DESCRIPTORS=descriptors,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    return out


def _check(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    rows: Tensor,
    q_start: Tensor,
    q_len: Tensor,
    q_pos: Tensor,
    scale: float,
    window: int,
    softcap: float,
    out: Tensor,
) -> Arguments:
    sizes = Arguments()
    sizes.tensor("q", q, "tokens heads head_dim", FLOATS)
    sizes.tensor("k_pages", k_pages, "num_pages kv_heads page_size head_dim", (q.dtype,), contiguous=3)
    sizes.tensor("v_pages", v_pages, "num_pages kv_heads page_size head_dim", (q.dtype,), contiguous=3)
    sizes.tensor("page_table", page_table, "max_rows max_pages", INT32)
    for field, value in (("rows", rows), ("q_start", q_start), ("q_len", q_len), ("q_pos", q_pos)):
        sizes.tensor(field, value, "sequences", INT32)
    sizes.tensor("out", out, "tokens heads head_dim", (q.dtype,))
    check_one_of("page_size", sizes["page_size"], PAGE_SIZES)
    check_one_of("head_dim", sizes["head_dim"], HEAD_DIMS)
    check_groups(sizes["heads"], sizes["kv_heads"])
    check_scale(scale)
    check_range("window", window, 0, 2**31 - 1)
    check_range("softcap", softcap, 0.0, 1e6)
    return sizes
