"""SiLU(gate) * up from the output of the merged gate and up projection. Float32 inside, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos.kernels.checks import FLOATS, Arguments, check_one_of
from llmos.kernels.variants import TYPES, Variant

BLOCK = 1024
WARPS = 4


def silu_mul(gate_up: Tensor, *, out: Tensor) -> Tensor:
    """Write `out` [tokens, width] and return it. gate_up: [tokens, 2 * width], the gates first; any distance between tokens."""
    sizes = Arguments()
    sizes.tensor("gate_up", gate_up, "tokens both", FLOATS)
    sizes.tensor("out", out, "tokens width", (gate_up.dtype,))
    check_one_of("width of gate_up", sizes["both"], (2 * sizes["width"],))
    tokens, width = out.shape
    if tokens and width:
        grid = (tokens, triton.cdiv(width, BLOCK))
        _silu_mul_kernel[grid](
            gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False
        )
    return out


def silu_mul_reference(gate_up: Tensor, compute: torch.dtype = torch.float64) -> Tensor:
    """In type `compute`."""
    gate, up = gate_up.to(compute).chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@triton.jit
def _silu_mul_kernel(gate_up, out, in_stride, out_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up + token * in_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # never above 1
    value = gate * tl.where(gate >= 0, 1.0, small) / (1.0 + small) * up
    tl.store(out + token * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    for dtype in FLOATS:
        name = TYPES[dtype]
        types = f"*{name} *{name} i32:16 i32:16 i32:16"
        yield Variant(f"silu_mul {name}", _silu_mul_kernel, types, {"BLOCK": BLOCK}, WARPS)
