"""Pages of K and V as an executor has them, with NaN wherever a sequence may not look: page 0, other pages, slots past its end."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

LAYERS, LAYER = 3, 1  # all layers of a page lie together; the tests use the one in the middle
_MAP_NORESERVE = 0x4000


@dataclass
class Pages:
    """k, v: one layer's view. table: rows that were asked for and one more, each in a shuffled place. rows: where they are."""

    k: Tensor
    v: Tensor
    table: Tensor
    rows: Tensor


def make_pages(lengths, *, kv_heads, head_dim, page_size, dtype, seed=0, first=None, pool=None, page_ids=None):
    """One page table per length. first: position from which on a sequence needs its pages. page_ids: those to take, in order."""
    make = torch.Generator().manual_seed(seed)
    first = first or [0] * len(lengths)
    needed = [range(begin // page_size, -(-length // page_size)) for begin, length in zip(first, lengths)]
    count = sum(map(len, needed))
    if pool is None:
        shape = (count + 2, LAYERS, 2, kv_heads, page_size, head_dim)
        pool = torch.full(shape, float("nan"), dtype=torch.float32).to(dtype)
    if page_ids is None:
        page_ids = (torch.randperm(count, generator=make) + 1).tolist()
    table = torch.zeros(len(lengths) + 1, max(1, *(-(-length // page_size) for length in lengths)), dtype=torch.int32)
    rows = torch.randperm(len(lengths) + 1, generator=make)[: len(lengths)].to(torch.int32)
    free = iter(page_ids)
    for row, length, pages in zip(rows.tolist(), lengths, needed):
        for index in pages:
            page = next(free)
            table[row, index] = page
            pool[page] = float("nan")
            filled = min(page_size, length - index * page_size)
            values = torch.randn(2, kv_heads, filled, head_dim, generator=make)
            pool[page, LAYER, :, :, :filled] = values.to(dtype)
    return Pages(pool[:, LAYER, 0], pool[:, LAYER, 1], table, rows)


def sparse_pool(num_pages, kv_heads, page_size, head_dim, dtype, monkeypatch):
    """A pool too large to exist: addresses without memory behind them until they are written. After a launch the interpreter copies
    every argument's whole storage back to its device, here onto itself, which would write them all: not in this test."""
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    shape = (num_pages, LAYERS, 2, kv_heads, page_size, head_dim)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def randn(*shape, dtype, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(actual, expected):
    """Against a float64 reference; the values are about 1 in size."""
    assert actual.isfinite().all()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE[actual.dtype])
