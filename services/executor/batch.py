"""One step as one flattened batch: decode rows first, grouped by how much context they attend to, then prefill chunks.

Invariant: everything here that shapes a row's arithmetic (padded context length, block of queries) follows from that row alone,
never from the other rows of the batch, so that a sequence computes the same numbers whoever runs beside it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmos.services.executor.kv_cache import KVCache
from llmos.services.executor.rows import Chunk, Ints, RowTable, Work

_MIN_PADDED = 64  # tokens; shorter contexts are padded to this
_QUERY_BLOCK = 256  # queries of a prefill chunk that share one mask


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows [first, last) of the batch whose context is padded to `padded` tokens.

    tiles: the gather index (`KVCache.tile_index`). context: int64[rows, 1], tokens to attend to, the newest included.
    """

    first: int
    last: int
    padded: int
    tiles: Tensor
    context: Tensor


@dataclass(frozen=True, slots=True)
class PrefillBlock:
    """Queries [first, last) of the batch, at positions [start, start + last - first) of one sequence.

    tiles: the gather index of the pages that hold the context, or None if the whole context is in `keys_first` .. `last` of this
    batch (a prompt's first chunk): then nothing is gathered.
    """

    first: int
    last: int
    start: int
    tiles: Tensor | None
    keys_first: int

    @property
    def end(self) -> int:
        return self.start + self.last - self.first


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What the model computes in one step. `sample_index` picks the batch's tokens whose logits are needed, `sample_rows` their
    rows; `token_rows` and `positions` are those of the inputs. `groups` and `blocks` are for `attention.PagedAttention` only."""

    token_ids: Tensor
    token_rows: Ints
    positions: Tensor
    slots: Tensor
    groups: tuple[DecodeGroup, ...]
    blocks: tuple[PrefillBlock, ...]
    sample_index: Tensor
    sample_rows: Ints


def build_batch(rows: RowTable, work: Work, cache: KVCache, *, grouped: bool = True) -> ForwardBatch:
    """Flatten a step's work; not `grouped`: without groups and blocks, decode rows in the plan's order."""
    decode, groups = _decode_groups(rows, work.decode, cache) if grouped else (work.decode, ())
    row_parts, position_parts = [decode], [rows.length[decode] - 1]
    blocks: list[PrefillBlock] = []
    sample_index = list(range(decode.size))
    sample_rows = decode.tolist()
    first = int(decode.size)
    for chunk in work.chunks:
        row_parts.append(np.full(chunk.length, chunk.row, dtype=np.int64))
        position_parts.append(np.arange(chunk.start, chunk.end, dtype=np.int64))
        if grouped:
            blocks.extend(_prefill_blocks(rows, chunk, first, cache))
        first += chunk.length
        if chunk.sample:
            sample_index.append(first - 1)
            sample_rows.append(chunk.row)
    token_rows, positions = np.concatenate(row_parts), np.concatenate(position_parts)
    return ForwardBatch(
        token_rows=token_rows,
        token_ids=torch.from_numpy(rows.tokens[token_rows, positions].astype(np.int64)),
        positions=torch.from_numpy(positions),
        slots=cache.slot_index(*rows.slots_of(token_rows, positions)),
        groups=groups,
        blocks=tuple(blocks),
        sample_index=torch.tensor(sample_index, dtype=torch.int64),
        sample_rows=np.array(sample_rows, dtype=np.int64),
    )


def padded_context(context: Ints) -> Ints:
    """Round context lengths up to 64, 96, 128, 192, 256, 384, ...: few groups, and at most a third of a gather is padding."""
    half_octave = 2 ** np.maximum(np.log2(np.maximum(context - 1, 1)).astype(np.int64) - 1, 5)
    return np.maximum(-(-context // half_octave) * half_octave, _MIN_PADDED)


def _decode_groups(rows: RowTable, decode: Ints, cache: KVCache) -> tuple[Ints, tuple[DecodeGroup, ...]]:
    context = rows.length[decode]
    padded = -(-padded_context(context) // cache.page_size) * cache.page_size
    order = np.argsort(padded, kind="stable")
    decode, context, padded = decode[order], context[order], padded[order]
    bounds = [0, *(np.flatnonzero(np.diff(padded)) + 1).tolist(), int(decode.size)]
    groups = []
    for first, last in itertools.pairwise(bounds):
        if first == last:
            continue
        num_pages = int(padded[first]) // cache.page_size
        tiles = cache.tile_index(_pages(rows, decode[first:last], num_pages))
        groups.append(DecodeGroup(first, last, int(padded[first]), tiles, torch.from_numpy(context[first:last, None])))
    return decode, tuple(groups)


def _pages(rows: RowTable, selected: Ints, num_pages: int) -> Ints:
    """Page tables [rows, num_pages]; past a table's end the row's own first page stands in, as in `RowTable.pages`."""
    columns = np.arange(num_pages)
    columns[rows.pages.shape[1] :] = 0
    return rows.pages[selected[:, None], columns].astype(np.int64)


def _prefill_blocks(rows: RowTable, chunk: Chunk, first: int, cache: KVCache) -> list[PrefillBlock]:
    blocks = []
    for start in range(chunk.start, chunk.end, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, chunk.end)
        tiles = None
        if chunk.start > 0:
            num_pages = -(-end // cache.page_size)
            tiles = cache.tile_index(_pages(rows, np.array([chunk.row]), num_pages))
        offset = first - chunk.start
        blocks.append(PrefillBlock(offset + start, offset + end, start, tiles, first))
    return blocks
