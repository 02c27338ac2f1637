"""Whole pages from one storage to another (copy-on-write after a fork; to and from a staging buffer for swapping), and zeroing.

All layers of a page are one run of memory, so a page is copied in wide words whatever it holds. Entries of -1 are skipped, so the lists may
have a fixed length. Pages are numbered in 64 bits: a storage is larger than 2^31 words.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos.kernels.checks import FLOATS, INT32, Arguments, KernelShapeError, check_one_of
from llmos.kernels.variants import TYPES, Variant

BLOCK = 1024  # words of 8 bytes
WARPS = 4


def copy_pages(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    """target[to] = source[from] for each (from, to) of pairs, int32[n, 2]; a pair with a -1 is skipped.

    source, target: [pages, ...], the same in all but the number of pages; a page has no gaps, and they may be the same storage. No page
    may be written twice, nor read and written.
    """
    sizes = Arguments()
    sizes.tensor("source", source, _shape("source_pages", source), FLOATS, contiguous=source.ndim - 1)
    sizes.tensor("target", target, _shape("target_pages", source), (source.dtype,), contiguous=source.ndim - 1)
    sizes.tensor("pairs", pairs, "n 2", INT32, contiguous=2)
    from_words, to_words = _words(source), _words(target)
    words = from_words.shape[1]
    if sizes["n"] and words:
        _copy_kernel[(sizes["n"], triton.cdiv(words, BLOCK))](
            from_words,
            to_words,
            pairs,
            from_words.stride(0),
            to_words.stride(0),
            words,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def zero_pages(storage: Tensor, pages: Tensor) -> None:
    """Zero whole pages. storage: [pages, ...], a page without gaps. pages: int32[n], -1 is skipped."""
    sizes = Arguments()
    sizes.tensor("storage", storage, _shape("num_pages", storage), FLOATS, contiguous=storage.ndim - 1)
    sizes.tensor("pages", pages, "n", INT32)
    words = _words(storage)
    if sizes["n"] and words.shape[1]:
        grid = (sizes["n"], triton.cdiv(words.shape[1], BLOCK))
        _zero_kernel[grid](
            words, pages, words.stride(0), words.shape[1], BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False
        )


def zero_slots(storage: Tensor, slots: Tensor) -> None:
    """Zero single tokens in all layers. storage: [num_pages, layers, 2, kv_heads, page_size, head_dim], a page without gaps.
    slots: int64[n], page * page_size + offset, -1 is skipped."""
    sizes = Arguments()
    sizes.tensor("storage", storage, "num_pages layers 2 kv_heads page_size head_dim", FLOATS, contiguous=5)
    sizes.tensor("slots", slots, "n", (torch.int64,))
    vectors = sizes["layers"] * 2 * sizes["kv_heads"]
    if sizes["n"] and vectors:
        _zero_slots_kernel[(sizes["n"], triton.cdiv(vectors, 16))](
            storage,
            slots,
            storage.stride(0),
            vectors,
            sizes["page_size"],
            sizes["head_dim"],
            BLOCK_VECTORS=16,
            BLOCK_DIM=triton.next_power_of_2(sizes["head_dim"]),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def copy_pages_reference(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    for here, there in pairs.tolist():
        if here >= 0 and there >= 0:
            target[there] = source[here]


def zero_pages_reference(storage: Tensor, pages: Tensor) -> None:
    storage[pages[pages >= 0].long()] = 0


def zero_slots_reference(storage: Tensor, slots: Tensor) -> None:
    used = slots[slots >= 0]
    page_size = storage.shape[4]
    storage[used // page_size, :, :, :, used % page_size] = 0


def _shape(first: str, like: Tensor) -> str:
    if like.ndim < 2:
        raise KernelShapeError(first, f"must have at least two dimensions, has {like.ndim}")
    return " ".join([first, *map(str, like.shape[1:])])


def _words(storage: Tensor) -> Tensor:
    """[pages, int64 words of a page]."""
    flat = storage.view(storage.shape[0], -1)
    size = flat.element_size()
    check_one_of("bytes of a page % 8", flat.shape[1] * size % 8, (0,))
    check_one_of("bytes between pages % 8", flat.stride(0) * size % 8, (0,))
    check_one_of("address % 8", storage.data_ptr() % 8, (0,))
    return flat.view(torch.int64)


@triton.jit
def _copy_kernel(source, target, pairs, source_stride, target_stride, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    pair = pairs + tl.program_id(0) * 2
    here, there = tl.load(pair).to(tl.int64), tl.load(pair + 1).to(tl.int64)
    if (here >= 0) & (there >= 0):
        word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = word < words
        value = tl.load(source + here * source_stride + word, mask=inside)
        tl.store(target + there * target_stride + word, value, mask=inside)


@triton.jit
def _zero_kernel(storage, pages, stride, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    page = tl.load(pages + tl.program_id(0)).to(tl.int64)
    if page >= 0:
        word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(storage + page * stride + word, tl.zeros([BLOCK], tl.int64), mask=word < words)


@triton.jit
def _zero_slots_kernel(  # type: ignore[no-untyped-def]
    storage, slots, page_stride, vectors, page_size, head_dim, BLOCK_VECTORS: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    slot = tl.load(slots + tl.program_id(0))
    if slot >= 0:
        vector = tl.program_id(1) * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)
        dim = tl.arange(0, BLOCK_DIM)
        place = (vector.to(tl.int64) * page_size + slot % page_size)[:, None] * head_dim + dim[None, :]
        inside = (vector < vectors)[:, None] & (dim < head_dim)[None, :]
        zeros = tl.zeros([BLOCK_VECTORS, BLOCK_DIM], storage.dtype.element_ty)
        tl.store(storage + slot // page_size * page_stride + place, zeros, mask=inside)


def variants() -> Iterator[Variant]:
    yield Variant("copy_pages", _copy_kernel, "*i64 *i64 *i32 i32:16 i32:16 i32:16", {"BLOCK": BLOCK}, WARPS)
    yield Variant("zero_pages", _zero_kernel, "*i64 *i32 i32:16 i32:16", {"BLOCK": BLOCK}, WARPS)
    for dtype in FLOATS:
        types = f"*{TYPES[dtype]} *i64 i32:16 i32:16 i32:16 i32:16"
        constants = {"BLOCK_VECTORS": 16, "BLOCK_DIM": 128}
        yield Variant(f"zero_slots {TYPES[dtype]} head_dim=128", _zero_slots_kernel, types, constants, WARPS)
