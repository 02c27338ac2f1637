"""From the merged q, k and v projection to rotated queries and a filled KV cache, in one launch.

For each token: RMSNorm of each head of q and k if the model has it, rotary embedding of q and k (element i is paired with
i + head_dim / 2), then q is written to `q_out`, k and v to their slot in the pages. Float32 inside, rounded once.
A token with slot -1 writes nothing anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos.kernels.checks import FLOATS, INT32, Arguments, KernelShapeError, check_one_of, check_range
from llmos.kernels.variants import TYPES, Variant

INT64 = (torch.int64,)
BLOCK_HEADS = 8


def rope_and_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    q_out: Tensor,
) -> Tensor:
    """Write `q_out`, `k_pages` and `v_pages`; returns `q_out`.

    qkv: [tokens, (heads + 2 * kv_heads) * head_dim]. positions: int32[tokens], rows of `cos_sin`. slots: int64[tokens], page * page_size
    + offset, or -1. cos_sin: float32[max_positions, head_dim], the cosines of the pairs, then their sines (`rope_table`).
    k_pages, v_pages: [num_pages, kv_heads, page_size, head_dim], any distance between pages, of any float type.
    q_norm, k_norm: [head_dim], both or none. q_out: [tokens, heads, head_dim] of qkv's type; it may be the queries' part of qkv itself.
    """
    sizes = Arguments()
    sizes.tensor("qkv", qkv, "tokens width", FLOATS)
    sizes.tensor("positions", positions, "tokens", INT32)
    sizes.tensor("slots", slots, "tokens", INT64)
    sizes.tensor("q_out", q_out, "tokens heads head_dim", (qkv.dtype,), contiguous=2)
    sizes.tensor("k_pages", k_pages, "num_pages kv_heads page_size head_dim", FLOATS, contiguous=3)
    sizes.tensor("v_pages", v_pages, "num_pages kv_heads page_size head_dim", (k_pages.dtype,), contiguous=3)
    sizes.tensor("cos_sin", cos_sin, "max_positions head_dim", (torch.float32,), contiguous=2)
    head_dim, heads, kv_heads = sizes["head_dim"], sizes["heads"], sizes["kv_heads"]
    check_one_of("width of qkv", sizes["width"], ((heads + 2 * kv_heads) * head_dim,))
    check_one_of("head_dim % 2", head_dim % 2, (0,))
    check_range("head_dim", head_dim, 2, 512)
    if (q_norm is None) != (k_norm is None):
        raise KernelShapeError("q_norm", "and k_norm must be given both or not at all")
    for field, norm in {"q_norm": q_norm, "k_norm": k_norm}.items():
        if norm is not None:
            sizes.tensor(field, norm, "head_dim", FLOATS)
    if sizes["tokens"]:
        grid = (sizes["tokens"], triton.cdiv(heads, BLOCK_HEADS) + 2 * triton.cdiv(kv_heads, BLOCK_HEADS))
        _rope_kernel[grid](
            qkv,
            positions,
            slots,
            cos_sin,
            q_norm if q_norm is not None else cos_sin,
            k_norm if k_norm is not None else cos_sin,
            q_out,
            k_pages,
            v_pages,
            qkv.stride(0),
            q_out.stride(0),
            k_pages.stride(0),
            v_pages.stride(0),
            sizes["page_size"],
            1.0 / head_dim,
            eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_HEADS=BLOCK_HEADS,
            BLOCK_PAIRS=triton.next_power_of_2(head_dim // 2),
            NORM=q_norm is not None,
            num_warps=rope_warps(head_dim),
            enable_fp_fusion=False,
        )
    return q_out


def rope_warps(head_dim: int) -> int:
    """About four pairs per thread."""
    return min(8, max(1, BLOCK_HEADS * triton.next_power_of_2(head_dim // 2) // 128))


def rope_table(frequencies: Tensor, scale: float, max_positions: int) -> Tensor:
    """`cos_sin` for positions 0 to max_positions - 1. frequencies: float32[head_dim / 2] radians per position."""
    angle = torch.arange(max_positions, device=frequencies.device, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angle.cos() * scale, angle.sin() * scale), -1)


def rope_and_write_reference(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """Writes the pages and returns the queries, in type `compute`; those of tokens without a slot mean nothing."""
    _, kv_heads, page_size, head_dim = k_pages.shape
    heads = qkv.to(compute).view(len(qkv), -1, head_dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w.to(compute)
            for x, w in ((q, q_norm), (k, k_norm))
        )
    cos, sin = cos_sin.to(compute)[positions.long()][:, None].chunk(2, -1)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    used = slots >= 0
    pages, offsets = slots[used] // page_size, slots[used] % page_size
    k_pages[pages, :, offsets] = turn(k)[used].to(k_pages.dtype)
    v_pages[pages, :, offsets] = v[used].to(v_pages.dtype)
    return turn(q)


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    qkv,
    positions,
    slots,
    cos_sin,
    q_norm,
    k_norm,
    q_out,
    k_pages,
    v_pages,
    qkv_stride,
    q_stride,
    k_page_stride,
    v_page_stride,
    page_size,
    inverse_head_dim,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    NORM: tl.constexpr,
):
    """A program's heads are all queries, all keys or all values."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    q_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    half: tl.constexpr = HEAD_DIM // 2
    is_query = block < q_blocks
    is_value = block >= q_blocks + kv_blocks
    head = tl.where(is_query, block, (block - q_blocks) % kv_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    source_head = head + tl.where(is_query, 0, tl.where(is_value, HEADS + KV_HEADS, HEADS))
    pair = tl.arange(0, BLOCK_PAIRS)
    inside = (head < tl.where(is_query, HEADS, KV_HEADS))[:, None] & (pair < half)[None, :]
    source = qkv + token * qkv_stride + source_head[:, None] * HEAD_DIM + pair[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if not is_value:
        if NORM:
            weight = tl.where(is_query, q_norm, k_norm) + pair
            squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            inverse = tl.rsqrt(squares * inverse_head_dim + eps)[:, None]
            first = first * inverse * tl.load(weight, mask=pair < half, other=0.0).to(tl.float32)[None, :]
            second = second * inverse * tl.load(weight + half, mask=pair < half, other=0.0).to(tl.float32)[None, :]
        angle = cos_sin + tl.load(positions + token).to(tl.int64) * HEAD_DIM + pair
        cos = tl.load(angle, mask=pair < half, other=0.0)[None, :]
        sin = tl.load(angle + half, mask=pair < half, other=0.0)[None, :]
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    if is_query:
        target = q_out + token * q_stride + head[:, None] * HEAD_DIM + pair[None, :]
        tl.store(target, first.to(q_out.dtype.element_ty), mask=inside)
        tl.store(target + half, second.to(q_out.dtype.element_ty), mask=inside)
    else:
        page, offset = slot // page_size, slot % page_size
        place = (head * page_size)[:, None] * HEAD_DIM + offset * HEAD_DIM + pair[None, :]
        pages = tl.where(is_value, v_pages, k_pages) + page * tl.where(is_value, v_page_stride, k_page_stride)
        tl.store(pages + place, first.to(k_pages.dtype.element_ty), mask=inside)
        tl.store(pages + place + half, second.to(k_pages.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    """Every head size in bfloat16; every type, with and without norms, at one."""
    shapes = [(32, 8, 64), (16, 16, 80), (24, 8, 96), (8, 4, 256)]
    cases = [(torch.bfloat16, shape) for shape in shapes] + [(dtype, (16, 8, 128)) for dtype in FLOATS]
    for dtype, (heads, kv_heads, head_dim) in cases:
        name = TYPES[dtype]
        for norm in (False, True) if head_dim == 128 else (False,):
            normed = name if norm else "fp32"  # without norms the table of cosines stands in their place
            yield Variant(
                f"rope_and_write {name} heads={heads} kv_heads={kv_heads} head_dim={head_dim}{' norm' if norm else ''}",
                _rope_kernel,
                f"*{name} *i32 *i64 *fp32 *{normed} *{normed} *{name} *{name} *{name} i32:16 i32:16 i32:16 i32:16 i32:16 fp32 fp32",
                {
                    "HEADS": heads,
                    "KV_HEADS": kv_heads,
                    "HEAD_DIM": head_dim,
                    "BLOCK_HEADS": BLOCK_HEADS,
                    "BLOCK_PAIRS": triton.next_power_of_2(head_dim // 2),
                    "NORM": norm,
                },
                rope_warps(head_dim),
            )
