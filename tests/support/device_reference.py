"""The CUDA backend on the CPU: reference operations, a queue for a stream, plain calls for graphs. For tests only."""

from __future__ import annotations

from pathlib import Path

from llmos.config import ModelConfig
from llmos.services.executor.backend import Limits
from llmos.services.executor.cuda.backend import CudaBackend
from llmos.services.executor.cuda.open import open_cuda


def open_device(
    directory: Path, *, page_size: int = 8, num_pages: int = 256, max_rows: int = 32, step_tokens: int = 512, **changes
) -> CudaBackend:
    config = ModelConfig(name="m", backend="cuda", page_size=page_size, num_pages=num_pages, **changes)
    return open_cuda(config, directory, Limits(max_rows, step_tokens), lambda: None, device_name="cpu")


def open_poisoned_device(directory: Path) -> CudaBackend:
    """A model whose token 7 has an embedding of NaN."""
    backend = open_device(directory, num_pages=16)
    backend.model._weights.embedding[7] = float("nan")
    return backend
