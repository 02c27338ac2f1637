"""`PackedLinear`: y = x @ weight.T + bias on the CPU, with weights packed at load for the fastest kernel.

Role: every matrix product of the CPU backend goes through here; nothing else knows how weights are kept.

Kernels, chosen by what the box offers and never by timing, so that a restarted executor computes the same numbers:
- `fbgemm-fp16`, for bfloat16 and float16 weights: 2 bytes a weight in memory, float32 products and sums. bfloat16 fits
  float16 but for its range; a matrix that leaves it is stored scaled by a power of two, its input is scaled back.
- `onednn-fp32`, for float32 weights: packed once; exact float32 arithmetic.
- `torch`: plain `F.linear`, where those are missing (no x86, no oneDNN).

Invariants: the result has the dtype of x (pass float32 to get unrounded logits). A row of a packed kernel's result is
bitwise the same whatever other rows x has, so a request gets the same tokens alone and in a full batch. FBGEMM sums in
another order where a block of rows is 1 or 2 high; `_padded_rows` finds the row counts that do that and pads them.

Time against `F.linear` on the same weights, weights not in cache, 1024 -> 5632 and 2 threads of an AMD EPYC that has
AVX2 only (no avx512_bf16):
    rows                                1      2      4      8     16     32    128
    bfloat16 F.linear, ms            0.55   1.02   2.02   4.03   8.00  15.89  63.58
    fbgemm-fp16: times faster         1.1    2.1    4.1    5.4    7.1    7.5    8.8    (1-4 rows: memory bound)
    float32 F.linear, ms             1.27   2.75   3.18   2.85   3.35   4.40  10.19
    onednn-fp32: times faster         1.6    3.4    3.2    2.3    1.9    1.6    1.1
`python bench/linear.py` prints this table for another box. Where the CPU multiplies bfloat16 in hardware (avx512_bf16,
AMX), oneDNN's bfloat16 product may win for long prompts; that has not been measured yet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT16_MAX = 65504.0
# Largest error of a stored weight that needs no scaling, as a share of the matrix's largest weight.
SCALING_TOLERANCE = 2.0**-20
# FBGEMM works through x in chunks of so many rows; the blocks inside a chunk depend only on how many rows it has.
FBGEMM_CHUNK_ROWS = 120


class PackedLinear:
    """One linear layer. Keeps the packed weights only: drop your reference to `weight` to free it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        assert weight.dim() == 2, "weight: [out, in]"
        assert weight.device.type == "cpu"
        assert bias is None or bias.shape == weight.shape[:1], "bias: [out]"
        self.out_features, self.in_features = weight.shape
        self.kernel, self._multiply = _pack(weight.detach(), None if bias is None else bias.detach())

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in] of any float dtype -> [..., out] of the same dtype."""
        if x.dim() == 2:
            return self._multiply(x)
        return self._multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


def make_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """The fastest layer this box has for `weight` [out, in] and `bias` [out]."""
    return PackedLinear(weight, bias)


Multiply = Callable[[Tensor], Tensor]


def _pack(weight: Tensor, bias: Tensor | None) -> tuple[str, Multiply]:
    if weight.dtype in (torch.bfloat16, torch.float16) and has_fbgemm_fp16() and bool(weight.isfinite().all()):
        return "fbgemm-fp16", _pack_fbgemm(weight, bias)
    if weight.dtype == torch.float32 and has_onednn_fp32():
        return "onednn-fp32", _pack_onednn(weight, bias)
    return "torch", _pack_torch(weight, bias)


# ---------------------------------------------------------------- fbgemm-fp16


def _pack_fbgemm(weight: Tensor, bias: Tensor | None) -> Multiply:
    scale = _float16_scale(weight)
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float() * scale, None if bias is None else bias.float())
    unscale = 1.0 / scale

    def multiply(x: Tensor) -> Tensor:
        rows = x.shape[0]
        padded = _padded_rows(rows)
        x32 = x.float() if unscale == 1.0 else x.float() * unscale
        if padded != rows:
            x32 = torch.cat((x32, *[x32[:1]] * (padded - rows)))  # a third of the time of F.pad
        y = torch.ops.quantized.linear_dynamic_fp16(x32, packed)
        return (y if padded == rows else y[:rows]).to(x.dtype)

    return multiply


def _float16_scale(weight: Tensor) -> float:
    """The power of two to multiply `weight` with so that float16 holds it: 1 nearly always."""
    if weight.dtype == torch.float16 or weight.numel() == 0:
        return 1.0
    largest = float(weight.abs().max())
    if largest == 0.0:
        return 1.0
    if largest <= FLOAT16_MAX:
        error = float((weight.to(torch.float16).to(torch.bfloat16).float() - weight.float()).abs().max())
        if error <= SCALING_TOLERANCE * largest:
            return 1.0
    # The largest weight lands in [2^15, 2^16): only weights less than 2^-32 of it lose bits.
    return 2.0 ** (16 - math.frexp(largest)[1])


@functools.lru_cache(maxsize=4096)
def _padded_rows(rows: int) -> int:
    """The least row count >= rows at which FBGEMM sums every row in the same order."""
    chunks, rest = divmod(rows, FBGEMM_CHUNK_ROWS)
    return chunks * FBGEMM_CHUNK_ROWS + _padding_table()[rest]


@functools.cache
def _padding_table() -> tuple[int, ...]:
    """For 0..119 rows the padded count, found by multiplying copies of one row: all results must be the same bits."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.ops.quantized.linear_prepack_fp16(torch.randn(16, 256, generator=generator), None)
    row = torch.randn(1, 256, generator=generator)

    def results(rows: int) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(row.expand(rows, -1), packed)

    usual = results(FBGEMM_CHUNK_ROWS)[0]
    table = [FBGEMM_CHUNK_ROWS] * (FBGEMM_CHUNK_ROWS + 1)
    for rows in range(FBGEMM_CHUNK_ROWS - 1, 0, -1):
        table[rows] = rows if bool((results(rows) == usual).all()) else table[rows + 1]
    table[0] = 0
    return tuple(table)


@functools.cache
def has_fbgemm_fp16() -> bool:
    """Whether torch was built with FBGEMM and it runs here (x86 with AVX2)."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    return _works(
        lambda: torch.ops.quantized.linear_dynamic_fp16(_ones(), torch.ops.quantized.linear_prepack_fp16(_ones(), None))
    )


# ---------------------------------------------------------------- onednn-fp32


def _pack_onednn(weight: Tensor, bias: Tensor | None) -> Multiply:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    bias = None if bias is None else bias.float()

    def multiply(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.float(), packed, bias, "none", [], "").to(x.dtype)

    return multiply


@functools.cache
def has_onednn_fp32() -> bool:
    """Whether torch was built with oneDNN and still has the packed linear op that its compiler emits."""
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return _works(
        lambda: ops._linear_pointwise(_ones(), ops._reorder_linear_weight(_ones(), None), None, "none", [], "")
    )


# ---------------------------------------------------------------- torch


def _pack_torch(weight: Tensor, bias: Tensor | None) -> Multiply:
    bias = None if bias is None else bias.to(weight.dtype)
    return lambda x: F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _ones() -> Tensor:
    return torch.ones(16, 16)


def _works(trial: Callable[[], Any]) -> bool:
    """Whether a 16 x 16 product of ones comes out right: an op that is missing or not built in raises."""
    try:
        return bool((trial() == 16.0).all())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
