"""The work list of paged decode attention: which program attends to which pages, written on the device once per step.

The work of a step is a line of units. A unit is one page of one KV head of one batch entry; entries follow each other, in an entry its KV
heads, in a head its pages. The line is cut into equal slices, one per program, so that programs are balanced by pages whatever the lengths
are, and a program finds its work without searching. An inactive entry has one empty unit per head: whoever meets it writes zeros.

A head whose pages lie in several slices (is *split*) leaves partial results, which the last program to arrive merges in order.
Balanced plans cut anywhere. A program then owns at most two partials, the rest of a head that its slice begins with and the start of one
that it ends with, so the workspace does not grow with the batch. Deterministic plans cut a head only at multiples of a step that follows
from the entry's own length, so that an entry computes the same bits whoever is in the batch; a partial belongs to a (head, step).

Invariants: `counters` is all zeros between launches (the last to arrive resets its own), so a graph that holds the launches can be
replayed. One plan serves all layers of a step that share a window, one after the other on one stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos.kernels.checks import INT32, Arguments, check_one_of, check_range

PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_GROUPS = 16
MAX_BATCH = 4096

# Columns of `programs`, 32 bytes each: one load tells a program where it starts.
ENTRY, FIRST_UNIT, CONTEXT, ROW, SLICE_BEGIN, SLICE_END, TOTAL, ACTIVE = (tl.constexpr(i) for i in range(8))
PROGRAM_COLUMNS = tl.constexpr(8)
# Columns of `entries`.
ENTRY_FIRST_UNIT, ENTRY_CONTEXT, ENTRY_ROW = (tl.constexpr(i) for i in range(3))
ENTRY_COLUMNS = tl.constexpr(4)


@triton.jit
def first_page(context, window, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first page that the newest token may look at."""
    return tl.where(window > 0, tl.maximum(context - window, 0) // PAGE, 0)


@triton.jit
def unit_pages(context, window, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Units per head of an entry: its visible pages, at least one."""
    return tl.maximum((context + PAGE - 1) // PAGE - first_page(context, window, PAGE), 1)


@triton.jit
def step_pages(pages, split_pages, MAX_SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Deterministic plans: pages between two cuts of a head."""
    return tl.maximum(split_pages, (pages + MAX_SPLITS - 1) // MAX_SPLITS)


@triton.jit(do_not_specialize=["batch"])
def plan_kernel(  # type: ignore[no-untyped-def]
    rows,  # int32[batch]
    context,  # int32[batch]
    entries,  # int32[max_batch, ENTRY_COLUMNS], written
    programs,  # int32[NUM_PROGRAMS, PROGRAM_COLUMNS], written
    batch,
    window,
    min_pages,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    """One program: sums up the units, then each program's slice finds its first entry by bisection."""
    entry = tl.arange(0, BLOCK_BATCH)
    inside = entry < batch
    length = tl.load(context + entry, mask=inside, other=0)
    row = tl.load(rows + entry, mask=inside & (length > 0), other=0)
    units = tl.where(inside, unit_pages(length, window, PAGE) * KV_HEADS, 0)
    first_unit = tl.cumsum(units, 0) - units
    total = tl.sum(units, 0)
    tl.store(entries + entry * ENTRY_COLUMNS + ENTRY_FIRST_UNIT, first_unit, mask=inside)
    tl.store(entries + entry * ENTRY_COLUMNS + ENTRY_CONTEXT, length, mask=inside)
    tl.store(entries + entry * ENTRY_COLUMNS + ENTRY_ROW, row, mask=inside)
    tl.debug_barrier()

    active = tl.minimum(tl.maximum(total // min_pages, 1), NUM_PROGRAMS)
    for block in range(0, NUM_PROGRAMS, BLOCK_PROGRAMS):
        program = block + tl.arange(0, BLOCK_PROGRAMS)
        exists = program < NUM_PROGRAMS
        works = program < active
        begin = tl.where(works, (program.to(tl.int64) * total // active).to(tl.int32), 0)
        end = tl.where(works, ((program + 1).to(tl.int64) * total // active).to(tl.int32), 0)
        found = tl.zeros([BLOCK_PROGRAMS], dtype=tl.int32)
        width: tl.constexpr = BLOCK_BATCH
        for bit in tl.static_range(1, 13):
            if (width >> bit) > 0:
                candidate = found + (width >> bit)
                known = candidate < batch
                unit = tl.load(entries + candidate * ENTRY_COLUMNS + ENTRY_FIRST_UNIT, mask=known, other=0)
                found = tl.where(known & (unit <= begin), candidate, found)
        own = entries + found * ENTRY_COLUMNS
        record = programs + program * PROGRAM_COLUMNS
        tl.store(record + ENTRY, found, mask=exists)
        tl.store(record + FIRST_UNIT, tl.load(own + ENTRY_FIRST_UNIT), mask=exists)
        tl.store(record + CONTEXT, tl.load(own + ENTRY_CONTEXT), mask=exists)
        tl.store(record + ROW, tl.load(own + ENTRY_ROW), mask=exists)
        tl.store(record + SLICE_BEGIN, begin, mask=exists)
        tl.store(record + SLICE_END, end, mask=exists)
        tl.store(record + TOTAL, total, mask=exists)
        tl.store(record + ACTIVE, active, mask=exists)


class DecodePlan:
    """Workspace of `paged_decode` for up to `max_batch` entries. Make it once; call `prepare` once per step, before the layers.

    window: 0, or how many newest tokens are visible; a model with two kinds of layers has two plans.
    num_programs: the launch's fixed size, a few per multiprocessor (`configs.decode_programs`).
    min_pages: less work than this is not worth a program of its own.
    deterministic: see the module; `split_pages` and `max_splits` then fix where a head is cut, and the workspace has a place for each cut.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_batch: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        num_programs: int,
        window: int = 0,
        min_pages: int = 2,
        deterministic: bool = False,
        split_pages: int = 16,
        max_splits: int = 16,
    ) -> None:
        check_range("max_batch", max_batch, 1, MAX_BATCH)
        check_one_of("page_size", page_size, PAGE_SIZES)
        check_one_of("head_dim", head_dim, HEAD_DIMS)
        check_range("num_programs", num_programs, 1, 65535)
        check_range("window", window, 0, 2**31 - 1)
        check_range("min_pages", min_pages, 1, 2**20)
        check_range("split_pages", split_pages, 1, 2**20)
        check_range("max_splits", max_splits, 1, 2**10)
        check_groups(num_heads, num_kv_heads)
        self.max_batch, self.num_heads, self.num_kv_heads = max_batch, num_heads, num_kv_heads
        self.head_dim, self.page_size, self.num_programs = head_dim, page_size, num_programs
        self.window, self.min_pages = window, min_pages
        self.deterministic, self.split_pages, self.max_splits = deterministic, split_pages, max_splits
        groups = num_heads // num_kv_heads
        num_partials = max_batch * num_kv_heads * max_splits if deterministic else 2 * num_programs
        self.entries = torch.zeros(max_batch, ENTRY_COLUMNS.value, dtype=torch.int32, device=device)
        self.programs = torch.zeros(num_programs, PROGRAM_COLUMNS.value, dtype=torch.int32, device=device)
        self.counters = torch.zeros(max_batch * num_kv_heads, dtype=torch.int32, device=device)
        self.partials = torch.empty(num_partials, groups, head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(num_partials, 2, groups, dtype=torch.float32, device=device)  # maximum, sum
        self.batch = 0

    @property
    def workspace_bytes(self) -> int:
        owned = (self.entries, self.programs, self.counters, self.partials, self.stats)
        return sum(tensor.numel() * tensor.element_size() for tensor in owned)

    def prepare(self, rows: Tensor, context: Tensor) -> None:
        """Write the work list for batch entries with these page-table rows and lengths (int32[batch]; length 0 = inactive)."""
        arguments = Arguments()
        arguments.tensor("entries", self.entries, "max_batch columns", INT32)
        arguments.tensor("rows", rows, "batch", INT32)
        arguments.tensor("context", context, "batch", INT32)
        check_range("batch", arguments["batch"], 1, self.max_batch)
        self.batch = arguments["batch"]
        plan_kernel[(1,)](
            rows,
            context,
            self.entries,
            self.programs,
            self.batch,
            self.window,
            self.min_pages,
            KV_HEADS=self.num_kv_heads,
            PAGE=self.page_size,
            NUM_PROGRAMS=self.num_programs,
            BLOCK_BATCH=max(16, triton.next_power_of_2(self.batch)),
            BLOCK_PROGRAMS=128,
            num_warps=4,
        )


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    check_range("num_kv_heads", num_kv_heads, 1, 2**15)
    if num_heads % num_kv_heads:
        check_one_of("num_heads % num_kv_heads", num_heads % num_kv_heads, (0,))
    check_range("num_heads / num_kv_heads", num_heads // num_kv_heads, 1, MAX_GROUPS)
