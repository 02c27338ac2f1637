"""KV pages on the device, and host pages to swap them to. The microkernel owns the pages; this file owns the bytes.

Storage: [num_pages, layers, 2 (K, V), kv_heads, page_size, head_dim]: a page is one piece of memory over all layers, so moving one is one
copy at full speed, and a (page, head) tile of a layer is one piece too.

Nothing is cleared when a page changes hands: kernels never look behind a row's newest token. With LLMOS_POISON_PAGES=1, for tests, pages
that change hands and slots that a row must not look at are filled with NaN, so that whoever looks fails.
"""

from __future__ import annotations

import os
import statistics
import time

import numpy as np
import numpy.typing as npt
import torch

from llmos.errors import ConfigError
from llmos.services.executor.backend import MAX_PAGES
from llmos.services.executor.cuda.device import Device
from llmos.services.executor.page_moves import PageMoves
from llmos.services.executor.spec import ModelSpec

POISON_VARIABLE = "LLMOS_POISON_PAGES"
_SAMPLE_BYTES = 256 * 2**20
_SAMPLE_ROUNDS = 5
Ints = npt.NDArray[np.int64]


def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    return spec.num_layers * 2 * spec.num_kv_heads * page_size * spec.head_dim * dtype.itemsize


class KVPool:
    """See the module. `host_pages`: how many pages of pinned host memory there are."""

    def __init__(
        self, device: Device, spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype, host_pages: int
    ) -> None:
        self.num_pages, self.page_size, self.num_host_pages = num_pages, page_size, host_pages
        self.page_bytes = page_bytes(spec, page_size, dtype)
        self._device = device
        shape = (spec.num_layers, 2, spec.num_kv_heads, page_size, spec.head_dim)
        try:
            self.storage = device.empty(num_pages, *shape, dtype=dtype)
            self._host = device.pinned(host_pages, *shape, dtype=dtype)
        except RuntimeError as error:  # torch has no narrower type on the host
            raise ConfigError(f"{num_pages} pages and {host_pages} host pages do not fit: {error}") from None
        self.k_pages = [self.storage[:, layer, 0] for layer in range(spec.num_layers)]
        self.v_pages = [self.storage[:, layer, 1] for layer in range(spec.num_layers)]
        self._poisons = os.environ.get(POISON_VARIABLE) == "1"

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()

    def move(self, moves: PageMoves) -> None:
        """Swap and copy whole pages: queued on the device, in the order that a plan defines."""
        for page, host_page in moves.swap_out:
            self._host[host_page].copy_(self.storage[page], non_blocking=True)
        for host_page, page in moves.swap_in:
            self.storage[page].copy_(self._host[host_page], non_blocking=True)
        for source, target in moves.copies:
            self.storage[target].copy_(self.storage[source], non_blocking=True)

    def poison(self, pages: Ints, stale: tuple[Ints, Ints]) -> None:
        """Fill what a row may not look at with NaN, if this process is told to."""
        if not self._poisons:
            return
        for page in pages.tolist():
            self.storage[page].fill_(float("nan"))
        for page, offset in zip(stale[0].tolist(), stale[1].tolist()):
            self.storage[page, :, :, :, offset].fill_(float("nan"))

    def measure_us(self) -> float:
        """Microseconds to copy one page out or in, the median over a few batches; 0.0 without host pages. Before pages are in use."""
        if not self.num_host_pages:
            return 0.0
        count = max(1, min(self.num_host_pages, self.num_pages, _SAMPLE_BYTES // self.page_bytes))
        pairs = [[page, page] for page in range(count)]
        times: list[float] = []
        for _ in range(1 + _SAMPLE_ROUNDS):
            started = time.perf_counter()
            self._device.run(lambda: self.move(PageMoves(pairs, pairs, [])))
            self._device.finish()
            times.append(time.perf_counter() - started)
        return round(statistics.median(times[1:]) / (2 * count) * 1e6, 3)


def fitting(what: str, budget_bytes: float, each_bytes: int) -> int:
    """Pages that a budget holds; `ConfigError` if that is none."""
    count = int(budget_bytes) // each_bytes
    if count < 1:
        text = f"{what}: {budget_bytes / 2**30:.3g} GiB hold no page; one takes {each_bytes / 2**30:.3g} GiB"
        raise ConfigError(text, field=what)
    return min(count, MAX_PAGES)
