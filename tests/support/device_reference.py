"""The CUDA backend on the CPU: reference operations, a queue for a stream, plain calls for graphs. For tests only."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from kernel_world import World

from llmos.config import ModelConfig
from llmos.protocol import messages as m
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
    embedding = backend.model.weights.embedding.clone()
    embedding[7] = float("nan")
    backend.model.weights.embedding = embedding
    return backend


class DeviceExecutor:
    """A backend in the place of `kernel_world.FakeExecutor`: plans are submitted as early as the window allows, before results are told."""

    def __init__(self, generation: int, backend: CudaBackend) -> None:
        self.generation, self.backend = generation, backend
        self.inbox: deque[m.StepPlan] = deque()
        self.most_ahead = 0
        self._num_submitted = 0

    def run_one(self) -> m.StepResult:
        while self._num_submitted < min(len(self.inbox), self.backend.window):
            self.backend.submit(self.inbox[self._num_submitted])
            self._num_submitted += 1
        self.most_ahead = max(self.most_ahead, self._num_submitted)
        output = self.backend.collect()
        plan = self.inbox.popleft()
        self._num_submitted -= 1
        return m.StepResult(self.generation, plan.step, output.samples, output.logprobs, output.failed, 10, 0)


class DeviceWorld(World):
    """The real microkernel over a backend with a small model."""

    def __init__(
        self, directory: Path, *, host_pages: int = 0, num_pages: int = 64, page_size: int = 8, **options
    ) -> None:
        super().__init__(num_pages, page_size, host_pages=host_pages, **options)
        rows, tokens = self.shape[2:4]
        gib = host_pages * 3 * 2 * 2 * page_size * 16 * 4 / 2**30 + 1e-9
        self.backend = open_device(
            directory, num_pages=num_pages, page_size=page_size, max_rows=rows, step_tokens=tokens,
            host_cache_gib=gib if host_pages else 0.0,
        )  # fmt: skip
        assert self.backend.capabilities.host_pages == host_pages
        self.vocab_size = self.backend.capabilities.vocab_size
        self.start_executor()

    def make_executor(self, generation: int) -> DeviceExecutor:
        self.backend.reset()
        return DeviceExecutor(generation, self.backend)
