"""RMSNorm (Zhang and Sennrich 2019), alone and fused with the residual addition before it. One program per token, float32 inside.

`add_rms_norm` rounds the new residual to its type before it is normalised, so that both results say the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos.kernels.checks import FLOATS, Arguments, check_range
from llmos.kernels.variants import TYPES, Variant

MAX_HIDDEN = 32768


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """out = x / rms(x) * weight over the last dimension; returns it. x, out: [tokens, hidden], any distance between tokens; out may be x.
    weight: [hidden], of any float type."""
    sizes = Arguments()
    sizes.tensor("x", x, "tokens hidden", FLOATS)
    _check_rest(sizes, weight, out, x.dtype)
    _launch(x, x, weight, eps, out, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """residual += x in place, then out = rms_norm(residual); returns it. Shapes as for `rms_norm`; out may be x."""
    sizes = Arguments()
    sizes.tensor("x", x, "tokens hidden", FLOATS)
    sizes.tensor("residual", residual, "tokens hidden", FLOATS)
    _check_rest(sizes, weight, out, x.dtype)
    _launch(x, residual, weight, eps, out, add=True)
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, compute: torch.dtype = torch.float64) -> Tensor:
    """In type `compute`."""
    wide = x.to(compute)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(compute)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, compute: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The new residual, in its type, and the norm of it."""
    total = (residual.to(compute) + x.to(compute)).to(residual.dtype)
    return total, rms_norm_reference(total, weight, eps, compute)


def _check_rest(sizes: Arguments, weight: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    sizes.tensor("weight", weight, "hidden", FLOATS)
    sizes.tensor("out", out, "tokens hidden", (dtype,))
    check_range("hidden", sizes["hidden"], 1, MAX_HIDDEN)


def _launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, *, add: bool) -> None:
    tokens, hidden = x.shape
    if not tokens:
        return
    block = triton.next_power_of_2(hidden)
    _norm_kernel[(tokens,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        residual.stride(0),
        out.stride(0),
        hidden,
        1.0 / hidden,
        eps,
        BLOCK=block,
        ADD=add,
        num_warps=norm_warps(block),
        enable_fp_fusion=False,
    )


def norm_warps(block: int) -> int:
    """About eight elements per thread, so that one load is 16 bytes of a 2-byte type."""
    return min(16, max(1, block // 256))


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    out,
    x_stride,
    residual_stride,
    out_stride,
    hidden,
    inverse_hidden,
    eps,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(x + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        place = residual + token * residual_stride + column
        total = (value + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, total, mask=inside)
        value = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) * inverse_hidden + eps)
    normed = (value * inverse * scale).to(out.dtype.element_ty)
    tl.store(out + token * out_stride + column, normed, mask=inside)


def variants() -> Iterator[Variant]:
    """Each type at one size, the sizes of common models in bfloat16, and one that is no power of two."""
    cases = [(torch.bfloat16, hidden) for hidden in (1024, 2880, 8192)]
    for dtype, hidden in [*cases, (torch.float16, 4096), (torch.float32, 4096)]:
        block, name = triton.next_power_of_2(hidden), TYPES[dtype]
        for add in (False, True):
            yield Variant(
                f"{'add_' if add else ''}rms_norm {name} hidden={hidden}",
                _norm_kernel,
                f"*{name} *{name} *{name} *{name} i32:16 i32:16 i32:16 i32:16 fp32 fp32",
                {"BLOCK": block, "ADD": add},
                norm_warps(block),
            )
