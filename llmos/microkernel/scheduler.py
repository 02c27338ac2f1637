"""The step loop of one model: who computes how many tokens next, with which pages.

`schedule` makes one step, `complete` takes its result; up to `steps_in_flight` steps are issued ahead, so a result's tokens are
committed while the next step runs. Order inside a step, under one token budget: (1) running sequences that decode, oldest first,
growing their page tables; if the pool is full the newest running sequence is preempted and recomputed later; (2) running sequences
with prompt left (chunked prefill); (3) waiting sequences, first come first served, unless step (1) had to preempt.
A sequence is admitted only with pages for all its present tokens, so prefill never has to grow and can not deadlock.

Invariants: a row belongs to one running sequence; pages let go are not granted again before every step that could touch them is done
(pages.py); the oldest running sequence can always take one more step, because admission refused what the whole pool can not hold.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from dataclasses import dataclass
from operator import attrgetter

from llmos.codes import FinishReason, SeqState
from llmos.microkernel.pages import PagePool
from llmos.microkernel.plan import InFlightStep, PlanBuilder
from llmos.microkernel.prefix import PrefixCache
from llmos.microkernel.runqueue import RunQueue
from llmos.microkernel.sequence import NO_ROW, Sequence
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan

_by_rid = attrgetter("rid")


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


@dataclass(slots=True)
class Commit:
    """One token that became part of a sequence; `row` is where it was sampled."""

    seq: Sequence
    row: int
    token: int
    position: int
    reason: FinishReason | None


class Scheduler:
    """Owns rows, pages and the run queue of one executor generation."""

    def __init__(self, num_pages: int, page_size: int, vocab_size: int, limits: SchedulerLimits) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.limits = limits
        self.prefix = PrefixCache(page_size)
        self.pool = PagePool(num_pages, self.prefix.evict)
        self.queue = RunQueue()
        self.running: list[Sequence] = []  # by age
        self.in_flight: deque[InFlightStep] = deque()
        self.counters = SchedulerCounters()
        self.last_step = 0
        self._free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._builder = PlanBuilder()
        self._last_decode: list[int] | None = None

    # ------------------------------------------------------------ planning

    def schedule(self, generation: int, now: float) -> StepPlan | None:
        """The next step, or None if there is nothing to compute or enough steps are in flight."""
        if len(self.in_flight) >= self.limits.steps_in_flight or not (self.running or self.queue):
            return None
        step = InFlightStep(self.last_step + 1, now)
        budget = self.limits.max_step_tokens
        preemptions = self.counters.preemptions
        budget = self._plan_decodes(step, budget)
        budget = self._plan_chunks(step, budget)
        if preemptions == self.counters.preemptions:
            self._admit(step, budget, now)
        if not self._builder.has_work:
            return None
        self.last_step = step.step
        self.in_flight.append(step)
        self.counters.steps += 1
        builder, self._builder = self._builder, PlanBuilder()
        plan = builder.build(generation, step.step, self._last_decode)
        self._last_decode = builder.decode
        return plan

    def _plan_decodes(self, step: InFlightStep, budget: int) -> int:
        # A copy: preemption shortens the list behind the current sequence, never before it.
        for seq in self.running[:]:
            if budget == 0:
                break
            if seq.state is not SeqState.RUNNING or seq.remaining != 1 or self._throttled(seq):
                continue
            if self._grow(seq):
                self._plan_tokens(step, seq, 1)
                budget -= 1
        return budget

    def _plan_chunks(self, step: InFlightStep, budget: int) -> int:
        for seq in self.running:
            if budget == 0:
                break
            if seq.remaining > 1:
                count = min(seq.remaining, budget)
                self._plan_tokens(step, seq, count)
                budget -= count
        return budget

    def _throttled(self, seq: Sequence) -> bool:
        """Its client does not read: do not run further ahead of it."""
        return seq.num_output + seq.num_pending - seq.acked >= self.limits.client_window_tokens

    def _plan_tokens(self, step: InFlightStep, seq: Sequence, count: int) -> None:
        """Compute the next `count` tokens of a sequence; sample if that reaches its newest token."""
        start = seq.num_computed
        samples = count == seq.remaining
        newest = len(seq.tokens) + seq.num_pending
        seq.num_computed = start + count
        if samples and count == 1:
            self._builder.decode.append(seq.row)
        else:
            self._builder.prefill += (seq.row, start, count, int(samples))
        step.work.append((seq, seq.epoch, seq.num_computed))
        if samples:
            step.samples[seq.row] = (seq, newest)
            seq.num_pending += 1

    def _grow(self, seq: Sequence) -> bool:
        """Make room for one more token; may preempt newer sequences, or `seq` itself. False: not in this step."""
        if seq.num_computed < len(seq.page_table) * self.page_size:
            return True
        while self.pool.available == 0:
            if self.pool.num_quarantined:
                return False  # pages come back when a step in flight is done
            victim = self.running[-1]
            self.preempt(victim)
            if victim is seq:
                return False
        page = self.pool.grant(1)[0]
        self._builder.page_appends += (seq.row, len(seq.page_table), page)
        seq.page_table.append(page)
        return True

    def _admit(self, step: InFlightStep, budget: int, now: float) -> None:
        while budget and self._free_rows and self.queue:
            seq = self.queue.peek()
            if seq.num_pending:
                return  # preempted while a step in flight samples its next token: its result comes first
            cached = self._match(seq)
            needed = -(-(len(seq.tokens) + 1) // self.page_size) - len(cached)
            # One page in reserve per running sequence up to 1 % of the pool, so that admission does not cause preemption at once.
            reserve = min(len(self.running), self.pool.num_pages // 100)
            if needed + reserve > self.pool.available - self.pool.num_cached_among(cached):
                return
            for page in cached:
                self.pool.share(page)
            self.queue.remove(seq)
            self._start(seq, cached + self.pool.grant(needed), len(cached) * self.page_size, now)
            count = min(seq.remaining, budget)
            self._plan_tokens(step, seq, count)
            budget -= count

    def _match(self, seq: Sequence) -> list[int]:
        """Cached pages for the beginning of `seq`; at least one token is left to compute."""
        if not self.limits.prefix_cache:
            return []
        usable = (len(seq.tokens) - 1) // self.page_size
        self.prefix.extend_keys(seq.page_hashes, seq.tokens, usable * self.page_size, seq.owner.encode())
        return self.prefix.match(seq.page_hashes[:usable])

    def _start(self, seq: Sequence, pages: list[int], num_cached: int, now: float) -> None:
        seq.move(SeqState.RUNNING)
        seq.row = self._free_rows.pop()
        seq.page_table = pages
        seq.num_computed = seq.num_stored = num_cached
        seq.num_indexed_pages = num_cached // self.page_size
        if seq.started_at is None:
            seq.started_at = now
            seq.cached_tokens = num_cached
            self.counters.prefix_hit_tokens += num_cached
            self.counters.prefix_query_tokens += seq.prompt_len
        insort(self.running, seq, key=_by_rid)
        self._builder.row_adds.append(
            RowAdd(
                row=seq.row,
                rid=seq.rid,
                tokens=pack_i32(seq.tokens),
                prompt_len=seq.prompt_len,
                num_computed=num_cached,
                pages=pack_i32(pages),
                params=seq.params,
            )
        )

    # ------------------------------------------------------------ results

    def complete(self, samples: array[int], failed: array[int]) -> tuple[list[Commit], list[Sequence]]:
        """The oldest step in flight is done. `samples`: (row, position, token)*, `failed`: (row, reason)*.

        Returns committed tokens in the order of the samples, and sequences whose expected token did not come (to recompute).
        """
        step = self.in_flight.popleft()
        commits: list[Commit] = []
        for row, position, token in zip(samples[0::3], samples[1::3], samples[2::3]):
            seq, expected = step.samples.get(row, (None, -1))
            if seq is None or position != expected or not 0 <= token < self.vocab_size:
                continue  # counts as missing below
            if seq.state is not SeqState.FINISHED and position != len(seq.tokens):
                continue  # an earlier token of this sequence went missing
            del step.samples[row]
            seq.num_pending -= 1
            if seq.state is SeqState.FINISHED:
                continue  # it ended while this step was in flight
            seq.tokens.append(token)
            commits.append(Commit(seq, row, token, position, seq.ends_with(token)))
        self.counters.tokens_committed += len(commits)
        reasons = dict(zip(failed[0::2], failed[1::2]))
        missing = [self._fail(seq, reasons.get(row)) for row, (seq, _) in step.samples.items()]
        self._store(step)
        self.pool.complete(step.step)
        return commits, [seq for seq in missing if seq is not None]

    def _fail(self, seq: Sequence, reason: int | None) -> Sequence | None:
        """An expected sample did not come. A row that failed by itself is marked; any other is recomputed."""
        seq.num_pending -= 1
        if seq.state is SeqState.FINISHED:
            return None
        if reason is not None:
            seq.reason = FinishReason(reason)
        elif seq.state is SeqState.RUNNING:
            self.preempt(seq)
        return seq

    def _store(self, step: InFlightStep) -> None:
        """Note what is in pages now, and index pages that became full of committed tokens."""
        size = self.page_size
        for seq, epoch, stored in step.work:
            if seq.epoch != epoch or seq.state is not SeqState.RUNNING:
                continue
            seq.num_stored = stored
            full = min(stored, len(seq.tokens)) // size
            if full > seq.num_indexed_pages and self.limits.prefix_cache:
                self.prefix.extend_keys(seq.page_hashes, seq.tokens, full * size, seq.owner.encode())
                for index in range(seq.num_indexed_pages, full):
                    if self.prefix.insert(seq.page_hashes[index], seq.page_table[index]):
                        self.pool.know(seq.page_table[index])
                seq.num_indexed_pages = full

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
        self.running.remove(seq)
        self._builder.row_frees.append(seq.row)
        self._free_rows.append(seq.row)
        self.pool.release(seq.page_table, self.last_step)
        seq.row = NO_ROW
        seq.page_table = []
        seq.num_computed = seq.num_stored = seq.num_indexed_pages = 0
        seq.epoch += 1
        if not self.in_flight:
            self.pool.complete(self.last_step)

    def check(self) -> None:
        """Assert the invariants of the whole scheduler; O(pages + sequences)."""
        self.pool.check()
        held: dict[int, int] = {}
        rows = set()
        for seq in self.running:
            assert seq.state is SeqState.RUNNING
            rows.add(seq.row)
            assert seq.num_stored <= seq.num_computed <= len(seq.page_table) * self.page_size
            assert seq.num_computed <= len(seq.tokens) + seq.num_pending
            for page in seq.page_table:
                held[page] = held.get(page, 0) + 1
        assert len(rows) == len(self.running)
        assert not rows & set(self._free_rows)
        assert len(rows) + len(self._free_rows) == self.limits.max_rows
        assert all(self.pool.refs[page] == held.get(page, 0) for page in range(self.pool.num_pages))
        assert all(not seq.page_table and seq.row == NO_ROW for seq in self.queue)
