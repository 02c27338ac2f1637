"""Everybody who lives on one executor: running in rows, waiting in the queue, blocked, suspended; and the verbs that move them.

The scheduler plans steps over the residents; this file knows who is where and holds what. Invariants (`check`): every live sequence is
in exactly one of rows, queue, blocked, suspended, as its state says; its tenant counts it there; a row's columns agree with its sequence.
"""

from __future__ import annotations

from llmos.codes import FinishReason, PageFate, SeqState
from llmos.microkernel.holdings import Holdings
from llmos.microkernel.host_pages import HostPool
from llmos.microkernel.indexing import Indexer
from llmos.microkernel.limits import SchedulerCounters, SchedulerLimits
from llmos.microkernel.pacing import Costs, WorkingSet
from llmos.microkernel.pages import PagePool
from llmos.microkernel.policy import POLICIES
from llmos.microkernel.prefix import PrefixCache
from llmos.microkernel.rows import RowTable
from llmos.microkernel.runqueue import RunQueue
from llmos.microkernel.sequence import NO_ROW, QUEUED, Sequence
from llmos.microkernel.tenants import Tenant, TenantTable
from llmos.microkernel.timeline import Cause
from llmos.protocol.messages import ExecutorReady


class Residents:
    """Rows, pages and run queue of one executor generation. `tenants` outlives it."""

    def __init__(self, executor: ExecutorReady, limits: SchedulerLimits, tenants: TenantTable) -> None:
        self.page_size = executor.page_size
        self.tenants = tenants
        self.policy = POLICIES[limits.policy]()
        self.prefix = PrefixCache(executor.page_size)
        self.pool = PagePool(executor.num_pages, self.prefix.evict)
        self.host = HostPool(executor.host_pages)
        self.holdings = Holdings(self.pool, self.host, tenants, executor.page_size)
        self.queue = RunQueue(self.policy, limits.ageing_s)
        self.rows = RowTable(limits.max_rows, limits.client_window_tokens)
        self.indexer = Indexer(self.rows, self.pool, self.prefix, limits)
        self.costs = Costs(executor.swap_us * 1e-6)
        self.working_set = WorkingSet(executor.num_pages, executor.page_size)
        self.blocked: dict[int, Sequence] = {}
        self.suspended: dict[int, Sequence] = {}
        self.counters = SchedulerCounters()
        self.freed_rows: list[int] = []  # the executor has not been told yet

    # ------------------------------------------------------------ coming and going

    def enter(self, seq: Sequence, now: float) -> None:
        """A live sequence without row and pages: a new one, or one from the executor's last life."""
        self.tenants.get(seq.owner)  # who holds something here is in the table
        if seq.state is SeqState.SUSPENDED:
            self.suspended[seq.rid] = seq
            return
        if seq.state is not SeqState.BLOCKED:
            seq.move(SeqState.BLOCKED, now)
        self.blocked[seq.rid] = seq
        self.wake(seq, now)

    def wake(self, seq: Sequence, now: float) -> None:
        """A blocked sequence waits for the machine, if it has work and nobody to wait for."""
        if seq.state is SeqState.BLOCKED and seq.has_work and not seq.held_back:
            del self.blocked[seq.rid]
            self._line_up(seq, now)

    def finish(self, seq: Sequence, reason: FinishReason, now: float) -> None:
        """End a sequence in any live state."""
        self._leave(seq, now)
        self.holdings.release(seq)
        if seq.heir_of is not None:
            seq.heir_of.heirs.remove(seq)
            seq.heir_of = None
        seq.move(SeqState.FINISHED, now)
        seq.reason, seq.ended_at = reason, now
        if seq.deadline is not None and now > seq.deadline:
            self.counters.deadline_misses += 1

    def rest(self, seq: Sequence, now: float) -> None:
        """An open sequence has computed its input, or is to get more; it keeps its pages while nobody needs them."""
        assert not seq.generating
        seq.wants_prefill = False
        self._block(seq, now)

    def end_turn(self, seq: Sequence, num_output: int, now: float) -> None:
        """An open sequence stops generating with its first `num_output` tokens."""
        self._block(seq, now)
        if seq.awaits_reader:
            self._stop_awaiting(seq, now)
        seq.end_turn(num_output)
        self.forget_cut(seq)

    def forget_cut(self, seq: Sequence) -> None:
        """Tokens of a sequence without a row were taken back: so is what was computed for them."""
        if seq.host_pages and seq.kept_tokens >= len(seq.tokens):
            self.holdings.release(seq)  # part of a host copy is not worth its own rules
        # Without the newest token, which is computed again: its page must not stay if it held more once, for others or the cache.
        seq.kept_tokens = min(seq.kept_tokens, len(seq.tokens) - 1)
        del seq.page_hashes[len(seq.tokens) // self.page_size :]
        self._keep_computed(seq)

    def settle(self, seq: Sequence, tenant: Tenant, shared: list[int], num_computed: int, now: float) -> None:
        """Waiting input turns out to be computed already: in what the sequence has, or in `shared` pages of the prefix cache."""
        self.holdings.share(seq, tenant, shared)
        if not seq.host_pages:
            seq.kept_tokens = num_computed
        self.rest(seq, now)
        if seq.page_table:
            self.holdings.keep(seq)

    def _block(self, seq: Sequence, now: float) -> None:
        if seq.state not in (SeqState.BLOCKED, SeqState.SUSPENDED):
            self._leave(seq, now)
            seq.move(SeqState.BLOCKED, now)
            self.blocked[seq.rid] = seq

    # ------------------------------------------------------------ preemption and suspension

    def preempt(self, seq: Sequence, now: float, *, drop: bool = False) -> None:
        """Take row and pages away; the sequence waits at the front of the queue. `drop`: what its pages hold is not to be trusted."""
        self._take_row(seq, index=not drop)
        self.bequeath(seq, now)
        fate = PageFate.DROP if drop else self._fate(seq)
        if fate is PageFate.SWAP:
            self.holdings.swap_out(seq)
            self.counters.swaps_out += 1
        else:
            self.holdings.release(seq)
        seq.move(SeqState.SWAPPED if fate is PageFate.SWAP else SeqState.PREEMPTED, now)
        self.tenants.get(seq.owner).waiting += 1
        seq.preemptions += 1
        self.counters.preemptions += 1
        self.working_set.preempted()
        self.queue.push_front(seq)

    def void(self, seq: Sequence) -> None:
        """What it computed is wrong, maybe for what its pages held: nobody may find those that it alone holds in the prefix cache."""
        for page in seq.page_table:
            if self.pool.refs[page] == 1:
                self.pool.forget(page)

    def distrust(self, seq: Sequence, now: float) -> None:
        """A token of it is missing, so what its pages hold behind the tokens it has is nobody's. It computes again what it needs."""
        if seq.state is SeqState.RUNNING:
            self.preempt(seq, now, drop=True)
        else:
            self.holdings.release(seq)

    def reclaim(self, spare: Sequence, tenant: Tenant, *, own_only: bool = False) -> bool:
        """Take the pages of who has kept them longest without a row; False if there is nobody."""
        keeper = self.holdings.oldest_keeper(spare, tenant, own_only=own_only)
        if keeper is None:
            return False
        if self._fate(keeper) is PageFate.SWAP:
            self.holdings.swap_out(keeper)
            self.counters.swaps_out += 1
        else:
            self.holdings.release(keeper)
        return True

    def yield_unread(self, tenant: Tenant | None, now: float, *, own_only: bool = False) -> bool:
        """Take the row of the oldest sequence whose reader is behind, so that its pages can be reclaimed; False if there is none.

        `tenant`: whose wish it is that pages become free; None = it is about the row.
        """
        for row in self.rows.order[self.rows.throttled[self.rows.order]].tolist():
            seq = self.rows.seqs[row]
            assert seq is not None
            if self.rows.pending[row] or self.rows.may_run_on(seq):
                continue  # not all that its reader has to read is there yet
            other = self.tenants.get(seq.owner)
            may_take = tenant in (None, other) or (not own_only and other.pages > other.limits.guaranteed_pages)
            if may_take:
                seq.awaits_reader = True
                self._block(seq, now)
                return True
        return False

    def note_read(self, seq: Sequence, now: float) -> None:
        """Its reader got on, or it has another one or none."""
        self.rows.read(seq)
        if seq.awaits_reader and self.rows.may_run_on(seq):
            self._stop_awaiting(seq, now)
            self.wake(seq, now)

    def _stop_awaiting(self, seq: Sequence, now: float) -> None:
        seq.awaits_reader = False
        if seq.state is SeqState.BLOCKED:
            seq.timeline.enter(Cause.BLOCKED, now)

    def suspend(self, seq: Sequence, pages: PageFate, now: float) -> None:
        """Off the machine until `resume`. Idempotent: a suspended sequence may still be told to give its pages back."""
        if seq.state is not SeqState.SUSPENDED:
            self._leave(seq, now)
            seq.move(SeqState.SUSPENDED, now)
            seq.suspensions += 1
            self.suspended[seq.rid] = seq
        if pages is PageFate.SWAP and seq.page_table:
            if self.holdings.pages_for(seq.kept_tokens) <= self.host.num_free:
                self.holdings.swap_out(seq)
                self.counters.swaps_out += 1
            else:
                self.holdings.release(seq)
        elif pages is PageFate.DROP:
            self.holdings.release(seq)

    def resume(self, seq: Sequence, now: float) -> None:
        """A suspended sequence goes on; no other state is changed."""
        if seq.state is SeqState.SUSPENDED:
            del self.suspended[seq.rid]
            seq.move(SeqState.BLOCKED, now)
            self.blocked[seq.rid] = seq
            self.wake(seq, now)

    def reorder(self, seq: Sequence, now: float) -> None:
        """Its nice value or deadline changed. In the queue it starts anew in its class."""
        if seq.state in QUEUED and not self.queue.is_preempted(seq):
            self.queue.remove(seq)
            self.queue.push(seq, self.tenants.get(seq.owner), now)

    def shorten(self, seq: Sequence, max_len: int) -> None:
        """A turn is to end earlier than it was told."""
        assert seq.generating
        assert len(seq.tokens) < max_len < seq.max_len
        seq.max_len = max_len
        if seq.row != NO_ROW:
            self.rows.max_len[seq.row] = max_len
            self.rows.version += 1

    def hold_back(self, seq: Sequence, now: float) -> None:
        """It is to wait for others now: out of the queue."""
        if seq.state in QUEUED and seq.held_back:
            self._block(seq, now)

    # ------------------------------------------------------------ fork

    def fork(self, parent: Sequence, child: Sequence, now: float) -> None:
        """A new sequence with the parent's tokens. It shares what is computed, and waits for what the parent computes just now."""
        child.page_hashes = parent.page_hashes.copy()
        if parent.state in (SeqState.RUNNING, *QUEUED) and self._computed(parent) < len(parent.tokens) - 1:
            parent.heirs.append(child)
            child.heir_of = parent
        else:
            self._inherit(parent, child)
        self.enter(child, now)

    def bequeath(self, parent: Sequence, now: float) -> None:
        """What its heirs waited for is computed by issued steps, or will not be computed by it."""
        heirs, parent.heirs = parent.heirs, []
        for child in heirs:
            child.heir_of = None
            if not child.page_table and not child.host_pages:
                self._inherit(parent, child)
            self.wake(child, now)

    def _inherit(self, parent: Sequence, child: Sequence) -> None:
        if parent.page_table:
            self.holdings.fork(parent, child, min(self._computed(parent), len(child.tokens) - 1))

    def _computed(self, seq: Sequence) -> int:
        return int(self.rows.computed[seq.row]) if seq.row != NO_ROW else seq.kept_tokens

    # ------------------------------------------------------------ helpers

    def _line_up(self, seq: Sequence, now: float) -> None:
        tenant = self.tenants.get(seq.owner)
        self.tenants.arrive(tenant)
        seq.move(SeqState.WAITING, now)
        seq.limited_from = tenant.limited_s(now)
        self.queue.push(seq, tenant, now)

    def leave_queue(self, seq: Sequence, now: float) -> None:
        """It gets a row, or does not want one any more."""
        self.queue.remove(seq)
        tenant = self.tenants.get(seq.owner)
        tenant.waiting -= 1
        if seq.state is SeqState.WAITING:
            seq.timeline.shift(tenant.limited_s(now) - seq.limited_from, Cause.QUEUE, Cause.QUOTA)

    def _leave(self, seq: Sequence, now: float) -> None:
        """Take a live sequence from where it is. It keeps its pages; its state is still to be changed."""
        if seq.state is SeqState.RUNNING:
            self._take_row(seq)
        elif seq.state is SeqState.SUSPENDED:
            del self.suspended[seq.rid]
        elif seq.state is SeqState.BLOCKED:
            del self.blocked[seq.rid]
        else:
            self.leave_queue(seq, now)
        self.bequeath(seq, now)

    def _take_row(self, seq: Sequence, *, index: bool = True) -> None:
        row = seq.row
        if index:
            self.indexer.leave(row)
        seq.num_pending = int(self.rows.pending[row])
        seq.kept_tokens = int(self.rows.computed[row])
        seq.job.tokens += seq.kept_tokens - int(self.rows.computed_at_start[row])
        if seq.encodes:
            seq.kept_tokens = 0  # its pages hold nothing: a text is computed in one piece
        self.freed_rows.append(self.rows.free(seq))
        self.tenants.get(seq.owner).running -= 1
        self._keep_computed(seq)

    def _keep_computed(self, seq: Sequence) -> None:
        if seq.page_table:
            self.holdings.trim(seq, seq.kept_tokens)
        if seq.page_table:
            self.holdings.keep(seq)
        else:
            self.holdings.unkeep(seq)

    def _fate(self, seq: Sequence) -> PageFate:
        pages = seq.page_table
        freed = sum(self.pool.refs[page] == 1 for page in pages) if self.host.num_pages else 0
        return self.costs.fate(seq.kept_tokens, len(pages), freed, self.host.num_free)

    def live(self) -> list[Sequence]:
        """All sequences of this model that have not ended."""
        running = (seq for seq in self.rows.seqs if seq is not None)
        return [*running, *self.queue, *self.blocked.values(), *self.suspended.values()]

    def check(self) -> None:
        """Assert the invariants of the whole scheduler; O(pages + sequences)."""
        live = self.live()
        self.holdings.check(live)
        self.rows.check()
        self.indexer.check()
        use = {tenant.name: [0, 0] for tenant in self.tenants.all}
        for seq in live:
            use[seq.owner][0] += seq.state is SeqState.RUNNING
            use[seq.owner][1] += seq.state in QUEUED
            assert (seq.row != NO_ROW) == (seq.state is SeqState.RUNNING)
            assert seq.has_work or seq.state in (SeqState.BLOCKED, SeqState.SUSPENDED)
            assert not (seq.held_back and seq.state in (SeqState.RUNNING, *QUEUED))
            assert all(heir.heir_of is seq for heir in seq.heirs)
            if not seq.generating:
                assert seq.is_open
                assert seq.max_len == len(seq.tokens)
        for tenant in self.tenants.all:
            assert use[tenant.name] == [tenant.running, tenant.waiting], tenant
        for row in self.rows.order.tolist():
            running = self.rows.seqs[row]
            assert running is not None
            assert self.rows.capacity[row] == len(running.page_table) * self.page_size
