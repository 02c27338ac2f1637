"""Launch configurations of the attention kernels, by element size of K and V and padded head size.

PREDICTIONS, reasoned from shared memory, registers and bytes in flight, and compiled ahead of time, but not measured on a GPU yet. When
they are, change the tables here and say on what they were measured.

They depend on shapes and types only, never on lengths or batch sizes: `paged_prefill` promises the same bits however a prompt is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """tile: most tokens per tile (a page is cut if larger). programs_per_sm: of the persistent grid."""

    tile: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """block_m: rows of a program, query tokens times grouped heads. tile: most tokens per tile of K and V."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


# (bytes per element of K and V, head size padded to a power of two). Decode: n stages are n - 1 tiles of K and V ahead. With
# two programs per multiprocessor that is up to 190 KiB in flight, several times what 4.3 TB/s at a microsecond of latency needs.
DECODE = {
    (1, 64): DecodeConfig(tile=128, num_warps=4, num_stages=3, programs_per_sm=2),
    (1, 128): DecodeConfig(tile=128, num_warps=4, num_stages=3, programs_per_sm=2),
    (1, 256): DecodeConfig(tile=64, num_warps=4, num_stages=3, programs_per_sm=2),
    (2, 64): DecodeConfig(tile=128, num_warps=4, num_stages=4, programs_per_sm=2),
    (2, 128): DecodeConfig(tile=64, num_warps=4, num_stages=4, programs_per_sm=2),
    (2, 256): DecodeConfig(tile=32, num_warps=4, num_stages=4, programs_per_sm=2),
    (4, 64): DecodeConfig(tile=64, num_warps=4, num_stages=3, programs_per_sm=2),
    (4, 128): DecodeConfig(tile=32, num_warps=4, num_stages=3, programs_per_sm=2),
    (4, 256): DecodeConfig(tile=16, num_warps=4, num_stages=3, programs_per_sm=2),
}
# Prefill: 128 rows are two warp groups of 64 on Hopper. float32 is for checks, not for speed: it is multiplied without tensor cores.
PREFILL = {
    (1, 64): PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3),
    (1, 128): PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3),
    (1, 256): PrefillConfig(block_m=64, tile=32, num_warps=8, num_stages=2),
    (2, 64): PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3),
    (2, 128): PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3),
    (2, 256): PrefillConfig(block_m=64, tile=32, num_warps=8, num_stages=2),
    (4, 64): PrefillConfig(block_m=64, tile=32, num_warps=8, num_stages=2),
    (4, 128): PrefillConfig(block_m=32, tile=16, num_warps=8, num_stages=2),
    (4, 256): PrefillConfig(block_m=16, tile=16, num_warps=8, num_stages=2),
}


def decode_config(head_dim: int, dtype: torch.dtype) -> DecodeConfig:
    return DECODE[dtype.itemsize, triton.next_power_of_2(head_dim)]


def prefill_config(head_dim: int, dtype: torch.dtype) -> PrefillConfig:
    return PREFILL[dtype.itemsize, triton.next_power_of_2(head_dim)]


def decode_programs(device: torch.device, head_dim: int, dtype: torch.dtype) -> int:
    """`num_programs` of a `DecodePlan`: what fits on the device at once; on a CPU (the interpreter) a handful."""
    if device.type != "cuda":
        return 8
    return (
        torch.cuda.get_device_properties(device).multi_processor_count * decode_config(head_dim, dtype).programs_per_sm
    )
