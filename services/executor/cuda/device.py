"""The one place that knows whether there is a GPU: streams, events, graphs, pinned memory, the memory that is free.

On a GPU work is queued on one stream in the order of `run`, and a `Mark` is an event on it. On a CPU `run` keeps the work in a queue too,
and it is done when somebody waits for a mark: so a test meets what a GPU would do to host code that touches a buffer too early, or counts
on a result that is not there yet. Captured work is a CUDA graph on a GPU and the function itself on a CPU.

An error that the CUDA driver reports is sticky: the context is of no further use. `fatal_errors` ends the process, which is then replaced.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmos.errors import ConfigError

log = logging.getLogger(__name__)

BROKEN_EXIT = 70
Work = Callable[[], object]


class Device:
    """`name`: "cuda", "cuda:1" or "cpu"."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.is_cuda = self.device.type == "cuda"
        if self.is_cuda and not torch.cuda.is_available():
            raise ConfigError("backend: cuda, but torch finds no GPU", field="backend")
        self._queue: deque[Work | Mark] = deque()
        self._stream: Any = torch.cuda.Stream(self.device) if self.is_cuda else None
        self._pool: Any = torch.cuda.graph_pool_handle() if self.is_cuda else None

    @property
    def description(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"

    def run(self, work: Work) -> None:
        """Queue work; it must not read anything on the host."""
        if self.is_cuda:
            with self.stream():
                work()
        else:
            self._queue.append(work)

    def mark(self) -> Mark:
        """Where the queue ends now."""
        if self.is_cuda:
            event = torch.cuda.Event()
            event.record(self._stream)
            return Mark(event, None)
        mark = Mark(None, self)
        self._queue.append(mark)
        return mark

    def work_until(self, mark: Mark) -> None:
        """CPU only: do what is queued before `mark`."""
        while not mark.reached:
            item = self._queue.popleft()
            if isinstance(item, Mark):
                item.reached = True
            else:
                item()

    def finish(self) -> None:
        """Wait until all is done."""
        self.mark().wait()

    def capture(self, work: Work) -> Work:
        """`work` as something that costs one launch to do again. `work` must have run before; capturing does not run it."""
        if not self.is_cuda:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay  # type: ignore[no-any-return]

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Everything inside is allocated and queued on this device's stream."""
        return torch.cuda.stream(self._stream) if self.is_cuda else contextlib.nullcontext()

    def settle(self) -> None:
        """Wait for work on all streams: what others queued (a loader, a constructor) is not ordered before ours."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        self.finish()

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        with self.stream():
            return torch.zeros(shape, dtype=dtype, device=self.device)

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to by itself."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.is_cuda)

    def free_bytes(self) -> int:
        """Memory of the device that nobody uses; what torch keeps for later counts as free."""
        assert self.is_cuda, "on a CPU the budget is configured"
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])


class Mark:
    """A place in the queue of a device."""

    def __init__(self, event: Any, device: Device | None) -> None:
        self._event = event
        self._device = device
        self.reached = False

    def done(self) -> bool:
        """Is everything before it done? On a CPU waiting is what does it, so it always can be."""
        return True if self._event is None else bool(self._event.query())

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
        else:
            assert self._device is not None
            self._device.work_until(self)


@contextlib.contextmanager
def fatal_errors() -> Iterator[None]:
    """End the process at an error of the device: nothing that it computes from now on could be trusted."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        _give_up(error)
    except RuntimeError as error:
        if "CUDA" not in str(error) and type(error).__name__ != "AcceleratorError":
            raise
        _give_up(error)


def _give_up(error: BaseException) -> None:
    log.critical("the device failed, this process ends: %s", error)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(BROKEN_EXIT)
