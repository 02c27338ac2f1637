"""The KV cache: one storage for all layers, addressed by page. The microkernel owns the pages; this file owns the bytes.

Layout of a layer: [2 (K, V), num_pages, kv_heads, page_size, head_dim], so that one (page, head) tile is one contiguous burst.
A *tile* is the tile's number in the layer seen as [tiles, page_size * head_dim]; a *slot* is a vector's number in the layer
seen as [slots, head_dim]. Both stay valid for every layer, so a step computes them once.
Invariant: where a sequence may look before it writes, its pages hold zeros: no other sequence's data, no NaN.

Whole pages (copy-on-write, swapping) are copied one by one, all layers of a page in one strided copy. Measured on 2 cores with
scattered pages out of the processor's caches: that is a plain copy's speed for large pages and half of it for small ones;
index_select with index_copy_ took 1 to 3 times as long layer by layer and 1.3 to 16 times over all layers at once, and advanced
indexing no less: their temporary tensor doubles the traffic. Below _TORCH_BYTES a page numpy's copy is the faster one (2 us against 5
for 28 KiB), above it torch's threads are. `bench/swap.py` measures it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmos.services.executor.backend import fitting_pages
from llmos.services.executor.page_moves import Pairs
from llmos.services.executor.spec import ModelSpec

IntArray = npt.NDArray[np.int64]
MovablePages = Tensor | npt.NDArray[np.signedinteger]  # both assign a page with pages[i] = other[j]

_TORCH_BYTES = 256 * 1024


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
        self.words = _words(self._storage.view(spec.num_layers * 2, num_pages, -1))
        self.page_bytes = page_bytes(spec, page_size, dtype)
        self.pages = movable(self.words, self.page_bytes)

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

    def clear_slots(self, pages: IntArray, offsets: IntArray) -> None:
        """Zero single tokens."""
        if pages.size:
            index = self.slot_index(pages, offsets)
            for layer in self.slots:
                layer.index_fill_(0, index, 0)

    def copy(self, pairs: Pairs) -> None:
        """Copy whole pages: (from, to)."""
        copy_pages(self.pages, self.pages, pairs)

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


def _words(storage: Tensor) -> Tensor:
    """[planes, pages, elements] as integers [pages, planes, words]: numpy knows no bfloat16, and wide words are copied faster."""
    row_bytes = storage.shape[-1] * storage.element_size()
    word = torch.int64 if row_bytes % 8 == 0 else torch.int32  # head_dim is even, so 4 always divides
    return storage.view(word).transpose(0, 1)


def movable(words: Tensor, num_bytes: int) -> MovablePages:
    """[pages, planes, words] as that which copies a page of `num_bytes` fastest."""
    return words if num_bytes >= _TORCH_BYTES else words.numpy()


def copy_pages(source: MovablePages, target: MovablePages, pairs: Pairs) -> None:
    """target[to] = source[from] for each (from, to)."""
    for here, there in pairs:
        target[there] = source[here]  # type: ignore[assignment]


def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return spec.num_layers * 2 * spec.num_kv_heads * page_size * spec.head_dim * dtype.itemsize


def count_pages(spec: ModelSpec, page_size: int, dtype: torch.dtype, num_pages: int, kv_cache_gib: float) -> int:
    """Pages to allocate: as configured, or as many as the memory budget holds."""
    return num_pages or fitting_pages("kv_cache_gib", kv_cache_gib, page_bytes(spec, page_size, dtype))
