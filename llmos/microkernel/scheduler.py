"""The step loop of one model: who computes how many tokens next, with which pages.

`schedule` makes one step, `complete` takes its result; up to `steps_in_flight` steps are issued ahead, so a result's tokens are
committed while the next step runs. Order inside a step, under one token budget: (1) running sequences that decode, oldest first,
growing their page tables; if the pool is full the newest running sequence is preempted and recomputed later; (2) running sequences
with prompt left (chunked prefill); (3) waiting sequences in the order of fairqueue.py, unless this step had to preempt.
The victim of a preemption is, among tenants above their guarantee, the newest of the worst priority class. A sequence is admitted
only with pages for all its present tokens, so prefill never has to grow and can not deadlock.

Invariants: a row belongs to one running sequence; pages let go are not granted again before every step that could touch them is
done (pages.py); the oldest running sequence can always take one more step, because admission refused what the pool can not hold.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from llmos.codes import SeqState
from llmos.microkernel.commit import Outcome, commit_step
from llmos.microkernel.fairqueue import priority_class
from llmos.microkernel.limits import SchedulerLimits
from llmos.microkernel.plan import InFlightStep, PlanBuilder, equal
from llmos.microkernel.residents import Residents
from llmos.microkernel.rows import Ints
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import Tenant, TenantTable
from llmos.microkernel.timeline import Cause
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan


class _Start(Enum):
    """What became of the attempt to admit a sequence."""

    STARTED = 1
    NOT_NOW = 2  # its own or its tenant's affair: others may go first
    NO_PAGES = 3  # nobody goes before it: smaller ones must not starve it


class Scheduler:
    """Plans steps over the residents of one executor generation."""

    def __init__(
        self, num_pages: int, page_size: int, vocab_size: int, limits: SchedulerLimits, tenants: TenantTable
    ) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.limits = limits
        self.tenants = tenants
        self.residents = Residents(num_pages, page_size, limits, tenants)
        self.rows = self.residents.rows
        self.queue = self.residents.queue
        self.pool = self.residents.pool
        self.prefix = self.residents.prefix
        self.holdings = self.residents.holdings
        self.counters = self.residents.counters
        self.in_flight: deque[InFlightStep] = deque()
        self.last_step = 0
        self._builder = PlanBuilder()
        self._last: InFlightStep | None = None
        self._last_decode: Ints | None = None

    # ------------------------------------------------------------ planning

    def schedule(self, generation: int, now: float) -> StepPlan | None:
        """The next step, or None if there is nothing to compute or enough steps are in flight."""
        if len(self.in_flight) >= self.limits.steps_in_flight or not (len(self.rows) or self.queue):
            return None
        preemptions = self.counters.preemptions
        remaining = self.rows.remaining(self.rows.order)
        budget = self._plan_decodes(remaining, self.limits.max_step_tokens, now)
        if (remaining > 1).any():
            budget = self._plan_chunks(budget, now)
        if self.queue and preemptions == self.counters.preemptions:
            self.queue.age(now)
            self._admit(budget, now)
        if not self._builder.has_work:
            return None
        return self._issue(generation, now)

    def _plan_decodes(self, remaining: Ints, budget: int, now: float) -> int:
        rows = self.rows
        order = rows.order
        ready = remaining == 1
        behind = ready & ~rows.readable(order)
        if (behind != rows.throttled[order]).any():
            self._note_throttled(order, behind, now)
        ready &= ~behind
        if self.tenants.has_rates:
            ready &= self._within_rate(order, now)
        decode = order[ready][:budget]
        short = decode[rows.computed[decode] >= rows.capacity[decode]]
        if len(short):
            decode = self._grow(decode, short, now)
        rows.computed[decode] += 1
        rows.pending[decode] += 1
        self._builder.decode = decode
        return budget - len(decode)

    def _note_throttled(self, order: Ints, behind: NDArray[np.bool_], now: float) -> None:
        """Somebody fell behind or caught up: its time passes for another cause."""
        changed = behind != self.rows.throttled[order]
        for row in order[changed].tolist():
            seq = self.rows.seqs[row]
            assert seq is not None
            throttled = not self.rows.throttled[row]
            self.rows.throttled[row] = throttled
            seq.timeline.enter(Cause.CLIENT if throttled else Cause.DECODE, now)

    def _within_rate(self, rows: Ints, now: float) -> NDArray[np.bool_]:
        over = np.array([tenant.over_rate(now) for tenant in self.tenants.all], bool)
        within: NDArray[np.bool_] = ~over[self.rows.tenant[rows]]
        return within

    def _grow(self, decode: Ints, short: Ints, now: float) -> Ints:
        """One more page for each row of `short`, oldest first; returns the rows of `decode` that can run in this step."""
        skipped: set[int] = set()
        appends: list[tuple[int, int, int]] = []
        for row in short.tolist():
            seq = self.rows.seqs[row]
            if seq is None:
                continue  # preempted for another one
            tenant = self.tenants.get(seq.owner)
            if not self._make_room(seq, tenant, now):
                skipped.add(row)
                continue
            self.holdings.extend(seq, tenant, [], 1)
            appends.append((row, len(seq.page_table) - 1, seq.page_table[-1]))
            self.rows.capacity[row] += self.page_size
        for append in appends:
            if self.rows.seqs[append[0]] is not None:  # not preempted after it grew
                self._builder.page_appends += append
        kept = [row for row in decode.tolist() if self.rows.seqs[row] is not None and row not in skipped]
        return np.array(kept, np.int64)

    def _make_room(self, seq: Sequence, tenant: Tenant, now: float) -> bool:
        """Have one page grantable for `seq`, if need be by preempting. False: `seq` does not run in this step."""
        while True:
            over_quota = tenant.pages >= tenant.limits.max_pages
            if not over_quota and self.holdings.grantable(tenant) > 0:
                return True
            if not over_quota and self.pool.num_quarantined:
                return False  # pages come back when a step in flight is done
            if self.holdings.drop_oldest_keeper(seq, tenant, own_only=over_quota):
                continue
            victim = self._victim(tenant, own_only=over_quota)
            self.residents.preempt(victim, now)
            if victim is seq:
                return False

    def _victim(self, tenant: Tenant, *, own_only: bool) -> Sequence:
        """Whom to preempt so that `tenant` gets a page: never somebody within another tenant's guarantee."""
        candidates: list[Sequence] = []
        for row in self.rows.order.tolist():
            seq = self.rows.seqs[row]
            assert seq is not None
            other = self.tenants.get(seq.owner)
            if other is tenant or (not own_only and other.pages > other.limits.guaranteed_pages):
                candidates.append(seq)
        return max(candidates, key=lambda seq: (priority_class(seq.nice), seq.rid))

    def _plan_chunks(self, budget: int, now: float) -> int:
        order = self.rows.order
        if self.tenants.has_rates:
            order = order[self._within_rate(order, now)]
        remaining = self.rows.remaining(order)
        for row, left in zip(order[remaining > 1].tolist(), remaining[remaining > 1].tolist()):
            if budget == 0:
                break
            budget -= self._plan_chunk(row, left, budget)
        return budget

    def _plan_chunk(self, row: int, remaining: int, budget: int) -> int:
        """Compute up to `budget` of a row's `remaining` tokens; sample if that reaches its newest token."""
        count = min(remaining, budget)
        start = int(self.rows.computed[row])
        self.rows.computed[row] += count
        if count == remaining:
            self.rows.pending[row] += 1
            self._builder.last_chunks.append((row, start, count))
        else:
            self._builder.chunks.append((row, start, count))
        return count

    # ------------------------------------------------------------ admission

    def _admit(self, budget: int, now: float) -> None:
        while budget and self.rows.num_free and self.queue:
            for seq in self.queue.heads():
                start = self._try_start(seq, now)
                if start is not _Start.NOT_NOW:
                    break
            if start is not _Start.STARTED:
                return
            left = len(seq.tokens) - int(self.rows.computed[seq.row])
            budget -= self._plan_chunk(seq.row, left, budget)

    def _try_start(self, seq: Sequence, now: float) -> _Start:
        if seq.num_pending:
            # Its next token is on the way from a step that was in flight when it lost its row: that result comes first.
            return _Start.NO_PAGES if self.queue.is_preempted(seq) else _Start.NOT_NOW
        tenant = self.tenants.get(seq.owner)
        shared = [] if seq.page_table else self._match(seq)
        needed = -(-(len(seq.tokens) + 1) // self.page_size) - len(seq.page_table) - len(shared)
        if not tenant.may_start(needed + len(shared), now):
            return _Start.NOT_NOW
        # A page in reserve per running sequence, up to 1 % of the pool, so that admission does not cause preemption at once.
        reserve = min(len(self.rows), self.pool.num_pages // 100)
        while needed + reserve > self.holdings.grantable(tenant) - self.pool.num_cached_among(shared):
            if self.pool.num_quarantined or not self.holdings.drop_oldest_keeper(seq, tenant):
                return _Start.NO_PAGES
        num_computed = min(seq.kept_tokens, len(seq.tokens) - 1) if seq.page_table else len(shared) * self.page_size
        self.queue.remove(seq)
        self.holdings.unkeep(seq)
        self.holdings.extend(seq, tenant, shared, max(0, needed))
        self._start(seq, tenant, num_computed, now)
        return _Start.STARTED

    def _match(self, seq: Sequence) -> list[int]:
        """Cached pages for the beginning of `seq`; at least one token is left to compute."""
        if not self.limits.prefix_cache:
            return []
        usable = (len(seq.tokens) - 1) // self.page_size
        self.prefix.extend_keys(seq.page_hashes, seq.tokens, usable * self.page_size, seq.owner.encode())
        return self.prefix.match(seq.page_hashes[:usable])

    def _start(self, seq: Sequence, tenant: Tenant, num_computed: int, now: float) -> None:
        seq.move(SeqState.RUNNING, now)
        tenant.waiting -= 1
        tenant.running += 1
        row = self.rows.take(seq, num_computed, self.page_size, tenant.index)
        if seq.started_at is None:
            seq.started_at = now
            seq.cached_tokens = num_computed
            self.counters.prefix_hit_tokens += num_computed
            self.counters.prefix_query_tokens += seq.prompt_len
        self._builder.row_adds.append(
            RowAdd(
                row=row,
                rid=seq.rid,
                tokens=pack_i32(seq.tokens),
                prompt_len=seq.prompt_len,
                num_computed=num_computed,
                pages=pack_i32(seq.page_table),
                params=seq.params,
            )
        )

    def _issue(self, generation: int, now: float) -> StepPlan:
        """Turn the builder into a plan and remember what its result must look like."""
        builder, self._builder = self._builder, PlanBuilder()
        builder.row_frees, self.residents.freed_rows = self.residents.freed_rows, []
        self.last_step += 1
        self.holdings.last_step, self.holdings.idle = self.last_step, False
        self.counters.steps += 1
        rows, stored = builder.decode, self.rows.computed[builder.decode]
        counts = np.ones(len(rows), np.int64)
        chunks = builder.last_chunks + builder.chunks
        if chunks:
            chunk_rows, starts, lengths = np.array(chunks, np.int64).T
            rows = np.concatenate([rows, chunk_rows])
            stored = np.concatenate([stored, starts + lengths])
            counts = np.concatenate([counts, lengths])
        epochs = self.rows.epoch[rows]
        last = self._last
        if last is not None and equal(last.rows, rows) and equal(last.epochs, epochs):
            seqs, logs = last.seqs, last.logs
        else:
            seqs = [seq for row in rows.tolist() if (seq := self.rows.seqs[row]) is not None]
            logs = [seq.tokens for seq in seqs]
        assert len(seqs) == len(rows), "a row was planned that nobody holds"
        self.tenants.charge(self.rows.tenant[rows], counts, now)
        step = InFlightStep(self.last_step, rows, epochs, stored, len(builder.chunks), seqs, logs)
        self.in_flight.append(step)
        plan = builder.build(generation, step.step, self._last_decode)
        self._last, self._last_decode = step, builder.decode
        return plan

    # ------------------------------------------------------------ results

    def complete(self, samples: Ints, failed: Ints, now: float) -> Outcome:
        """The oldest step in flight is done. `samples`: int[n,3] (row, position, token), `failed`: int[n,2] (row, reason)."""
        step = self.in_flight.popleft()
        self.holdings.idle = not self.in_flight
        outcome = commit_step(self.rows, step, samples, failed, self.vocab_size)
        self.counters.tokens_committed += len(outcome.tokens)
        if not self.rows.decoding[step.rows].all():
            self._note_decoding(step, now)
        for seq in outcome.recompute:
            if seq.state is SeqState.RUNNING:
                self.residents.preempt(seq, now)
        if self.limits.prefix_cache:
            self._index(step)
        self.pool.complete(step.step)
        return outcome

    def _note_decoding(self, step: InFlightStep, now: float) -> None:
        """Rows that got their first token: their time passes for decode now."""
        rows = self.rows
        fresh = step.rows[~rows.decoding[step.rows] & (rows.epoch[step.rows] == step.epochs)]
        for row in fresh[rows.known[fresh] > rows.known_at_start[fresh]].tolist():
            rows.decoding[row] = True
            seq = rows.seqs[row]
            assert seq is not None
            seq.timeline.enter(Cause.DECODE, now)

    def _index(self, step: InFlightStep) -> None:
        """Tell the prefix cache of pages that became full of committed tokens."""
        rows, size = self.rows, self.page_size
        full = np.minimum(step.stored, rows.known[step.rows]) // size
        grown = (full > rows.indexed[step.rows]) & (rows.epoch[step.rows] == step.epochs)
        for place in np.flatnonzero(grown).tolist():
            seq, row, upto = step.seqs[place], int(step.rows[place]), int(full[place])
            self.prefix.extend_keys(seq.page_hashes, seq.tokens, upto * size, seq.owner.encode())
            for index in range(int(rows.indexed[row]), upto):
                if self.prefix.insert(seq.page_hashes[index], seq.page_table[index]):
                    self.pool.know(seq.page_table[index])
            rows.indexed[row] = upto
