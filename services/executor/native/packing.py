"""Weights in panels of 16 output columns, as `matmul.py` reads them, and their quantisation.

int8: groups of 128 inputs of a column share a scale, int4: groups of 32; symmetric, round to nearest. Scales are bfloat16, rounded up
so that no weight leaves the range, and weights are rounded with the scale as it is kept.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from llmos.services.executor.native.code import LANES
from llmos.services.executor.native.matmul import FORMATS, PANEL

_HUGE_PAGE = 2 * 1024 * 1024
_LEVELS = {"int8": 127, "int4": 7}


def allocate(num_bytes: int) -> Tensor:
    """uint8 memory that begins on a page and, where the system has them, consists of huge pages: large weights are read faster."""
    size = max(num_bytes, 1)
    memory = mmap.mmap(-1, size)
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))


def panels_of(rows: int) -> int:
    return -(-rows // PANEL)


def pack(weight: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """weight: [out, in] -> packed bytes and scales (None where the format has none)."""
    assert name in FORMATS
    if name in _LEVELS:
        values, scales = quantise(weight, name)
        return _pack_integers(values, name), _interleave(scales.t())
    if name == "bfloat16":
        return _interleave(weight.to(torch.bfloat16).t()), None
    return _panels(weight.to(getattr(torch, name))), None


def quantise(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """int8[out, in] values and bfloat16[out, groups] scales: weight is about values x scale."""
    group, levels = FORMATS[name].group, _LEVELS[name]
    out, inputs = weight.shape
    groups = -(-inputs // group)
    padded = torch.zeros(out, groups * group)
    padded[:, :inputs] = weight
    grouped = padded.view(out, groups, group)
    exact = grouped.abs().amax(2) / levels
    scales = _round_up(exact)
    values = (grouped / scales.float().clamp(min=1e-38)[:, :, None]).round_().clamp_(-levels, levels).to(torch.int8)
    return values.view(out, -1)[:, :inputs].contiguous(), scales


def dequantise(values: Tensor, scales: Tensor, name: str) -> Tensor:
    """float32[out, in]: the weights as the kernels see them."""
    wide = scales.float().repeat_interleave(FORMATS[name].group, 1)[:, : values.shape[1]]
    return values.float() * wide


def _round_up(values: Tensor) -> Tensor:
    """The least bfloat16 that is not below (positive numbers)."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) >> 16 << 16).view(torch.float32).to(torch.bfloat16)


def _panels(weight: Tensor) -> Tensor:
    """[out, in] -> [panels, in, 16], zeros where there is no column."""
    out, inputs = weight.shape
    count = panels_of(out)
    packed = allocate(count * PANEL * inputs * weight.element_size()).view(weight.dtype).view(count, inputs, PANEL)
    whole = out // PANEL
    packed[:whole].copy_(weight[: whole * PANEL].view(whole, PANEL, inputs).transpose(1, 2))
    if whole < count:
        packed[whole].zero_()
        packed[whole, :, : out - whole * PANEL].copy_(weight[whole * PANEL :].t())
    return packed


def _interleave(columns: Tensor) -> Tensor:
    """bfloat16[in, out] -> [panels, in, 8, 2]: columns j and j + 8 of a panel in one 32-bit word."""
    return _permute(_panels(columns.t().view(torch.int16)), 2)


def _permute(packed: Tensor, ways: int) -> Tensor:
    """Order 0, 8, 1, 9, ... inside each 16, in place."""
    inputs = packed.shape[1]
    for panel in packed:
        panel.copy_(panel.view(inputs, ways, LANES).transpose(1, 2).reshape(inputs, PANEL).clone())
    return packed


def _pack_integers(values: Tensor, name: str) -> Tensor:
    packed = _panels(values)
    if name == "int8":
        return packed
    low, high = packed[:, :, :LANES], packed[:, :, LANES:]
    half = allocate(packed.numel() // 2).view(torch.int8).view(packed.shape[0], packed.shape[1], LANES)
    half.copy_((low & 15) | (high << 4))
    return half
