"""A matrix product whose every element is summed in one fixed order, whatever the number of rows is: for deterministic mode.

A library chooses its algorithm, and so the order of its sums, by the shape; then a row's last bits depend on how many other rows there
are. Here an element is a loop over the inner dimension in tiles of one size, in float32, by one program: nothing of another row or
column has a part in it. The tile sizes are fixed per type. Not split over the inner dimension, so few rows keep few multiprocessors busy.

The tile sizes are PREDICTIONS, not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos.kernels.checks import FLOATS, Arguments
from llmos.kernels.tiles import dot
from llmos.kernels.variants import TYPES, Variant

BLOCK_M, BLOCK_N = 16, 64
BLOCK_K = {1: 128, 2: 64, 4: 32}  # by element size: 128 bytes
WARPS, STAGES = 4, 4


def fixed_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor) -> Tensor:
    """Write out = x @ weight.T + bias and return it. x: [rows, inner], weight: [columns, inner], bias: [columns], out: [rows, columns]."""
    sizes = Arguments()
    sizes.tensor("x", x, "rows inner", FLOATS)
    sizes.tensor("weight", weight, "columns inner", (x.dtype,))
    sizes.tensor("out", out, "rows columns", (x.dtype,))
    if bias is not None:
        sizes.tensor("bias", bias, "columns", FLOATS)
    rows, columns, inner = sizes["rows"], sizes["columns"], sizes["inner"]
    if rows and columns:
        _matmul_kernel[(triton.cdiv(columns, BLOCK_N), triton.cdiv(rows, BLOCK_M))](
            x,
            weight,
            weight if bias is None else bias,
            out,
            rows,
            columns,
            inner,
            x.stride(0),
            weight.stride(0),
            out.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K[x.element_size()],
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out


def fixed_matmul_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, compute: torch.dtype = torch.float64
) -> Tensor:
    """In type `compute`."""
    product = x.to(compute) @ weight.to(compute).t()
    return product if bias is None else product + bias.to(compute)


@triton.jit
def _matmul_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    rows,
    columns,
    inner,
    x_stride,
    weight_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    place = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        inside = start + place < inner
        left = tl.load(
            x + row[:, None] * x_stride + (start + place)[None, :],
            mask=(row < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + column[None, :] * weight_stride + (start + place)[:, None],
            mask=(column < columns)[None, :] & inside[:, None],
            other=0.0,
        )
        total = dot(left, right, total)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + row[:, None] * out_stride + column[None, :],
        total.to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


def variants() -> Iterator[Variant]:
    """Each type, with and without a bias."""
    for dtype, name in TYPES.items():
        for has_bias in (False, True):
            sizes = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K[dtype.itemsize]}
            yield Variant(
                f"fixed_matmul {name}{' bias' if has_bias else ''}",
                _matmul_kernel,
                f"*{name} *{name} *{name} *{name} i32 i32:16 i32:16 i32:16 i32:16 i32:16",
                {"HAS_BIAS": has_bias, **sizes},
                WARPS,
                STAGES,
            )
