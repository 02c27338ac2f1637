"""The attention kernels' variants that are compiled ahead of time: the launches that `paged_decode` and `paged_prefill` would make."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from llmos.kernels.configs import decode_config, prefill_config
from llmos.kernels.decode_kernel import decode_kernel
from llmos.kernels.decode_plan import plan_kernel
from llmos.kernels.paged_decode import merge_constants
from llmos.kernels.prefill_kernel import prefill_kernel
from llmos.kernels.variants import TYPES, Variant

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# type, head size, query heads per KV head, page size, what is on
DECODE = [
    (BF16, 128, 4, 64, ()),  # Llama-3.1-8B
    (BF16, 128, 2, 64, ("deterministic",)),  # Qwen3-0.6B
    (BF16, 64, 4, 64, ()),  # Llama-3.2-1B
    (BF16, 256, 8, 64, ("window", "softcap")),
    (F16, 80, 1, 16, ()),
    (F32, 128, 16, 128, ()),
]
PREFILL = [
    (BF16, 128, 4, 64, ()),
    (BF16, 64, 4, 64, ()),
    (BF16, 256, 8, 64, ("window", "softcap")),
    (F16, 80, 1, 16, ()),
    (F32, 128, 16, 128, ()),
]
# For sm_90 and later. A variant can not say so: for earlier GPUs Triton has to make plain loads of them.
WITH_DESCRIPTORS = (BF16, 128, 4, 64, ("descriptors",))


def variants() -> Iterator[Variant]:
    counts = {"KV_HEADS": 8, "PAGE": 64, "NUM_PROGRAMS": 264, "BLOCK_BATCH": 256, "BLOCK_PROGRAMS": 128}
    yield Variant("plan batch=256", plan_kernel, "*i32 *i32 *i32 *i32 i32 i32 i32", counts)
    for case in (*DECODE, WITH_DESCRIPTORS):
        yield _decode(*case)
    for case in (*PREFILL, WITH_DESCRIPTORS):
        yield _prefill(*case)


def _name(kernel: str, dtype: torch.dtype, head_dim: int, groups: int, page: int, on: tuple[str, ...]) -> str:
    return " ".join([kernel, TYPES[dtype], f"head_dim={head_dim} groups={groups} page={page}", *on])


def _pages(dtype: torch.dtype, tile: int, head_dim: int, on: tuple[str, ...]) -> str:
    if "descriptors" in on:
        return f"tensordesc<{TYPES[dtype]}[1,1,{tile},{triton.next_power_of_2(head_dim)}]>"
    return f"*{TYPES[dtype]}"


def _decode(dtype: torch.dtype, head_dim: int, groups: int, page: int, on: tuple[str, ...]) -> Variant:
    config, block_d = decode_config(head_dim, dtype), triton.next_power_of_2(head_dim)
    tile, name = min(page, config.tile), TYPES[dtype]
    pages = _pages(dtype, tile, head_dim, on)
    types = f"*{name} {pages} {pages} *i32 *i32 *i32 *i32 *fp32 *fp32 *{name} fp32 fp32 i32 i32 i32" + 7 * " i32:16"
    constants = {
        "KV_HEADS": 8,
        "GROUPS": groups,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": 16,
        "PAGE": page,
        "TILE": tile,
        "HAS_WINDOW": "window" in on,
        "HAS_SOFTCAP": "softcap" in on,
        "DESCRIPTORS": "descriptors" in on,
        "DETERMINISTIC": "deterministic" in on,
        "MAX_SPLITS": 16,
        **merge_constants(groups, block_d),
    }
    name = _name("decode", dtype, head_dim, groups, page, on)
    return Variant(name, decode_kernel, types, constants, config.num_warps, config.num_stages)


def _prefill(dtype: torch.dtype, head_dim: int, groups: int, page: int, on: tuple[str, ...]) -> Variant:
    config = prefill_config(head_dim, dtype)
    tile, name = min(page, config.tile), TYPES[dtype]
    pages = _pages(dtype, tile, head_dim, on)
    types = f"*{name} {pages} {pages} *i32 *i32 *i32 *i32 *i32 *{name} fp32 fp32 i32 i32" + 7 * " i32:16"
    constants = {
        "GROUPS": groups,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": config.block_m,
        "PAGE": page,
        "TILE": tile,
        "HAS_WINDOW": "window" in on,
        "HAS_SOFTCAP": "softcap" in on,
        "DESCRIPTORS": "descriptors" in on,
    }
    name = _name("prefill", dtype, head_dim, groups, page, on)
    return Variant(name, prefill_kernel, types, constants, config.num_warps, config.num_stages)
