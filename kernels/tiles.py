"""Arithmetic on tiles that the attention kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 numbers as if they were integers; there they are made float32 first.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b):  # type: ignore[no-untyped-def]
    """a @ b in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def log2_weights(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores q.k as base-2 logarithms of unnormalised weights. The scale is applied in float32 here: q scaled beforehand would be
    rounded to 16 bits a second time."""
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1) goes to -1 and 1 at the ends without overflow.
        doubled = tl.exp2(scores * (scale * 2.0 * LOG2_E / softcap))
        return (softcap * LOG2_E) * (1.0 - 2.0 / (doubled + 1.0))
    else:
        return scores * (scale * LOG2_E)


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    pages,  # [num_pages, kv_heads, PAGE, HEAD_DIM]
    page,  # int64: a page's distance can be past 2^31 elements
    page_stride,
    head,
    slot,
    visible,  # [TILE]
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Slots [slot, slot + TILE) of a page's head: [TILE, BLOCK_D]; zeros past HEAD_DIM and, if MASKED, where not visible."""
    token, dim = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    pointers = pages + page * page_stride + (head * PAGE + slot + token)[:, None] * HEAD_DIM + dim[None, :]
    # evict_first: read once per step, so other data deserves the second-level cache more.
    if MASKED and HEAD_DIM < BLOCK_D:
        mask = visible[:, None] & (dim[None, :] < HEAD_DIM)
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    elif MASKED:
        return tl.load(pointers, mask=visible[:, None], other=0.0, eviction_policy="evict_first")
    elif HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=dim[None, :] < HEAD_DIM, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(pointers, eviction_policy="evict_first")
