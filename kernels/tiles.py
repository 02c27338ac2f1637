"""Arithmetic on tiles that the attention kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 numbers as if they were integers; there they are made float32 first.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a @ b in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def score_factor(scale, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """What scores are multiplied with to be base-2 logarithms of weights. It is applied in float32, as part of the exponential: q
    scaled beforehand would be rounded to 16 bits a second time."""
    if HAS_SOFTCAP:
        return 1.0
    else:
        return scale * LOG2_E


@triton.jit
def cap_scores(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1) goes to -1 and 1 at the ends without overflow.
        doubled = tl.exp2(scores * (scale * 2.0 * LOG2_E / softcap))
        return (softcap * LOG2_E) * (1.0 - 2.0 / (doubled + 1.0))
    else:
        return scores


@triton.jit
def accumulate(scores, v, maximum, total, attended, factor, MAY_BE_HIDDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of the running softmax. Tiles that are hidden from a row (scores of -inf) change nothing for it, not a bit, once it has
    seen something; before that, MAY_BE_HIDDEN is needed. The multiply-add is explicit and kernels are compiled without others
    (enable_fp_fusion=False), so that the same numbers come out of every loop and variant."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    base = new_maximum
    if MAY_BE_HIDDEN:
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(tl.fma(scores, factor, -(base * factor)[:, None]))
    decay = tl.exp2((maximum - base) * factor)
    total = total * decay + tl.sum(weights, 1)
    attended = dot(weights.to(v.dtype), v, attended * decay[:, None])
    return new_maximum, total, attended


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    pages,  # [num_pages, kv_heads, PAGE, HEAD_DIM]: a pointer, or a tensor descriptor with blocks of [1, 1, TILE, BLOCK_D]
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
    DESCRIPTORS: tl.constexpr,
):
    """Slots [slot, slot + TILE) of a page's head: [TILE, BLOCK_D]; zeros past HEAD_DIM and, if MASKED, where not visible."""
    dim = tl.arange(0, BLOCK_D)
    if DESCRIPTORS:  # fills with zeros past HEAD_DIM
        tile = pages.load([page.to(tl.int32), head, slot, 0]).reshape(TILE, BLOCK_D)
        return tl.where(visible[:, None], tile, 0.0) if MASKED else tile
    else:
        token = (head * PAGE + slot + tl.arange(0, TILE))[:, None]
        pointers = pages + page * page_stride + token * HEAD_DIM + dim[None, :]
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
