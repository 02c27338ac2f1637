"""What changes the device's row table around a step, without the host: a plan's diff goes in, a decode batch comes out, tokens go back.

`apply_diff`: the plan's changes. `prepare_decode`, `prepare_prefill`: from rows to what the model's kernels read. `advance`: each row's new
token is written, its length grows, and it is stopped if the token says so or there is no more room.
All four have a fixed number of programs and read counts and parameters on the device, so they can live in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos.kernels import row_table
from llmos.kernels.checks import INT32, Arguments
from llmos.kernels.row_table import DeviceRows
from llmos.kernels.variants import Variant

INT64 = (torch.int64,)
RESULT_COLUMNS = 4  # row, position, token, state
_DIFF_PROGRAMS = 128
_BLOCK = 128

_RECORD, _HEADER, _SEGMENT = (
    tl.constexpr(n) for n in (row_table.RECORD_WORDS, row_table.HEADER_WORDS, row_table.SEGMENT_WORDS)
)
_STATE, _LENGTH, _MAX_LENGTH, _NUM_PAGES, _NUM_STOPS = (
    tl.constexpr(column)
    for column in (
        row_table.STATE,
        row_table.LENGTH,
        row_table.MAX_LENGTH,
        row_table.NUM_PAGES,
        row_table.NUM_STOPS,
    )
)
_LIVE, _STOPPED, _FULL, _FAILED = (
    tl.constexpr(state) for state in (row_table.LIVE, row_table.STOPPED, row_table.FULL, row_table.FAILED)
)


def apply_diff(diff: Tensor, table: DeviceRows) -> None:
    """Apply what a `DiffWriter` wrote. diff: int32[words] on the device; it may be longer than what is in use."""
    sizes = Arguments()
    sizes.tensor("arena", table.arena, "words", INT32)
    sizes.tensor("diff", diff, "diff_words", INT32)
    _diff_kernel[(_DIFF_PROGRAMS,)](
        diff, table.arena, _DIFF_PROGRAMS, BLOCK=row_table.PIECE, num_warps=4, enable_fp_fusion=False
    )


def prepare_decode(
    table: DeviceRows,
    rows: Tensor,
    *,
    active: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    context: Tensor,
) -> None:
    """From the rows of a decode batch to the inputs of its kernels.

    rows: int32[batch], -1 = empty entry. Written for each entry: `active` int32: the row, or -1 if it is not LIVE, or has no page or no
    room for its newest token; `token_ids` int32: its newest token; `positions` int32: where that stands; `slots` int64: page * page_size
    + offset; `context` int32: tokens to attend to, the newest included. An inactive entry gets -1, 0, 0, -1, 0.
    """
    sizes = Arguments()
    sizes.tensor("arena", table.arena, "words", INT32)
    sizes.tensor("rows", rows, "batch", INT32)
    for field, value in {"active": active, "token_ids": token_ids, "positions": positions, "context": context}.items():
        sizes.tensor(field, value, "batch", INT32)
    sizes.tensor("slots", slots, "batch", INT64)
    batch = sizes["batch"]
    if batch:
        _decode_kernel[(triton.cdiv(batch, _BLOCK),)](
            table.records,
            table.pages,
            table.tokens,
            rows,
            active,
            token_ids,
            positions,
            slots,
            context,
            batch,
            table.max_rows,
            table.page_size,
            table.max_context,
            table.pages.stride(0),
            table.tokens.stride(0),
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )


def prepare_prefill(
    table: DeviceRows,
    rows: Tensor,
    q_start: Tensor,
    q_len: Tensor,
    q_pos: Tensor,
    *,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
) -> None:
    """From chunks of prompts to token ids, positions and slots of their tokens, int32, int32 and int64[tokens].

    Chunk i is q_len[i] tokens of rows[i] from position q_pos[i] on; it fills the batch from q_start[i] on. int32[chunks]; q_len 0 = empty.
    Batch entries that belong to no chunk are left as they are: the caller fills `slots` with -1 first.
    """
    sizes = Arguments()
    sizes.tensor("arena", table.arena, "words", INT32)
    for field, value in {"rows": rows, "q_start": q_start, "q_len": q_len, "q_pos": q_pos}.items():
        sizes.tensor(field, value, "chunks", INT32)
    sizes.tensor("token_ids", token_ids, "tokens", INT32)
    sizes.tensor("positions", positions, "tokens", INT32)
    sizes.tensor("slots", slots, "tokens", INT64)
    if sizes["chunks"] and sizes["tokens"]:
        blocks = min(64, triton.cdiv(sizes["tokens"], _BLOCK))
        _prefill_kernel[(sizes["chunks"], blocks)](
            table.pages,
            table.tokens,
            rows,
            q_start,
            q_len,
            q_pos,
            token_ids,
            positions,
            slots,
            blocks,
            table.page_size,
            table.pages.stride(0),
            table.tokens.stride(0),
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )


def advance(table: DeviceRows, active: Tensor, tokens: Tensor, *, results: Tensor, stop_on_device: bool = True) -> None:
    """Give each active row its sampled token, and say what came of it.

    active: int32[batch] from `prepare_decode` (or rows whose chunk ends their prompt), -1 = nothing. tokens: int32[batch]; -1 of an active
    row means that its logits were not finite: it becomes FAILED. results: int32[batch, 4], written: row (-1 = nothing), position, token,
    the row's state now. Without `stop_on_device` stop tokens are the host's affair; the last length counts always.
    """
    sizes = Arguments()
    sizes.tensor("arena", table.arena, "words", INT32)
    sizes.tensor("active", active, "batch", INT32)
    sizes.tensor("tokens", tokens, "batch", INT32)
    sizes.tensor("results", results, f"batch {RESULT_COLUMNS}", INT32, contiguous=2)
    if sizes["batch"]:
        _advance_kernel[(sizes["batch"],)](
            table.records,
            table.tokens,
            table.stops,
            active,
            tokens,
            results,
            table.max_context,
            table.tokens.stride(0),
            table.stops.stride(0),
            STOPS=stop_on_device,
            BLOCK=32,
            num_warps=1,
            enable_fp_fusion=False,
        )


@triton.jit
def _diff_kernel(diff, arena, num_programs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    word = tl.arange(0, BLOCK)
    count = tl.load(diff)
    for number in range(tl.program_id(0), count, num_programs):
        segment = diff + _HEADER + number * _SEGMENT
        low = tl.load(segment).to(tl.uint32, bitcast=True).to(tl.int64)
        target = low + (tl.load(segment + 1).to(tl.int64) << 32)
        inside = word < tl.load(segment + 2)
        source = tl.load(segment + 3)
        tl.store(arena + target + word, tl.load(diff + source + word, mask=inside), mask=inside)


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    records,
    pages,
    tokens,
    rows,
    active,
    token_ids,
    positions,
    slots,
    context,
    batch,
    max_rows,
    page_size,
    max_context,
    page_stride,
    token_stride,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < batch
    row = tl.load(rows + entry, mask=inside, other=-1)
    known = (row >= 0) & (row < max_rows)
    record = records + row.to(tl.int64) * _RECORD
    length = tl.load(record + _LENGTH, mask=known, other=0)
    num_pages = tl.load(record + _NUM_PAGES, mask=known, other=0)
    live = known & (tl.load(record + _STATE, mask=known, other=0) == _LIVE)
    position = length - 1
    live = live & (length > 0) & (length <= max_context) & (position // page_size < num_pages)
    token = tl.load(tokens + row.to(tl.int64) * token_stride + position, mask=live, other=0)
    page = tl.load(pages + row.to(tl.int64) * page_stride + position // page_size, mask=live, other=0)
    slot = page.to(tl.int64) * page_size + position % page_size
    tl.store(active + entry, tl.where(live, row, -1), mask=inside)
    tl.store(token_ids + entry, token, mask=inside)
    tl.store(positions + entry, tl.where(live, position, 0), mask=inside)
    tl.store(slots + entry, tl.where(live, slot, -1), mask=inside)
    tl.store(context + entry, tl.where(live, length, 0), mask=inside)


@triton.jit
def _prefill_kernel(  # type: ignore[no-untyped-def]
    pages,
    tokens,
    rows,
    q_start,
    q_len,
    q_pos,
    token_ids,
    positions,
    slots,
    num_blocks,
    page_size,
    page_stride,
    token_stride,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.load(rows + chunk).to(tl.int64)
    start = tl.load(q_start + chunk).to(tl.int64)
    length = tl.load(q_len + chunk)
    first = tl.load(q_pos + chunk)
    for block in range(tl.program_id(1), tl.cdiv(length, BLOCK), num_blocks):
        number = block * BLOCK + tl.arange(0, BLOCK)
        inside = number < length
        position = first + number
        token = tl.load(tokens + row * token_stride + position, mask=inside, other=0)
        page = tl.load(pages + row * page_stride + position // page_size, mask=inside, other=0)
        tl.store(token_ids + start + number, token, mask=inside)
        tl.store(positions + start + number, position, mask=inside)
        tl.store(slots + start + number, page.to(tl.int64) * page_size + position % page_size, mask=inside)


@triton.jit
def _advance_kernel(  # type: ignore[no-untyped-def]
    records,
    tokens,
    stops,
    active,
    sampled,
    results,
    max_context,
    token_stride,
    stop_stride,
    STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0)
    row = tl.load(active + entry)
    result = results + entry * 4
    if row < 0:
        tl.store(result + tl.arange(0, 4), tl.full([4], -1, tl.int32))
    else:
        token = tl.load(sampled + entry)
        record = records + row.to(tl.int64) * _RECORD
        length = tl.load(record + _LENGTH)
        last = tl.minimum(tl.load(record + _MAX_LENGTH), max_context)
        state = tl.where(length + 1 >= last, _FULL, _LIVE)
        if STOPS:
            stopped = 0
            count = tl.load(record + _NUM_STOPS)
            for first in range(0, count, BLOCK):
                number = first + tl.arange(0, BLOCK)
                stop = tl.load(stops + row.to(tl.int64) * stop_stride + number, mask=number < count, other=-1)
                stopped = tl.maximum(stopped, tl.max((stop == token).to(tl.int32), 0))
            state = tl.where(stopped > 0, _STOPPED, state)
        state = tl.where(token < 0, _FAILED, state)
        if token >= 0 and length <= max_context:
            tl.store(tokens + row.to(tl.int64) * token_stride + length, token)
            tl.store(record + _LENGTH, length + 1)
        tl.store(record + _STATE, state)
        tl.store(result, row)
        tl.store(result + 1, length)
        tl.store(result + 2, token)
        tl.store(result + 3, state)


def apply_diff_reference(diff: Tensor, table: DeviceRows) -> None:
    """`apply_diff` as a loop."""
    words = diff.tolist()
    for number in range(words[0]):
        start = row_table.HEADER_WORDS + number * row_table.SEGMENT_WORDS
        low, high, length, source = words[start : start + row_table.SEGMENT_WORDS]
        target = (low & 0xFFFF_FFFF) + (high << 32)
        table.arena[target : target + length] = diff[source : source + length]


def prepare_decode_reference(table: DeviceRows, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """active, token_ids, positions, slots and context of `prepare_decode`."""
    found = []
    for row in rows.tolist():
        record = table.records[row].tolist()
        position = record[row_table.LENGTH] - 1
        fits = 0 <= position < min(table.max_context, record[row_table.NUM_PAGES] * table.page_size)
        if row < 0 or record[row_table.STATE] != row_table.LIVE or not fits:
            found.append((-1, 0, 0, -1, 0))
            continue
        page = int(table.pages[row, position // table.page_size])
        slot = page * table.page_size + position % table.page_size
        found.append((row, int(table.tokens[row, position]), position, slot, position + 1))
    columns = torch.tensor(found, dtype=torch.int64).reshape(-1, 5).unbind(1)
    active, token_ids, positions, slots, context = (column.to(table.arena.device) for column in columns)
    return active.int(), token_ids.int(), positions.int(), slots, context.int()


def advance_reference(table: DeviceRows, active: Tensor, tokens: Tensor, *, stop_on_device: bool = True) -> Tensor:
    """Changes `table` as `advance` does and returns `results`."""
    results = torch.full((len(active), RESULT_COLUMNS), -1, dtype=torch.int32, device=active.device)
    for entry, (row, token) in enumerate(zip(active.tolist(), tokens.tolist())):
        if row < 0:
            continue
        record = table.records[row].tolist()
        length = record[row_table.LENGTH]
        stops = table.stops[row, : record[row_table.NUM_STOPS]].tolist()
        state = row_table.LIVE
        if token < 0:
            state = row_table.FAILED
        elif stop_on_device and token in stops:
            state = row_table.STOPPED
        elif length + 1 >= min(record[row_table.MAX_LENGTH], table.max_context):
            state = row_table.FULL
        if token >= 0:
            table.tokens[row, length] = token
            table.records[row, row_table.LENGTH] = length + 1
        table.records[row, row_table.STATE] = state
        results[entry] = torch.tensor([row, length, token, state], dtype=torch.int32)
    return results


def variants() -> Iterator[Variant]:
    yield Variant("apply_diff", _diff_kernel, "*i32 *i32 i32", {"BLOCK": row_table.PIECE}, 4)
    decode = "*i32 *i32 *i32 *i32 *i32 *i32 *i32 *i64 *i32 i32 i32 i32:16 i32 i32 i32"
    yield Variant("prepare_decode", _decode_kernel, decode, {"BLOCK": _BLOCK}, 4)
    prefill = "*i32 *i32 *i32 *i32 *i32 *i32 *i32 *i32 *i64 i32 i32:16 i32 i32"
    yield Variant("prepare_prefill", _prefill_kernel, prefill, {"BLOCK": _BLOCK}, 4)
    for stops in (False, True):
        name = f"advance{' stops' if stops else ''}"
        yield Variant(
            name, _advance_kernel, "*i32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32", {"STOPS": stops, "BLOCK": 32}, 1
        )
