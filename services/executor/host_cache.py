"""Pages in host memory, where the KV cache's pages are swapped to. The microkernel owns the pages; this file owns the bytes.

A host page holds the same tiles in the same order as a page, but all of them in one piece: [layers * 2, tile row]. Memory is
taken from the system when a page is first written.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from llmos.services.executor.backend import fitting_pages
from llmos.services.executor.kv_cache import KVCache, copy_pages, movable, page_bytes
from llmos.services.executor.page_moves import Pairs
from llmos.services.executor.spec import ModelSpec

_SAMPLE_BYTES = 16 * 2**20  # more than a core's own caches hold
_SAMPLE_S = 0.02
_SAMPLE_ROUNDS = 5


class HostCache:
    """`num_pages` host pages for one KV cache; 0 = there is nowhere to swap to."""

    def __init__(self, cache: KVCache, num_pages: int) -> None:
        self.num_pages = num_pages
        self._cache = cache
        words = cache.words
        self._pages = movable(torch.empty((num_pages, *words.shape[1:]), dtype=words.dtype), cache.page_bytes)

    @property
    def num_bytes(self) -> int:
        return self.num_pages * self._cache.page_bytes

    def swap_out(self, pairs: Pairs) -> None:
        """(page, host page)."""
        copy_pages(self._cache.pages, self._pages, pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """(host page, page)."""
        copy_pages(self._pages, self._cache.pages, pairs)

    def measure_us(self) -> float:
        """Microseconds to copy one page out or in, the median over a few batches; 0.0 without host pages. Before pages are in use.

        Takes about 20 ms, the first touch of the memory included, or one round if a single page takes longer.
        """
        if not self.num_pages:
            return 0.0
        end = time.perf_counter() + _SAMPLE_S
        count = max(1, min(self.num_pages, self._cache.num_pages, _SAMPLE_BYTES // self._cache.page_bytes))
        pairs = [[page, page] for page in range(count)]
        self._cache.clear(np.arange(count))  # memory that was never written would be read from one shared page of zeros
        self.swap_out(pairs)
        times: list[float] = []
        while not times or (len(times) < _SAMPLE_ROUNDS and time.perf_counter() < end):
            started = time.perf_counter()
            self.swap_out(pairs)
            self.swap_in(pairs)
            times.append(time.perf_counter() - started)
        return round(statistics.median(times) / (2 * count) * 1e6, 3)


def count_host_pages(spec: ModelSpec, page_size: int, dtype: torch.dtype, host_cache_gib: float) -> int:
    """Host pages that the memory budget holds; a budget of 0 is none."""
    return fitting_pages("host_cache_gib", host_cache_gib, page_bytes(spec, page_size, dtype)) if host_cache_gib else 0
