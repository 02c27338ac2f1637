"""What computes steps: the interface between the service loop and its implementations. Imports no torch.

For models that generate there are `cuda.backend.CudaBackend`, `cpu.CpuBackend` and `fake.FakeBackend`, with the same row table, the same
checks and the same results' form, and for encoders `encoder.backend.EncoderBackend` and `encoder.fake.FakeEncoder`. What a model is, its
config.json says. A step is submitted, and collected when it is done; a device has work queued while the host does other things. Messages
and configuration are imported for their types only, so that a benchmark can drive a backend where no codec is installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmos.errors import ConfigError
from llmos.protocol import limits
from llmos.services.executor.encoder.spec import is_encoder

if TYPE_CHECKING:
    from llmos.config import ModelConfig
    from llmos.protocol.messages import RowLogprobs, RowResult, StepPlan

Tick = Callable[[], None]
OPENMP_SPINS = 1000
MAX_PAGES = limits.MAX_KV_PAGES
_PAGE_SIZE, _KV_CACHE_GIB = 16, 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets that configuration sets from above."""

    max_rows: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What was measured from below; goes into `ExecutorReady`, whose fields these are."""

    num_pages: int
    page_size: int
    max_rows: int
    max_step_tokens: int
    max_context: int
    vocab_size: int
    dtype: str
    device: str
    host_pages: int = 0
    swap_us: float = 0.0
    output_size: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The parts of a `StepResult` that the backend knows; `samples` and `failed` as on the wire."""

    samples: bytes
    logprobs: tuple[RowLogprobs, ...]
    failed: bytes
    results: tuple[RowResult, ...] = ()


class Backend(Protocol):
    """Executes plans, one after the other, in one thread. `window`: steps that may be submitted before the oldest is collected."""

    capabilities: Capabilities
    description: str
    window: int

    def submit(self, plan: StepPlan) -> None:
        """Apply a plan and begin its step, or keep it until it is collected. Asserts that the plan is possible."""
        ...

    def done(self, timeout_s: float) -> bool:
        """Can the oldest submitted step be collected without waiting? Waits for that, but not longer than `timeout_s`."""
        ...

    def collect(self) -> StepOutput:
        """The result of the oldest submitted step."""
        ...

    def reset(self) -> None:
        """Forget all rows and what was submitted: a new generation begins."""
        ...


class Immediate:
    """`submit`, `done` and `collect` for a backend that computes on the calling thread: the step is computed when it is collected."""

    window = 1
    _submitted: StepPlan | None = None

    def submit(self, plan: StepPlan) -> None:
        assert self._submitted is None, "one step at a time"
        self._submitted = plan

    def done(self, timeout_s: float) -> bool:
        return True

    def collect(self) -> StepOutput:
        plan, self._submitted = self._submitted, None
        assert plan is not None, "nothing was submitted"
        return self.execute(plan)

    def execute(self, plan: StepPlan) -> StepOutput:
        """One step, from its plan to its result."""
        raise NotImplementedError

    def forget_submitted(self) -> None:
        self._submitted = None


def open_backend(model: ModelConfig, directory: Path, limits: Limits, tick: Tick) -> Backend:
    """Load the model's backend; raises `ModelError`. `tick` is called often while it loads and computes."""
    encodes = is_encoder(directory)
    if model.backend == "fake" and encodes:
        from llmos.services.executor.encoder.fake import FakeEncoder

        return FakeEncoder.open(model, directory, limits)
    if model.backend == "fake":
        from llmos.services.executor.fake import FakeBackend

        return FakeBackend.open(model, directory, limits)
    limit_openmp_spinning()
    if encodes:
        from llmos.services.executor.encoder.backend import EncoderBackend

        return EncoderBackend.open(model, directory, limits, tick)
    if model.backend == "cuda" or (model.backend == "auto" and _has_gpu()):
        from llmos.services.executor.cuda.open import open_cuda

        return open_cuda(model, directory, limits, tick)
    from llmos.services.executor.cpu import CpuBackend  # imports torch, which the fake must never do

    return CpuBackend.open(model, directory, limits, tick)


def _has_gpu() -> bool:
    """Does torch find a GPU, and is the compiler of our kernels there?"""
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def with_defaults(model: ModelConfig) -> ModelConfig:
    """What 0 stands for where there is no GPU."""
    return dataclasses.replace(
        model, page_size=model.page_size or _PAGE_SIZE, kv_cache_gib=model.kv_cache_gib or _KV_CACHE_GIB
    )


def fitting_pages(key: str, gib: float, page_bytes: int) -> int:
    """Pages that the memory of a configuration key holds; `ConfigError` if that is none."""
    fitting = int(gib * 2**30) // page_bytes
    if fitting < 1:
        need = page_bytes / 2**30
        raise ConfigError(f"{key}: {gib} GiB holds no page; one page takes {need:.3g} GiB", field=key)
    return min(fitting, MAX_PAGES)


def limit_openmp_spinning() -> None:
    """Let torch's threads give their cores up soon after a parallel region; call it before torch is imported.

    libgomp's own default is to spin for milliseconds. Wherever another process wants a core, each of a step's ~100 regions
    then waits for the scheduler: steps took 2 to 6 times as long on 2 cores at a load of 4. A free box loses nothing.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(OPENMP_SPINS))
