"""How a step is flattened: padding that depends on the row alone, groups of decode rows, blocks of queries, cache indices."""

from __future__ import annotations

import numpy as np
import torch
from specs import make_spec

from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan
from llmos.protocol.params import SamplingParams
from llmos.services.executor.batch import build_batch, padded_context
from llmos.services.executor.kv_cache import KVCache
from llmos.services.executor.rows import RowTable


def make_cache(num_pages: int = 100, page_size: int = 4) -> KVCache:
    return KVCache(make_spec(), num_pages, page_size, torch.float32)


def test_padded_context_takes_two_steps_an_octave():
    context = np.array([1, 64, 65, 96, 97, 128, 129, 193, 256, 257, 1000])
    assert padded_context(context).tolist() == [64, 64, 96, 96, 128, 128, 192, 256, 256, 384, 1024]
    everything = np.arange(1, 5000)
    padded = padded_context(everything)
    assert (padded >= everything).all()
    assert (padded[64:] <= everything[64:] * 1.5).all()


def add(row: int, length: int, pages: list[int], computed: int = 0) -> RowAdd:
    tokens = [row + 1] * length
    return RowAdd(row, row, pack_i32(tokens), length, computed, pack_i32(pages), SamplingParams(seed=0))


def test_batch_of_decode_rows_and_chunks():
    cache = make_cache()
    rows = RowTable(max_rows=8, max_context=1024, page_size=4, num_pages=100)
    adds = (
        add(5, 70, list(range(18)), computed=69),  # padded to 96
        add(2, 6, [30, 31], computed=5),  # padded to 64
        add(0, 9, [40, 41, 42], computed=4),  # the rest of a prompt
        add(1, 3, [50]),  # a whole prompt, not sampled yet
    )
    plan = StepPlan(1, 1, b"", adds, b"", pack_i32([0, 4, 5, 1, 1, 0, 2, 0]), pack_i32([5, 2]))
    work = rows.apply(plan)
    assert work.fresh_pages.tolist() == [41, 42, 50]
    batch = build_batch(rows, work, cache)
    assert batch.token_ids.tolist() == [3, 6, 1, 1, 1, 1, 1, 2, 2]
    assert batch.positions.tolist() == [5, 69, 4, 5, 6, 7, 8, 0, 1]
    assert [(group.first, group.last, group.padded) for group in batch.groups] == [(0, 1, 64), (1, 2, 96)]
    assert [(b.first, b.last, b.start, b.keys_first, b.tiles is None) for b in batch.blocks] == [
        (2, 7, 4, 2, False),
        (7, 9, 0, 7, True),
    ]
    assert batch.sample_index.tolist() == [0, 1, 6]
    assert batch.sample_rows.tolist() == [2, 5, 0]
    # Row 2: pages 30, 31, then its own first page as padding; K of head 0, K of head 1, then V.
    tiles = batch.groups[0].tiles.view(2, 1, 2, 16)
    assert tiles[0, 0, 0].tolist() == [60, 62] + [60] * 14
    assert tiles[0, 0, 1].tolist() == [61, 63] + [61] * 14
    assert (tiles[1] - tiles[0]).unique().tolist() == [200], "V lies num_pages * heads tiles after K"
    # The newest token of row 2 is at position 5: page 31, offset 1.
    assert batch.slots.view(9, 2, 2)[0].tolist() == [[62 * 4 + 1, 63 * 4 + 1], [262 * 4 + 1, 263 * 4 + 1]]


def test_slots_behind_the_computed_tokens_of_entering_rows_are_stale_but_for_the_one_written_first():
    rows = RowTable(max_rows=8, max_context=64, page_size=4, num_pages=100)
    adds = (
        add(0, 8, [10, 11], computed=5),  # computes slot 1 of page 11 next
        add(1, 8, [20, 21, 22], computed=7),  # the last slot of page 21, which others may read
        add(2, 8, [30, 31], computed=4),
        add(3, 3, [40]),
    )
    work = rows.apply(StepPlan(1, 1, b"", adds, b"", b"", b""))
    assert [part.tolist() for part in work.stale_slots] == [[11, 11], [2, 3]]
    assert work.fresh_pages.tolist() == [22, 31, 40]
    assert rows.apply(StepPlan(1, 2, b"", (), b"", b"", b"")).stale_slots[0].size == 0


def test_stored_vectors_are_gathered_back():
    cache = make_cache()
    pages, offsets = np.array([7, 3]), np.array([2, 0])
    vectors = torch.arange(2 * 2 * 2 * 2, dtype=torch.float32).view(2, 2, 2, 2)  # token, K or V, head, element
    cache.slots[1].index_copy_(0, cache.slot_index(pages, offsets), vectors.view(-1, 2))
    tiles = cache.tiles[1].index_select(0, cache.tile_index(np.array([[7], [3]]))).view(2, 2, 2, 4, 2)
    for token, offset in enumerate(offsets):
        for plane in range(2):
            for head in range(2):
                assert tiles[plane, token, head, offset].tolist() == vectors[token, plane, head].tolist()
    assert not cache.tiles[0].any(), "another layer is untouched"
    cache.clear(np.array([7]))
    assert not cache.tiles[1].index_select(0, cache.tile_index(np.array([[7]]))).any()
    assert cache.tiles[1].index_select(0, cache.tile_index(np.array([[3]]))).any()
