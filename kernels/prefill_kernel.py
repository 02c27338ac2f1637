"""The device side of `paged_prefill`: one block of query tokens of one sequence against its pages, for one KV head."""

from __future__ import annotations

import triton
import triton.language as tl

from llmos.kernels.tiles import accumulate, cap_scores, dot, load_tile, score_factor


@triton.jit(do_not_specialize=["sequences"])
def prefill_kernel(  # type: ignore[no-untyped-def]
    q,  # [tokens, KV_HEADS * GROUPS, HEAD_DIM]
    k_pages,  # [num_pages, KV_HEADS, PAGE, HEAD_DIM], see `load_tile`
    v_pages,  # like k_pages
    page_table,  # int32[max_rows, max_pages]
    rows,  # int32[sequences]
    q_start,  # int32[sequences], ascending
    q_len,  # int32[sequences]
    q_pos,  # int32[sequences]
    out,  # like q
    scale,
    softcap,
    window,
    sequences,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    k_page_stride,
    v_page_stride,
    table_stride,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUPS
    head = tl.program_id(0)
    # The last blocks of a chunk see the longest context, so they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = _find_sequence(q_start, block, sequences, BLOCK_Q)
    start = tl.load(q_start + sequence)
    length = tl.load(q_len + sequence)
    first = (block - (start // BLOCK_Q + sequence)) * BLOCK_Q
    if first < length:
        position = tl.load(q_pos + sequence) + first  # of the block's first token
        count = tl.minimum(length - first, BLOCK_Q)
        line, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        token = line // GROUPS
        heads = head * GROUPS + line % GROUPS
        used = (token < count)[:, None] & (dim < HEAD_DIM)[None, :]
        tokens = (start + first + token).to(tl.int64)
        offsets = tokens * q_token_stride + heads * q_head_stride
        queries = tl.load(q + offsets[:, None] + dim[None, :], mask=used, other=0.0)
        own = position + tl.minimum(token, count - 1)  # unused lines do as the last token does
        result = _attend(
            queries,
            k_pages,
            v_pages,
            page_table + tl.load(rows + sequence).to(tl.int64) * table_stride,
            head,
            own,
            position,
            position + count - 1,
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
        offsets = tokens * out_token_stride + heads * out_head_stride
        tl.store(out + offsets[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=used)


@triton.jit
def _find_sequence(q_start, block, sequences, BLOCK_Q: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sequence i has the blocks from q_start[i] // BLOCK_Q + i on, which are enough for its tokens: by bisection."""
    low = block * 0
    high = sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(q_start + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    queries,  # [BLOCK_M, BLOCK_D]
    k_pages,
    v_pages,
    table,  # the sequence's row of the page table
    head,
    own,  # [BLOCK_M]: each query's position
    oldest_query,  # the least and the greatest of them
    newest_query,
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
    """[BLOCK_M, BLOCK_D] in float32. Tiles begin at multiples of TILE whatever the chunk is; those that all queries see need no mask."""
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    end = newest_query // TILE + 1
    full_begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(oldest_query - window + 1, 0) // TILE
        full_begin = tl.minimum((tl.maximum(newest_query - window + 1, 0) + TILE - 1) // TILE, end)
        maximum, total, attended = _attend_tiles(
            queries,
            k_pages,
            v_pages,
            table,
            head,
            own,
            begin,
            full_begin,
            newest_query,
            window,
            scale,
            softcap,
            k_page_stride,
            v_page_stride,
            maximum,
            total,
            attended,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            PAGE,
            TILE,
            HAS_WINDOW,
            HAS_SOFTCAP,
            DESCRIPTORS,
            True,
        )
    full_end = tl.maximum((oldest_query + 1) // TILE, full_begin)
    maximum, total, attended = _attend_tiles(
        queries,
        k_pages,
        v_pages,
        table,
        head,
        own,
        full_begin,
        full_end,
        newest_query,
        window,
        scale,
        softcap,
        k_page_stride,
        v_page_stride,
        maximum,
        total,
        attended,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        PAGE,
        TILE,
        HAS_WINDOW,
        HAS_SOFTCAP,
        DESCRIPTORS,
        False,
    )
    maximum, total, attended = _attend_tiles(
        queries,
        k_pages,
        v_pages,
        table,
        head,
        own,
        full_end,
        end,
        newest_query,
        window,
        scale,
        softcap,
        k_page_stride,
        v_page_stride,
        maximum,
        total,
        attended,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        PAGE,
        TILE,
        HAS_WINDOW,
        HAS_SOFTCAP,
        DESCRIPTORS,
        True,
    )
    return attended / total[:, None]


@triton.jit
def _attend_tiles(  # type: ignore[no-untyped-def]
    queries,
    k_pages,
    v_pages,
    table,
    head,
    own,
    begin,  # tiles [begin, end) of the sequence
    end,
    newest_query,
    window,
    scale,
    softcap,
    k_page_stride,
    v_page_stride,
    maximum,
    total,
    attended,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
):
    PARTS: tl.constexpr = PAGE // TILE
    factor = score_factor(scale, HAS_SOFTCAP)
    # Carried into the iteration that needs it, as in decode.
    page = tl.load(table + begin // PARTS, mask=begin < end, other=0).to(tl.int64)
    for tile in tl.range(begin, end):
        next_page = tl.load(table + tl.minimum(tile + 1, end - 1) // PARTS).to(tl.int64)
        slot = tile % PARTS * TILE
        position = tile * TILE + tl.arange(0, TILE)
        written = position <= newest_query
        k = load_tile(
            k_pages, page, k_page_stride, head, slot, written, PAGE, TILE, HEAD_DIM, BLOCK_D, False, DESCRIPTORS
        )
        v = load_tile(
            v_pages, page, v_page_stride, head, slot, written, PAGE, TILE, HEAD_DIM, BLOCK_D, MASKED, DESCRIPTORS
        )
        scores = dot(queries, tl.trans(k), tl.zeros([BLOCK_M, TILE], dtype=tl.float32))
        scores = cap_scores(scores, scale, softcap, HAS_SOFTCAP)
        if MASKED:
            visible = position[None, :] <= own[:, None]
            if HAS_WINDOW:
                visible = visible & (position[None, :] > own[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        maximum, total, attended = accumulate(scores, v, maximum, total, attended, factor, MASKED and HAS_WINDOW)
        page = next_page
    return maximum, total, attended
