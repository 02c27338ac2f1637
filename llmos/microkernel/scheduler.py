"""The step loop of one model: who computes how many tokens next, with which pages.

`schedule` makes one step, `complete` takes its result; up to `steps_in_flight` steps are issued ahead, so a result's tokens are
committed while the next step runs. Order inside a step, under one token budget: (1) running sequences that decode, oldest first,
growing their page tables; if the pool is full the newest running sequence is preempted and recomputed later; (2) running sequences
with prompt left (chunked prefill); (3) waiting sequences, first come first served, unless this step had to preempt.
A sequence is admitted only with pages for all its present tokens, so prefill never has to grow and can not deadlock.

Invariants: a row belongs to one running sequence; pages let go are not granted again before every step that could touch them is
done (pages.py); the oldest running sequence can always take one more step, because admission refused what the pool can not hold.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from llmos.codes import FinishReason, SeqState
from llmos.microkernel.commit import Outcome, commit_step
from llmos.microkernel.pages import PagePool
from llmos.microkernel.plan import InFlightStep, PlanBuilder
from llmos.microkernel.prefix import PrefixCache
from llmos.microkernel.rows import Ints, RowTable
from llmos.microkernel.runqueue import RunQueue
from llmos.microkernel.sequence import NO_ROW, Sequence
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Budgets from the configuration, already bounded by what the executor can do."""

    max_rows: int
    max_step_tokens: int
    steps_in_flight: int
    client_window_tokens: int
    prefix_cache: bool


@dataclass(slots=True)
class SchedulerCounters:
    steps: int = 0
    tokens_committed: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0


