"""Paged attention on the CPU: gather the pages a row needs, then one fused attention call per group of rows.

Decode: all rows of a `DecodeGroup` in one call, the query heads of a KV head as query rows, so that K and V are read once and
never expanded. Prefill: per block of queries against the sequence so far, causal with an offset. Scratch memory for gathered
pages is reused between layers and steps. Invariant: padding is masked with -inf and holds finite numbers (`KVCache`,
`RowTable.pages`), so it contributes exact zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos.services.executor.batch import DecodeGroup, ForwardBatch, PrefillBlock
from llmos.services.executor.kv_cache import KVCache
from llmos.services.executor.spec import ModelSpec


class PagedAttention:
    """Attention of all layers of one model. `start_step` first, then `store` and `attend` for each layer in order."""

    def __init__(self, spec: ModelSpec, cache: KVCache) -> None:
        self.spec = spec
        self.cache = cache
        self._scratch = torch.empty(0, dtype=cache.dtype)
        self._windows = sorted(set(spec.windows))
        self._batch: ForwardBatch | None = None
        self._masks: dict[int, list[Tensor]] = {}

    def start_step(self, batch: ForwardBatch) -> None:
        """Prepare what all layers share."""
        self._batch = batch
        self._masks = {window: [self._decode_mask(g, window) for g in batch.groups] for window in self._windows}
        sizes = [group.tiles.numel() for group in batch.groups]
        sizes += [block.tiles.numel() for block in batch.blocks if block.tiles is not None]
        need = max(sizes, default=0) * self.cache.page_size * self.spec.head_dim
        if self._scratch.numel() < need:
            self._scratch = torch.empty(need, dtype=self.cache.dtype)

    def store(self, layer: int, kv: Tensor) -> None:
        """kv: [tokens, 2 * kv_heads, head_dim], K heads then V heads of this step's tokens, into their pages."""
        assert self._batch is not None
        vectors = kv.reshape(-1, self.spec.head_dim).to(self.cache.dtype)
        self.cache.slots[layer].index_copy_(0, self._batch.slots, vectors)

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """q: [tokens, heads, head_dim], kv as in `store` -> [tokens, heads * head_dim] of q's dtype."""
        batch, spec = self._batch, self.spec
        assert batch is not None
        window = spec.windows[layer]
        grouped = q.view(-1, spec.num_kv_heads, spec.num_groups, spec.head_dim).to(self.cache.dtype)
        out = torch.empty_like(grouped)
        for group, mask in zip(batch.groups, self._masks[window]):
            k, v = self._gather(layer, group.tiles, group.last - group.first)
            rows = slice(group.first, group.last)
            out[rows] = F.scaled_dot_product_attention(grouped[rows], k, v, attn_mask=mask)
        for block in batch.blocks:
            out[block.first : block.last] = self._prefill(layer, block, grouped, kv, window)
        return out.view(-1, spec.num_heads * spec.head_dim).to(q.dtype)

    def _gather(self, layer: int, tiles: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """K and V [rows, kv_heads, context, head_dim] of rows with equally long page tables."""
        spec = self.spec
        width = self.cache.page_size * spec.head_dim
        flat = self._scratch[: tiles.numel() * width].view(-1, width)
        torch.index_select(self.cache.tiles[layer], 0, tiles, out=flat)
        k, v = flat.view(2, num_rows, spec.num_kv_heads, -1, spec.head_dim).unbind(0)
        return k, v

    def _prefill(self, layer: int, block: PrefillBlock, q: Tensor, kv: Tensor, window: int) -> Tensor:
        """[queries, kv_heads, groups, head_dim]; each KV head is a batch entry whose K and V its query heads share."""
        spec = self.spec
        queries = q[block.first : block.last].permute(1, 2, 0, 3)
        if block.tiles is None:
            fresh = kv[block.keys_first : block.last].to(q.dtype).view(-1, 2, spec.num_kv_heads, spec.head_dim)
            k, v = fresh.permute(1, 2, 0, 3).unbind(0)
        else:
            k, v = (part[0, :, : block.end] for part in self._gather(layer, block.tiles, 1))
        shape = (spec.num_kv_heads, spec.num_groups, block.end, spec.head_dim)
        k, v = k.unsqueeze(1).expand(shape), v.unsqueeze(1).expand(shape)
        if block.start == 0 and not 0 < window < block.end:
            found = F.scaled_dot_product_attention(queries, k, v, is_causal=True)
        else:
            found = F.scaled_dot_product_attention(queries, k, v, attn_mask=self._prefill_mask(block, window))
        return found.permute(2, 0, 1, 3)

    def _decode_mask(self, group: DecodeGroup, window: int) -> Tensor:
        """Additive, [rows, 1, groups, padded]: 0 where a row has a token to see, -inf elsewhere."""
        position = torch.arange(group.padded)
        hidden = position >= group.context
        if window:
            hidden |= position < group.context - window
        mask = torch.zeros(hidden.shape, dtype=self.cache.dtype).masked_fill_(hidden, float("-inf"))
        return mask[:, None, None, :].expand(-1, 1, self.spec.num_groups, -1)

    def _prefill_mask(self, block: PrefillBlock, window: int) -> Tensor:
        """Additive, [queries, context]: causal, and no further back than the window."""
        query = torch.arange(block.start, block.end)[:, None]
        position = torch.arange(block.end)
        hidden = position > query
        if window:
            hidden |= position <= query - window
        return torch.zeros(hidden.shape, dtype=self.cache.dtype).masked_fill_(hidden, float("-inf"))
