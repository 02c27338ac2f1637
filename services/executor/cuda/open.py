"""From a model directory to a serving `CudaBackend`: weights to the device, then work space, then all memory that is left as KV pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmos.errors import ConfigError
from llmos.services.executor.backend import Limits, Tick
from llmos.services.executor.cuda.backend import CudaBackend, check_limits
from llmos.services.executor.cuda.device import Device
from llmos.services.executor.cuda.kv_pool import KVPool, fitting, page_bytes
from llmos.services.executor.cuda.products import DeviceLinear
from llmos.services.executor.cuda.workspace import Workspace
from llmos.services.executor.models.decoder import Decoder
from llmos.services.executor.spec import ModelSpec, limit_context, read_spec

if TYPE_CHECKING:
    from llmos.config import ModelConfig

PAGE_SIZE = 64
_CPU_KV_GIB = 1.0
# Kept free beside the KV cache: the row table (with room for prompts), CUDA graphs, and what libraries allocate when they are first used.
_MARGIN_BYTES = 1 << 30


def open_cuda(
    model: ModelConfig, directory: Path, limits: Limits, tick: Tick, *, device_name: str = "cuda"
) -> CudaBackend:
    """Load a model; raises `ModelError`, or `ConfigError` for settings that it can not have. On the device "cpu" this is for tests."""
    from llmos.services.executor.loader import (
        load_decoder,
    )  # reads safetensors, which a benchmark with random weights need not have

    device = Device(device_name)
    spec = read_spec(directory)
    dtype = "bfloat16" if model.dtype == "auto" and device.is_cuda else model.dtype
    max_context = limit_context(spec, model.max_context)
    with device.stream():
        weights, _ = load_decoder(directory, spec, dtype, DeviceLinear, tick, device=str(device.device))
        backend = build(model, device, weights, limits, max_context)
    backend.warm_up(tick)
    return backend


def build(model: ModelConfig, device: Device, weights: Decoder, limits: Limits, max_context: int) -> CudaBackend:
    """A backend around weights that are on the device."""
    check_limits(limits)
    spec, dtype, page_size = weights.spec, weights.embedding.dtype, model.page_size or PAGE_SIZE
    try:
        work = Workspace(device, spec, limits.max_step_tokens, limits.max_rows, dtype)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"max_step_tokens, max_rows: their work space does not fit: {error}") from None
    each = page_bytes(spec, page_size, dtype)
    host_pages = fitting("host_cache_gib", model.host_cache_gib * 2**30, each) if model.host_cache_gib else 0
    num_pages = model.num_pages or _fitting_pages(model, device, spec, limits, max_context, each)
    pool = KVPool(device, spec, num_pages, page_size, dtype, host_pages)
    return CudaBackend(device, weights, pool, work, max_context, limits, deterministic=model.deterministic)


def _fitting_pages(
    model: ModelConfig, device: Device, spec: ModelSpec, limits: Limits, max_context: int, each: int
) -> int:
    """As many pages as configured, else as many as the share of the free memory that is ours holds."""
    if model.kv_cache_gib or not device.is_cuda:
        return fitting("kv_cache_gib", (model.kv_cache_gib or _CPU_KV_GIB) * 2**30, each)
    tables = 4 * limits.max_rows * (2 * max_context + 4096) + 4 * max_context * spec.head_dim
    sampling = 12 * limits.max_rows * spec.vocab_size
    return fitting("memory_share", model.memory_share * device.free_bytes() - tables - sampling - _MARGIN_BYTES, each)