class Scheduler:
    """Owns rows, pages and the run queue of one executor generation."""

    def __init__(self, num_pages: int, page_size: int, vocab_size: int, limits: SchedulerLimits) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.limits = limits
        self.prefix = PrefixCache(page_size)
        self.pool = PagePool(num_pages, self.prefix.evict)
        self.queue = RunQueue()
        self.rows = RowTable(limits.max_rows, limits.client_window_tokens)
        self.in_flight: deque[InFlightStep] = deque()
        self.counters = SchedulerCounters()
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
        budget = self._plan_decodes(remaining, self.limits.max_step_tokens)
        if (remaining > 1).any():
            budget = self._plan_chunks(budget)
        if self.queue and preemptions == self.counters.preemptions:
            self._admit(budget, now)
        if not self._builder.has_work:
            return None
        return self._issue(generation)

    def _plan_decodes(self, remaining: Ints, budget: int) -> int:
        rows = self.rows
        decode = rows.order[(remaining == 1) & rows.readable(rows.order)][:budget]
        short = decode[rows.computed[decode] >= rows.capacity[decode]]
        if len(short):
            decode = self._grow(decode, short)
        rows.computed[decode] += 1
        rows.pending[decode] += 1
        self._builder.decode = decode
        return budget - len(decode)

    def _grow(self, decode: Ints, short: Ints) -> Ints:
        """One more page for each row of `short`, oldest first; returns the rows of `decode` that can run in this step."""
        skipped = set()
        for row in short.tolist():
            seq = self.rows.seqs[row]
            if seq is None:
                continue  # preempted for an older one
            if not self._make_room(seq):
                skipped.add(row)
                continue
            page = self.pool.grant(1)[0]
            self._builder.page_appends += (row, len(seq.page_table), page)
            seq.page_table.append(page)
            self.rows.capacity[row] += self.page_size
        return np.array([r for r in decode.tolist() if self.rows.seqs[r] is not None and r not in skipped], np.int64)

    def _make_room(self, seq: Sequence) -> bool:
        """Have one page available for `seq`, if need be by preempting the newest. False: `seq` does not run in this step."""
        while self.pool.available == 0:
            if self.pool.num_quarantined:
                return False  # pages come back when a step in flight is done
            victim = self.rows.seqs[int(self.rows.order[-1])]
            assert victim is not None
            self.preempt(victim)
            if victim is seq:
                return False
        return True

    def _plan_chunks(self, budget: int) -> int:
        order = self.rows.order
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

    def _admit(self, budget: int, now: float) -> None:
        while budget and self.rows.num_free and self.queue:
            seq = self.queue.peek()
            if seq.num_pending:
                return  # preempted while a step in flight samples its next token: that result comes first
            cached = self._match(seq)
            needed = -(-(len(seq.tokens) + 1) // self.page_size) - len(cached)
            # A page in reserve per running sequence, up to 1 % of the pool, so that admission does not cause preemption at once.
            reserve = min(len(self.rows), self.pool.num_pages // 100)
            if needed + reserve > self.pool.available - self.pool.num_cached_among(cached):
                return
            for page in cached:
                self.pool.share(page)
            self.queue.remove(seq)
            self._start(seq, cached + self.pool.grant(needed), len(cached) * self.page_size, now)
            budget -= self._plan_chunk(seq.row, len(seq.tokens) - len(cached) * self.page_size, budget)

    def _match(self, seq: Sequence) -> list[int]:
        """Cached pages for the beginning of `seq`; at least one token is left to compute."""
        if not self.limits.prefix_cache:
            return []
        usable = (len(seq.tokens) - 1) // self.page_size
        self.prefix.extend_keys(seq.page_hashes, seq.tokens, usable * self.page_size, seq.owner.encode())
        return self.prefix.match(seq.page_hashes[:usable])

    def _start(self, seq: Sequence, pages: list[int], num_cached: int, now: float) -> None:
        seq.move(SeqState.RUNNING)
        seq.page_table = pages
        row = self.rows.take(seq, num_cached, self.page_size)
        if seq.started_at is None:
            seq.started_at = now
            seq.cached_tokens = num_cached
            self.counters.prefix_hit_tokens += num_cached
            self.counters.prefix_query_tokens += seq.prompt_len
        self._builder.row_adds.append(
            RowAdd(
                row=row,
                rid=seq.rid,
                tokens=pack_i32(seq.tokens),
                prompt_len=seq.prompt_len,
                num_computed=num_cached,
                pages=pack_i32(pages),
                params=seq.params,
            )
        )

    def _issue(self, generation: int) -> StepPlan:
        """Turn the builder into a plan and remember what its result must look like."""
        builder, self._builder = self._builder, PlanBuilder()
        self.last_step += 1
        self.counters.steps += 1
        rows, stored = builder.decode, self.rows.computed[builder.decode]
        chunks = builder.last_chunks + builder.chunks
        if chunks:
            rows = np.concatenate([rows, np.array([row for row, _, _ in chunks], np.int64)])
            stored = np.concatenate([stored, np.array([start + count for _, start, count in chunks], np.int64)])
        epochs = self.rows.epoch[rows]
        last = self._last
        if last is not None and np.array_equal(last.rows, rows) and np.array_equal(last.epochs, epochs):
            seqs = last.seqs
        else:
            seqs = [seq for row in rows.tolist() if (seq := self.rows.seqs[row]) is not None]
        assert len(seqs) == len(rows), "a row was planned that nobody holds"
        step = InFlightStep(self.last_step, rows, epochs, stored, len(builder.chunks), seqs)
        self.in_flight.append(step)
        plan = builder.build(generation, step.step, self._last_decode)
        self._last, self._last_decode = step, builder.decode
        return plan

    # ------------------------------------------------------------ results

    def complete(self, samples: Ints, failed: Ints) -> Outcome:
        """The oldest step in flight is done. `samples`: int[n,3] (row, position, token), `failed`: int[n,2] (row, reason)."""
        step = self.in_flight.popleft()
        outcome = commit_step(self.rows, step, samples, failed, self.vocab_size)
        self.counters.tokens_committed += len(outcome.tokens)
        for seq in outcome.recompute:
            if seq.state is SeqState.RUNNING:
                self.preempt(seq)
        if self.limits.prefix_cache:
            self._index(step)
        self.pool.complete(step.step)
        return outcome

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

    # ------------------------------------------------------------ leaving

    def preempt(self, seq: Sequence) -> None:
        """Take row and pages away; the sequence waits at the front of the queue and is recomputed from its committed tokens."""
        seq.move(SeqState.PREEMPTED)
        self._take_row_and_pages(seq)
        seq.preemptions += 1
        self.counters.preemptions += 1
        self.queue.push_front(seq)

    def finish(self, seq: Sequence, reason: FinishReason, now: float) -> None:
        """End a sequence in any live state."""
        if seq.state is SeqState.RUNNING:
            self._take_row_and_pages(seq)
        else:
            self.queue.remove(seq)
        seq.move(SeqState.FINISHED)
        seq.reason = reason
        seq.finished_at = now

    def _take_row_and_pages(self, seq: Sequence) -> None:
        seq.num_pending = int(self.rows.pending[seq.row])
        self._builder.row_frees.append(self.rows.free(seq))
        self.pool.release(seq.page_table, self.last_step)
        seq.page_table = []
        if not self.in_flight:
            self.pool.complete(self.last_step)

    def live(self) -> list[Sequence]:
        """All sequences of this model that have not ended."""
        return [*(seq for seq in self.rows.seqs if seq is not None), *self.queue]

    def check(self) -> None:
        """Assert the invariants of the whole scheduler; O(pages + sequences)."""
        self.pool.check()
        self.rows.check()
        held = [0] * self.pool.num_pages
        for row in self.rows.order.tolist():
            seq = self.rows.seqs[row]
            assert seq is not None
            assert seq.state is SeqState.RUNNING
            assert self.rows.capacity[row] == len(seq.page_table) * self.page_size
            for page in seq.page_table:
                held[page] += 1
        assert self.pool.refs == held
        assert all(not seq.page_table and seq.row == NO_ROW for seq in self.queue)
