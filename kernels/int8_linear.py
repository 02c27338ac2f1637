"""Matrix product with weights kept in 8 bits: half the bytes of a 16-bit weight, made wide again in registers.

Weights are quantised symmetrically with one scale per output feature, so the product is of whole numbers times the activations and the
scale is applied once, to the float32 sum. A program owns a block of outputs and walks over all inputs: no sums across programs, so the bits
of an output do not depend on the grid. Made for decode, where reading weights is what takes the time.
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

BLOCK_OUT, BLOCK_IN = 32, 128
MAX_BLOCK_TOKENS = 64
WARPS, STAGES = 4, 4


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor, *, bias: Tensor | None = None, out: Tensor) -> Tensor:
    """out = x @ (weight * scales[:, None]).T + bias; returns it. x: [tokens, inputs], any distance between tokens. weight: int8[outputs,
    inputs] without gaps. scales: float32[outputs]. bias: [outputs] or None. out: [tokens, outputs] of x's type."""
    sizes = Arguments()
    sizes.tensor("x", x, "tokens inputs", FLOATS)
    sizes.tensor("weight", weight, "outputs inputs", (torch.int8,), contiguous=2)
    sizes.tensor("scales", scales, "outputs", (torch.float32,))
    sizes.tensor("out", out, "tokens outputs", (x.dtype,))
    if bias is not None:
        sizes.tensor("bias", bias, "outputs", FLOATS)
    tokens, outputs = out.shape
    if tokens and outputs:
        block = block_tokens(tokens)
        _int8_kernel[(triton.cdiv(outputs, BLOCK_OUT), triton.cdiv(tokens, block))](
            x,
            weight,
            scales,
            scales if bias is None else bias,
            out,
            x.stride(0),
            out.stride(0),
            tokens,
            outputs,
            sizes["inputs"],
            BLOCK_TOKENS=block,
            BLOCK_OUT=BLOCK_OUT,
            BLOCK_IN=BLOCK_IN,
            BIAS=bias is not None,
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=False,
        )
    return out


def block_tokens(tokens: int) -> int:
    """Rows of a program's tile: the matrix units take 16 at least."""
    return min(MAX_BLOCK_TOKENS, max(16, triton.next_power_of_2(tokens)))


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights and float32 scales, one per output feature (a row); the largest of a row becomes 127. Rows of zeros have scale 1."""
    wide = weight.float()
    largest = wide.abs().amax(1)
    scales = torch.where(largest > 0, largest / 127.0, 1.0)
    return (wide / scales[:, None]).round().to(torch.int8), scales


def int8_linear_reference(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, compute: torch.dtype = torch.float64
) -> Tensor:
    """In type `compute`."""
    product = x.to(compute) @ (weight.to(compute) * scales.to(compute)[:, None]).T
    return product if bias is None else product + bias.to(compute)


@triton.jit
def _int8_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    scales,
    bias,
    out,
    x_stride,
    out_stride,
    tokens,
    outputs,
    inputs,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BIAS: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_IN)
    # Past the end the last one is computed again and not stored, which is cheaper than masks in the loop.
    x_rows = x + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * x_stride
    weight_rows = weight + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * inputs
    total = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], dtype=tl.float32)
    for first in range(0, inputs, BLOCK_IN):
        inside = (first + column < inputs)[None, :]
        values = tl.load(x_rows + first + column[None, :], mask=inside, other=0.0)
        weights = tl.load(weight_rows + first + column[None, :], mask=inside, other=0, eviction_policy="evict_first")
        wide = weights.to(tl.float32).to(x.dtype.element_ty)  # exact; the interpreter knows no other way to bfloat16
        total = dot(values, tl.trans(wide), total)
    total = total * tl.load(scales + output, mask=output < outputs, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = out + token.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (output < outputs)[None, :])


def variants() -> Iterator[Variant]:
    """Each tile height in bfloat16; float16 and a bias at one."""
    cases = [(torch.bfloat16, 16, False), (torch.bfloat16, 64, True), (torch.float16, 32, False)]
    for dtype, block, bias in cases:
        name = TYPES[dtype]
        yield Variant(
            f"int8_linear {name} tokens={block}{' bias' if bias else ''}",
            _int8_kernel,
            f"*{name} *i8 *fp32 *{name if bias else 'fp32'} *{name} i32:16 i32:16 i32 i32:16 i32:16",
            {"BLOCK_TOKENS": block, "BLOCK_OUT": BLOCK_OUT, "BLOCK_IN": BLOCK_IN, "BIAS": bias},
            WARPS,
            STAGES,
        )
