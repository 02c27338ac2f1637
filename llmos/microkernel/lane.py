"""One served model: its executor's generation and the scheduler for it.

States: down (no executor) -> up (ExecutorReady; new generation) -> lost (it died and will be replaced) -> up ... -> down. While up,
results count only if they carry the current generation and exactly the oldest step in flight; everything else is dropped and counted.
While lost, everything but steps goes on as if the replacement had the same capacities: sequences come, wait, are killed and forked.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmos.errors import InvalidRequest, ProtocolError, Unavailable
from llmos.microkernel.commit import Outcome
from llmos.microkernel.limits import SchedulerLimits
from llmos.microkernel.measures import Measures
from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.step_watch import StepWatch
from llmos.microkernel.tenants import Tenant, TenantLimits, TenantTable
from llmos.microkernel.trial import Trial
from llmos.protocol.messages import ExecutorReady, LaneStatus, StepPlan, StepResult

_COMPLAIN_EVERY_S = 5.0
_WRONG = "its results are wrong, again and again"


class Lane:
    """See the module docstring. `limits` are the configured budgets; the executor's capacities bound them. `generation`: generations
    are counted from here; two microkernels must not count from the same number, or late plans of one could pass for the other's."""

    def __init__(
        self, model: str, limits: SchedulerLimits, limits_of: Callable[[str], TenantLimits], generation: int
    ) -> None:
        self.model = model
        self.tenants = TenantTable(limits_of)
        self.trial = Trial()
        self.measures = Measures()
        self.generation = generation
        self.executor: int | None = None  # peer
        self.executor_pid = 0  # 0: not known
        self.capabilities: ExecutorReady | None = None
        self.scheduler: Scheduler | None = None
        self.results_dropped = 0
        self.doubt: str | None = None  # why this executor should go
        self._is_condemned = False  # it must: it is given nothing more, and nothing it says counts
        self._complained_at = 0.0
        self._watch = StepWatch()
        self._limits = limits

    @property
    def ready(self) -> bool:
        return self.executor is not None

    def up(self) -> tuple[Scheduler, ExecutorReady]:
        """Scheduler and capabilities, or `Unavailable` unless there is or will be an executor."""
        if self.scheduler is None or self.capabilities is None:
            raise Unavailable(f"model {self.model!r} has no executor", field="model")
        return self.scheduler, self.capabilities

    def attach(self, peer: int, ready: ExecutorReady, now: float, pid: int = 0) -> None:
        """A new executor life: every page is free, every older result void. Live sequences wait to be recomputed."""
        if self.executor is not None:
            self._note_wrong("it registers again and again", now)
        self.generation += 1
        # Who waits for it lines up only once: with thousands in the queue the second time would be a tenth of a second of the pause.
        is_expected = self.executor is None and self.scheduler is not None and ready == self.capabilities
        self.executor, self.executor_pid = peer, pid
        if not is_expected:
            self._renew(ready, now)

    def expect(self, ready: ExecutorReady, now: float) -> None:
        """An executor with these capacities served before the microkernel died, and will register again."""
        self._renew(ready, now)

    def lose(self, now: float, *, to_blame: bool = True) -> Sequence | None:
        """The executor ended and will be replaced. Returns the sequence that killed it, if that is certain now. `to_blame`: was it what
        ran there? Else it was asked to end."""
        convicted = None
        if self.scheduler is not None and self.executor is not None and to_blame:
            in_flight = {seq.rid: seq for step in self.scheduler.in_flight for seq in step.seqs}
            convicted = self.trial.executor_died(in_flight.values())
        self.executor = None
        self._trust()
        if self.capabilities is not None:
            self._renew(self.capabilities, now)
        return convicted

    def give_up(self, now: float) -> list[Sequence]:
        """No executor any more. Returns the live sequences, oldest first, without rows, pages or pending tokens."""
        survivors = self._clear(now)
        self.scheduler, self.executor, self.capabilities = None, None, None
        self._trust()
        return survivors

    def _renew(self, ready: ExecutorReady, now: float) -> None:
        """A fresh scheduler for these capacities, with everybody who lives here."""
        survivors = self._clear(now)
        self.capabilities = ready
        limits = replace(
            self._limits,
            max_rows=min(self._limits.max_rows, ready.max_rows),
            max_step_tokens=min(self._limits.max_step_tokens, ready.max_step_tokens),
            prefix_cache=self._limits.prefix_cache and not ready.output_size,  # an encoder's pages hold nothing
        )
        old, self.scheduler = self.scheduler, Scheduler(ready, limits, self.tenants, self.trial, self.measures)
        if old is not None:
            self.scheduler.residents.counters = self.scheduler.counters = old.counters
        for seq in survivors:
            self.scheduler.residents.enter(seq, now)

    def _clear(self, now: float) -> list[Sequence]:
        old = self.scheduler
        if old is None:
            return []
        old.in_flight.clear()
        for row in old.rows.order[::-1].tolist():
            seq = old.rows.seqs[row]
            assert seq is not None
            old.residents.preempt(seq, now, drop=True)
        survivors = sorted(old.residents.live(), key=lambda seq: seq.rid)
        for seq in survivors:
            seq.page_table, seq.host_pages, seq.kept_tokens = array("i"), array("i"), 0
            seq.num_pending = seq.num_void = 0  # nothing comes any more
            seq.heir_of = None
            seq.heirs.clear()
            seq.page_hashes.clear()  # the next executor's page size may be another one
        self.tenants.reset()
        return survivors

    def plan(self, now: float) -> StepPlan | None:
        """The next step, if there is an executor that can take one."""
        if self.scheduler is None or self.executor is None or self._is_condemned:
            return None
        plan = self.scheduler.schedule(self.generation, now)
        if plan is not None and len(self.scheduler.in_flight) == 1:
            self._watch.begun(now)
        return plan

    def take(self, result: StepResult, now: float) -> Outcome | None:
        """Commit a result; None if it is not exactly the next one."""
        scheduler = self.scheduler
        expected = scheduler.in_flight[0].step if scheduler is not None and scheduler.in_flight else None
        is_old = result.generation != self.generation  # left over from before one of us began anew: nobody's fault
        if scheduler is None or self._is_condemned or is_old or result.step != expected:
            self.results_dropped += 1
            if not is_old:
                self._note_wrong(_WRONG, now)
            return None
        try:
            failed = _matrix(result.failed, 2) if result.failed else _NOBODY
            samples = _matrix(result.samples, 3)
        except ProtocolError:
            self._note_wrong(_WRONG, now)
            raise
        step = scheduler.in_flight[0]
        self._watch.done(step.num_decodes, step.num_prefill, now)
        outcome = scheduler.complete(samples, failed, max(0, result.busy_us) * 1e-6, now, result.results)
        if outcome.recompute and not len(failed):
            self._note_wrong(_WRONG, now)
        return outcome

    def overdue(self, now: float) -> str | None:
        """What the executor must be killed for, each time that somebody should be told. To be asked all the time."""
        if self.executor is None or self.scheduler is None:
            return None
        if self.doubt is None and self.scheduler.in_flight:
            step = self.scheduler.in_flight[0]
            if self._watch.is_overdue(step.num_decodes, step.num_prefill, now):
                limit = self._watch.limit(step.num_decodes, step.num_prefill)
                self.doubt = f"step {step.step} ({step.num_decodes} decodes, {step.num_prefill} prompt tokens) takes over {limit:.1f} s"
        if self.doubt is None or (self._is_condemned and now < self._complained_at + _COMPLAIN_EVERY_S):
            return None
        self._is_condemned, self._complained_at = True, now
        return self.doubt

    def _note_wrong(self, what: str, now: float) -> None:
        if self._watch.wrong(now) and self.doubt is None:
            self.doubt = what

    def _trust(self) -> None:
        """Whoever comes next has done nothing wrong yet."""
        self.doubt, self._is_condemned = None, False
        self._watch.renew()

    def check_tenant(self, name: str, limits: TenantLimits) -> None:
        """Raise `InvalidRequest` if a new limit of a tenant contradicts what lives here now."""
        if self.capabilities is None or self.scheduler is None:
            return
        tenant = self.tenants.get(name)
        others = self.tenants.guaranteed_to_others(tenant)
        total = self.capabilities.num_pages
        guarantees_more = limits.guaranteed_pages > tenant.limits.guaranteed_pages
        if guarantees_more and limits.guaranteed_pages + others > total:
            text = f"guarantees of {limits.guaranteed_pages + others} pages together, {self.model} has {total}"
            raise InvalidRequest(text, field="guaranteed_pages")
        for field, used in (("max_running", tenant.running), ("max_pages", tenant.pages)):
            if getattr(limits, field) < min(used, getattr(tenant.limits, field)):
                raise InvalidRequest(
                    f"{field} {getattr(limits, field)} is below the {used} in use by {name}", field=field
                )
        if not guarantees_more and limits.max_pages >= tenant.limits.max_pages:
            return  # nobody gets less
        size = self.capabilities.page_size
        for seq in self.scheduler.residents.live():
            mine = seq.owner == name
            most = (
                min(limits.max_pages, total - others) if mine else total - self._guaranteed_to_others(seq, name, limits)
            )
            if -(-seq.max_len // size) > most:
                field = "max_pages" if mine else "guaranteed_pages"
                raise InvalidRequest(
                    f"sequence {seq.rid} may need {-(-seq.max_len // size)} pages, {most} would be left", field=field
                )

    def _guaranteed_to_others(self, seq: Sequence, name: str, limits: TenantLimits) -> int:
        changed = self.tenants.get(name)
        others = self.tenants.guaranteed_to_others(self.tenants.get(seq.owner))
        return others - changed.limits.guaranteed_pages + limits.guaranteed_pages

    def pages_for(self, tenant: Tenant) -> int:
        """Pages that a sequence of this tenant can ever have."""
        _, executor = self.up()
        return min(tenant.limits.max_pages, executor.num_pages - self.tenants.guaranteed_to_others(tenant))

    def capacity(self, owner: str) -> int:
        """Tokens that a sequence of this owner can ever have."""
        _, executor = self.up()
        return min(executor.max_context, self.pages_for(self.tenants.get(owner)) * executor.page_size)

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
            ready=self.ready,
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
            host_pages_total=ready.host_pages,
            host_pages_free=scheduler.residents.host.num_free,
            blocked=len(scheduler.residents.blocked),
            suspended=len(scheduler.residents.suspended),
            swaps_out=counters.swaps_out,
            swaps_in=counters.swaps_in,
            pages_copied=counters.pages_copied,
            deadline_misses=counters.deadline_misses,
        )


_COUNTS = (
    "page_size", "pages_total", "pages_free", "pages_cached", "waiting", "running", "steps", "tokens_committed", "preemptions",
    "prefix_hit_tokens", "prefix_query_tokens",
)  # fmt: skip


_NOBODY: NDArray[np.int32] = np.zeros((0, 2), np.int32)


def _matrix(blob: bytes, columns: int) -> NDArray[np.int32]:
    """An int32 blob of the wire as rows of `columns` integers."""
    if len(blob) % (4 * columns):
        raise ProtocolError(f"int32 blob of {len(blob)} bytes: not rows of {columns}", field="samples")
    return np.frombuffer(blob, "<i4").reshape(-1, columns)
