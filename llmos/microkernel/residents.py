"""Everybody who lives on one executor: running in rows, waiting in the queue, suspended; and the verbs that move them.

The scheduler plans steps over the residents; this file knows who is where and holds what. Invariants (`check`): every live sequence is
in exactly one of rows, queue, suspended, as its state says; its pages are counted once for its tenant; a row's columns agree with
its sequence.
"""

from __future__ import annotations

from llmos.codes import FinishReason, SeqState
from llmos.microkernel.fairqueue import FairQueue
from llmos.microkernel.holdings import Holdings
from llmos.microkernel.limits import SchedulerCounters, SchedulerLimits
from llmos.microkernel.pages import PagePool
from llmos.microkernel.prefix import PrefixCache
from llmos.microkernel.rows import RowTable
from llmos.microkernel.sequence import NO_ROW, Sequence
from llmos.microkernel.tenants import Tenant, TenantTable


class Residents:
    """Rows, pages and run queue of one executor generation. `tenants` outlives it."""

    def __init__(self, num_pages: int, page_size: int, limits: SchedulerLimits, tenants: TenantTable) -> None:
        self.page_size = page_size
        self.tenants = tenants
        self.prefix = PrefixCache(page_size)
        self.pool = PagePool(num_pages, self.prefix.evict)
        self.holdings = Holdings(self.pool, tenants)
        self.queue = FairQueue(limits.ageing_s)
        self.rows = RowTable(limits.max_rows, limits.client_window_tokens)
        self.suspended: dict[int, Sequence] = {}
        self.counters = SchedulerCounters()
        self.freed_rows: list[int] = []  # the executor has not been told yet

    def submit(self, seq: Sequence, now: float) -> None:
        """A new sequence waits."""
        tenant = self.tenants.get(seq.owner)
        self.tenants.arrive(tenant)
        self.queue.push(seq, tenant, now)

    def adopt(self, seq: Sequence, now: float) -> None:
        """A live sequence from the executor's last life: it holds neither row nor pages here."""
        if seq.state is SeqState.SUSPENDED:
            self.suspended[seq.rid] = seq
        else:
            self.submit(seq, now)

    def preempt(self, seq: Sequence, now: float) -> None:
        """Take row and pages away; the sequence waits at the front of the queue and is recomputed from its committed tokens."""
        seq.move(SeqState.PREEMPTED, now)
        tenant = self._take_row(seq)
        self.holdings.release(seq, tenant)
        tenant.waiting += 1
        seq.preemptions += 1
        self.counters.preemptions += 1
        self.queue.push_front(seq)

    def suspend(self, seq: Sequence, keep_pages: bool, now: float) -> None:
        """Off the machine until `resume`. Idempotent: a suspended sequence may still be told to give its pages back."""
        tenant = self.tenants.get(seq.owner)
        if seq.state is not SeqState.SUSPENDED:
            if seq.state is SeqState.RUNNING:
                seq.kept_tokens = int(self.rows.computed[seq.row])
                self._take_row(seq)
            else:
                self.queue.remove(seq)
                tenant.waiting -= 1
            seq.move(SeqState.SUSPENDED, now)
            seq.suspensions += 1
            self.suspended[seq.rid] = seq
        if keep_pages and seq.page_table:
            self.holdings.keep(seq)
        else:
            self.holdings.release(seq, tenant)

    def resume(self, seq: Sequence, now: float) -> None:
        """A suspended sequence waits for the machine again; no other state is changed."""
        if seq.state is SeqState.SUSPENDED:
            del self.suspended[seq.rid]
            seq.move(SeqState.WAITING, now)
            self.submit(seq, now)

    def renice(self, seq: Sequence, nice: int, now: float) -> None:
        """Change the priority of a live sequence. In the queue it starts anew in its class."""
        waits_in_class = seq.state in (SeqState.WAITING, SeqState.PREEMPTED) and not self.queue.is_preempted(seq)
        if waits_in_class:
            self.queue.remove(seq)
        seq.nice = nice
        if waits_in_class:
            self.queue.push(seq, self.tenants.get(seq.owner), now)

    def finish(self, seq: Sequence, reason: FinishReason, now: float) -> None:
        """End a sequence in any live state."""
        tenant = self.tenants.get(seq.owner)
        if seq.state is SeqState.RUNNING:
            self._take_row(seq)
        elif seq.state is SeqState.SUSPENDED:
            del self.suspended[seq.rid]
        else:
            self.queue.remove(seq)
            tenant.waiting -= 1
        self.holdings.release(seq, tenant)
        seq.move(SeqState.FINISHED, now)
        seq.reason = reason
        if seq.deadline is not None and now > seq.deadline:
            self.counters.deadline_misses += 1

    def _take_row(self, seq: Sequence) -> Tenant:
        seq.num_pending = int(self.rows.pending[seq.row])
        self.freed_rows.append(self.rows.free(seq))
        tenant = self.tenants.get(seq.owner)
        tenant.running -= 1
        return tenant

    def live(self) -> list[Sequence]:
        """All sequences of this model that have not ended."""
        return [*(seq for seq in self.rows.seqs if seq is not None), *self.queue, *self.suspended.values()]

    def check(self) -> None:
        """Assert the invariants of the whole scheduler; O(pages + sequences)."""
        self.pool.check()
        self.rows.check()
        held = [0] * self.pool.num_pages
        use = {tenant.name: [0, 0, 0] for tenant in self.tenants.all}
        for seq in self.live():
            for page in seq.page_table:
                held[page] += 1
            use[seq.owner][0] += len(seq.page_table)
            use[seq.owner][1] += seq.state is SeqState.RUNNING
            use[seq.owner][2] += seq.state in (SeqState.WAITING, SeqState.PREEMPTED)
            assert (seq.row != NO_ROW) == (seq.state is SeqState.RUNNING)
        assert self.pool.refs == held
        for tenant in self.tenants.all:
            assert use[tenant.name] == [tenant.pages, tenant.running, tenant.waiting], tenant
            assert tenant.running <= tenant.limits.max_running
        for row in self.rows.order.tolist():
            running = self.rows.seqs[row]
            assert running is not None
            assert self.rows.capacity[row] == len(running.page_table) * self.page_size
        keepers = {seq.rid for seq in self.live() if seq.row == NO_ROW and seq.page_table}
        assert keepers == {seq.rid for seq in self.holdings.keepers()}
