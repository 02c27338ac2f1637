"""One served model: its executor's generation and the scheduler for it.

States: down (no executor) -> up (ExecutorReady; new generation) -> down (executor lost). While up, results count only if they carry
the current generation and exactly the oldest step in flight; everything else is dropped and counted.
"""

from __future__ import annotations

import numpy as np

from llmos.errors import ProtocolError, Unavailable
from llmos.microkernel.commit import Outcome
from llmos.microkernel.rows import Ints
from llmos.microkernel.scheduler import Scheduler, SchedulerLimits
from llmos.microkernel.sequence import Sequence
from llmos.protocol.messages import ExecutorReady, LaneStatus, StepPlan, StepResult


class Lane:
    """See the module docstring. `limits` are the configured budgets; the executor's capacities bound them."""

    def __init__(self, model: str, limits: SchedulerLimits) -> None:
        self.model = model
        self.generation = 0
        self.executor: int | None = None  # peer
        self.capabilities: ExecutorReady | None = None
        self.scheduler: Scheduler | None = None
        self.results_dropped = 0
        self._limits = limits

    @property
    def ready(self) -> bool:
        return self.scheduler is not None

    def up(self) -> tuple[Scheduler, ExecutorReady]:
        """Scheduler and capabilities, or `Unavailable`."""
        if self.scheduler is None or self.capabilities is None:
            raise Unavailable(f"model {self.model!r} has no executor", field="model")
        return self.scheduler, self.capabilities

    def attach(self, peer: int, ready: ExecutorReady) -> None:
        """A new executor life: every page is free, every older result void. Live sequences wait to be recomputed."""
        survivors = self.detach()
        self.generation += 1
        self.executor = peer
        self.capabilities = ready
        limits = SchedulerLimits(
            max_rows=min(self._limits.max_rows, ready.max_rows),
            max_step_tokens=min(self._limits.max_step_tokens, ready.max_step_tokens),
            steps_in_flight=self._limits.steps_in_flight,
            client_window_tokens=self._limits.client_window_tokens,
            prefix_cache=self._limits.prefix_cache,
        )
        self.scheduler = Scheduler(ready.num_pages, ready.page_size, ready.vocab_size, limits)
        for seq in survivors:
            seq.page_hashes.clear()  # their page size may be another one now
            self.scheduler.queue.push(seq)

    def detach(self) -> list[Sequence]:
        """The executor is gone. Returns the live sequences, oldest first, without rows, pages or pending tokens."""
        old, self.scheduler, self.executor, self.capabilities = self.scheduler, None, None, None
        if old is None:
            return []
        old.in_flight.clear()
        for row in old.rows.order[::-1].tolist():
            seq = old.rows.seqs[row]
            assert seq is not None
            old.preempt(seq)
        for seq in old.queue:
            seq.num_pending = 0  # nothing comes any more
        return sorted(old.queue, key=lambda seq: seq.rid)

    def plan(self, now: float) -> StepPlan | None:
        return self.scheduler.schedule(self.generation, now) if self.scheduler is not None else None

    def take(self, result: StepResult) -> Outcome | None:
        """Commit a result; None if it is not exactly the next one."""
        scheduler = self.scheduler
        expected = scheduler.in_flight[0].step if scheduler is not None and scheduler.in_flight else None
        if scheduler is None or result.generation != self.generation or result.step != expected:
            self.results_dropped += 1
            return None
        return scheduler.complete(_matrix(result.samples, 3), _matrix(result.failed, 2))

    def status(self) -> LaneStatus:
        scheduler, ready = self.scheduler, self.capabilities
        if scheduler is None or ready is None:
            zeros = dict.fromkeys(_COUNTS, 0)
            return LaneStatus(
                model=self.model, generation=self.generation, ready=False, results_dropped=self.results_dropped,
                dtype="", device="", max_context=0, **zeros,
            )  # fmt: skip
        counters = scheduler.counters
        return LaneStatus(
            model=self.model,
            generation=self.generation,
            ready=True,
            page_size=ready.page_size,
            pages_total=ready.num_pages,
            pages_free=scheduler.pool.num_free,
            pages_cached=scheduler.pool.num_cached,
            waiting=len(scheduler.queue),
            running=len(scheduler.rows),
            steps=counters.steps,
            tokens_committed=counters.tokens_committed,
            preemptions=counters.preemptions,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            prefix_query_tokens=counters.prefix_query_tokens,
            results_dropped=self.results_dropped,
            dtype=ready.dtype,
            device=ready.device,
            max_context=ready.max_context,
        )


_COUNTS = (
    "page_size", "pages_total", "pages_free", "pages_cached", "waiting", "running", "steps", "tokens_committed", "preemptions",
    "prefix_hit_tokens", "prefix_query_tokens",
)  # fmt: skip


def _matrix(blob: bytes, columns: int) -> Ints:
    """An int32 blob of the wire as rows of `columns` integers."""
    if len(blob) % (4 * columns):
        raise ProtocolError(f"int32 blob of {len(blob)} bytes: not rows of {columns}", field="samples")
    return np.frombuffer(blob, "<i4").reshape(-1, columns).astype(np.int64)
