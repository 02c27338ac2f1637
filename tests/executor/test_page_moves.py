"""Copies and swaps of pages: what a plan may ask for, and that exactly the right bytes move, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from specs import make_spec

from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import StepPlan
from llmos.services.executor.host_cache import HostCache
from llmos.services.executor.kv_cache import KVCache
from llmos.services.executor.page_moves import NO_MOVES, PageMoves, read_moves


def moves(swap_out=(), swap_in=(), copies=()) -> PageMoves:
    plan = StepPlan(1, 1, b"", (), b"", b"", b"", *(pack_i32(pairs) for pairs in (swap_out, swap_in, copies)))
    return read_moves(plan, num_pages=10, host_pages=4)


def test_moves_are_read_in_pairs():
    assert moves([3, 0, 4, 1], [2, 5], [6, 7, 6, 8]) == PageMoves([[3, 0], [4, 1]], [[2, 5]], [[6, 7], [6, 8]])
    assert moves() is NO_MOVES


def test_pages_may_be_swapped_out_and_then_written_and_host_pages_written_and_then_read():
    assert moves([3, 0], [0, 3]) == PageMoves([[3, 0]], [[0, 3]], [])
    assert moves([3, 0], [], [4, 3]) == PageMoves([[3, 0]], [], [[4, 3]])
    assert moves([3, 0], [1, 4], [3, 5, 4, 6]) == PageMoves([[3, 0]], [[1, 4]], [[3, 5], [4, 6]])


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"copies": [0, 10]}, r"pages \[10\] of 10"),
        ({"copies": [-1, 0]}, r"pages \[-1\] of 10"),
        ({"swap_out": [10, 0]}, r"pages \[10\] of 10"),
        ({"swap_out": [0, 4]}, r"host pages \[4\] of 4"),
        ({"swap_in": [-2, 0]}, r"host pages \[-2\] of 4"),
        ({"swap_in": [0, 11]}, r"pages \[11\] of 10"),
        ({"copies": [0, 1, 2, 1]}, r"pages \[1\] are written twice"),
        ({"swap_in": [0, 5], "copies": [1, 5]}, r"pages \[5\] are written twice"),
        ({"swap_out": [0, 2, 1, 2]}, r"host pages \[2\] are written twice"),
        ({"copies": [0, 1, 1, 2]}, r"pages \[1\] are copied from and to"),
        ({"copies": [3, 3]}, r"pages \[3\] are copied from and to"),
    ],
)
def test_impossible_moves_are_refused(asked, complaint):
    with pytest.raises(AssertionError, match=complaint):
        moves(**asked)


LAYOUTS = {
    "float32": (torch.float32, 4, 2),
    "bfloat16": (torch.bfloat16, 4, 2),
    "4 bytes a tile row": (torch.bfloat16, 1, 2),  # moved as int32, all others as int64
    "copied by torch": (torch.float32, 64, 128),  # above the size where numpy's copy is the faster one
}


def filled(dtype: torch.dtype, page_size: int, head_dim: int) -> tuple[KVCache, torch.Tensor]:
    """A cache of 9 pages with random bytes, NaN patterns included, and a view of them as bytes [pages, ...]."""
    heads = {"num_kv_heads": 1, "num_heads": 1} if page_size == 1 else {}
    cache = KVCache(make_spec(num_layers=3, head_dim=head_dim, **heads), 9, page_size, dtype)
    content = cache._storage.view(torch.uint8)
    content.copy_(torch.randint(256, content.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
    return cache, content.transpose(0, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_move_every_byte_of_all_layers_and_touch_nothing_else(layout):
    cache, content = filled(*LAYOUTS[layout])
    assert isinstance(cache.pages, torch.Tensor) == (layout == "copied by torch")
    expected = content.clone()
    expected[[2, 5, 0]] = expected[[7, 7, 8]]
    cache.copy([[7, 2], [7, 5], [8, 0]])
    assert torch.equal(content, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swapped_pages_come_back_to_other_places(layout):
    cache, content = filled(*LAYOUTS[layout])
    host = HostCache(cache, 3)
    assert host.num_bytes * 3 == cache.num_bytes
    expected = content.clone()
    host.swap_out([[4, 2], [1, 0]])
    assert torch.equal(content, expected), "swapping out leaves the page as it is"
    content[[4, 1]] = 77
    host.swap_in([[2, 6], [0, 4]])
    expected[[6, 4, 1]] = torch.stack((expected[4], expected[1], torch.full_like(expected[0], 77)))
    assert torch.equal(content, expected)


def test_measuring_leaves_zeros():
    cache = KVCache(make_spec(), 50, 4, torch.float32)
    assert HostCache(cache, 0).measure_us() == 0.0
    assert 0.0 < HostCache(cache, 20).measure_us() < 1e5
    assert not cache._storage.any()


def test_single_slots_are_cleared():
    cache, content = filled(torch.float32, 4, 2)
    expected = content.clone()
    expected[3, :, :, :, 1:] = 0
    expected[5, :, :, :, 2] = 0
    cache.clear_slots(np.array([3, 3, 3, 5]), np.array([1, 2, 3, 2]))
    assert torch.equal(content, expected)
