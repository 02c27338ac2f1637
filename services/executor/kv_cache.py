"""The KV cache: one storage for all layers, addressed by page. The microkernel owns the pages; this file owns the bytes.

Layout of a layer: [2 (K, V), num_pages, kv_heads, page_size, head_dim], so that one (page, head) tile is one contiguous burst.
A *tile* is the tile's number in the layer seen as [tiles, page_size * head_dim]; a *slot* is a vector's number in the layer
seen as [slots, head_dim]. Both stay valid for every layer, so a step computes them once.
Invariant: a page that a sequence gets holds zeros wherever that sequence has not written: no other sequence's data, no NaN.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmos.errors import ConfigError
from llmos.services.executor.spec import ModelSpec

IntArray = npt.NDArray[np.int64]


class KVCache:
    """Pages of keys and values for every layer."""

    def __init__(self, spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_kv_heads = spec.num_kv_heads
        shape = (spec.num_layers, 2, num_pages, spec.num_kv_heads, page_size, spec.head_dim)
        self._storage = torch.zeros(shape, dtype=dtype)
        self.slots = [layer.view(-1, spec.head_dim) for layer in self._storage]
        self.tiles = [layer.view(-1, page_size * spec.head_dim) for layer in self._storage]

    @property
    def dtype(self) -> torch.dtype:
        return self._storage.dtype

    @property
    def num_bytes(self) -> int:
        return self._storage.numel() * self._storage.element_size()

    def clear(self, pages: IntArray) -> None:
        """Zero pages that change hands."""
        if pages.size:
            self._storage.index_fill_(2, torch.from_numpy(pages), 0)

    def slot_index(self, pages: IntArray, offsets: IntArray) -> Tensor:
        """Where the K and V vectors of tokens go: int64[len(pages) * 2 * kv_heads], ordered token, K or V, head."""
        heads = np.arange(self.num_kv_heads)
        planes = np.arange(2) * self.num_pages
        tile = (planes[None, :, None] + pages[:, None, None]) * self.num_kv_heads + heads
        return torch.from_numpy((tile * self.page_size + offsets[:, None, None]).reshape(-1))

    def tile_index(self, pages: IntArray) -> Tensor:
        """Which tiles to gather for rows of pages [rows, n]: int64[2 * rows * kv_heads * n], ordered K or V, row, head, page."""
        heads = np.arange(self.num_kv_heads)[None, None, :, None]
        planes = (np.arange(2) * self.num_pages)[:, None, None, None]
        return torch.from_numpy(((planes + pages[None, :, None, :]) * self.num_kv_heads + heads).reshape(-1))


def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return spec.num_layers * 2 * spec.num_kv_heads * page_size * spec.head_dim * dtype.itemsize


def count_pages(spec: ModelSpec, page_size: int, dtype: torch.dtype, num_pages: int, kv_cache_gib: float) -> int:
    """Pages to allocate: as configured, or as many as the memory budget holds."""
    if num_pages:
        return num_pages
    fitting = int(kv_cache_gib * 2**30) // page_bytes(spec, page_size, dtype)
    if fitting < 1:
        need = page_bytes(spec, page_size, dtype) / 2**30
        raise ConfigError(
            f"kv_cache_gib: {kv_cache_gib} GiB holds no page; one page takes {need:.3g} GiB", field="kv_cache_gib"
        )
    return fitting
