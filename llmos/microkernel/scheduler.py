"""The step loop of one model: who computes how many tokens next, with which pages.

`schedule` makes one step, `complete` takes its result; up to `steps_in_flight` steps are issued ahead, so a result's tokens are
committed while the next step runs. Order inside a step, under one token budget: (1) running sequences that decode, oldest first,
growing their page tables; if the pool is full a running sequence is preempted (policy.py says which) and goes on later; (2) running
sequences with prompt left (chunked prefill); (3) waiting sequences (intake.py), unless this step had to preempt. Beside decodes,
(2) and (3) get only as many tokens as keep the step short (pacing.py). A step that only repeats the decodes of the one before takes the
fast path (steady.py), which plans the same.

Invariants: a row belongs to one running sequence; pages let go are not granted again before every step that could touch them is
done (pages.py); the oldest running sequence can always take one more step, because admission refused what the pool can not hold.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from llmos.codes import SeqState
from llmos.microkernel.commit import Outcome, commit_step
from llmos.microkernel.growth import Growth
from llmos.microkernel.intake import Intake
from llmos.microkernel.limits import SchedulerLimits
from llmos.microkernel.measures import Measures
from llmos.microkernel.plan import Copies, InFlightStep, PlanBuilder, equal
from llmos.microkernel.residents import Residents
from llmos.microkernel.results import lacks_result, take_results
from llmos.microkernel.rows import Ints
from llmos.microkernel.sequence import PREFILL_ONLY, Sequence
from llmos.microkernel.steady import Steady
from llmos.microkernel.tenants import TenantTable
from llmos.microkernel.timeline import Cause
from llmos.microkernel.trial import Trial
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import ExecutorReady, RowAdd, RowResult, StepPlan
from llmos.protocol.params import SamplingParams

_EARLIEST_RETRY_S, _LATEST_RETRY_S = 0.1, 30.0


class Scheduler:
    """Plans steps over the residents of one executor generation."""

    def __init__(
        self, executor: ExecutorReady, limits: SchedulerLimits, tenants: TenantTable, trial: Trial, measures: Measures
    ) -> None:
        self.page_size = executor.page_size
        self.vocab_size = executor.vocab_size
        self.output_size = executor.output_size
        self.limits = limits
        self.tenants = tenants
        self.residents = Residents(executor, limits, tenants)
        self.trial = trial
        self.measures = measures
        self.intake = Intake(self.residents, limits, trial)
        self.rows = self.residents.rows
        self.queue = self.residents.queue
        self.pool = self.residents.pool
        self.prefix = self.residents.prefix
        self.holdings = self.residents.holdings
        self.indexer = self.residents.indexer
        self.growth = Growth(self.residents)
        self.counters = self.residents.counters
        self.in_flight: deque[InFlightStep] = deque()
        self.last_step = 0
        self._builder = PlanBuilder()
        self._bequests: list[Sequence] = []  # what their heirs wait for is in the plan that is being made
        self._last: InFlightStep | None = None
        self._last_decode: Ints | None = None
        self._steady: Steady | None = None

    # ------------------------------------------------------------ planning

    def schedule(self, generation: int, now: float) -> StepPlan | None:
        """The next step, or None if there is nothing to compute or enough steps are in flight."""
        if len(self.in_flight) >= self.limits.steps_in_flight:
            return None
        if not (len(self.rows) or self.queue or self.holdings.copies):
            return None
        if self._steady is not None:
            plan = self._go_on(self._steady, generation, now)
            if plan is not None:
                return plan
        preemptions = self.counters.preemptions
        order = self.rows.order
        remaining, samples = self.rows.remaining(order)
        budget = self._plan_decodes((remaining == 1) & samples, now)
        budget = self._prefill_budget(budget, len(self._builder.decode))
        if (remaining > samples).any():
            budget = self._plan_chunks(budget, now)
        if self.trial.is_on:
            self.trial.note_progress()
        if preemptions == self.counters.preemptions:
            self._admit(budget, now)
            while self.trial.is_on and not (self._builder.has_work or self.holdings.copies or self.in_flight):
                self.trial.let_out()
                self._admit(budget, now)
        if not (self._builder.has_work or self.holdings.copies):
            return None
        return self._issue(generation, now)

    def _go_on(self, steady: Steady, generation: int, now: float) -> StepPlan | None:
        """The fast path: the same rows decode again, and the best of the queue may join. None, and nothing has changed, if it is over."""
        over_rate = self.tenants.has_rates and any(tenant.over_rate(now) for tenant, _ in steady.charges)
        appends = None if over_rate or self.trial.is_on else steady.plan(self.rows, self.growth)
        if appends is None:
            self._steady = None
            return None
        if self.queue or self.holdings.copies:
            builder, decodes = self._builder, len(steady.rows)
            self._admit(self._prefill_budget(self.limits.max_step_tokens - decodes, decodes), now)
            if builder.has_work or self.holdings.copies or self.residents.freed_rows:
                self._steady = None
                builder.decode, builder.page_appends = steady.rows, appends
                return self._issue(generation, now)
        self.counters.steady_steps += 1
        self.tenants.charge(steady.charges, now)
        self._note_issued(steady.issued(self.last_step + 1))
        return StepPlan(generation, self.last_step, b"", (), appends, b"", None)

    def _plan_decodes(self, ready: NDArray[np.bool_], now: float) -> int:
        rows = self.rows
        order = rows.order
        behind = ready & ~rows.readable(order)
        if (behind != rows.throttled[order]).any():
            self._note_throttled(order, behind, now)
        ready &= ~behind
        if self.tenants.has_rates:
            ready &= self._within_rate(order, now)
        decode = order[ready][: self.limits.max_step_tokens]
        short = decode[rows.computed[decode] >= rows.capacity[decode]]
        if len(short):
            decode, self._builder.page_appends = self.growth.grow(decode, short, now)
        rows.computed[decode] += 1
        rows.pending[decode] += 1
        self._builder.decode = decode
        return self.limits.max_step_tokens - len(decode)

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

    def _plan_chunks(self, budget: int, now: float) -> int:
        order = self.rows.order
        if self.tenants.has_rates:
            order = order[self._within_rate(order, now)]
        remaining, samples = self.rows.remaining(order)
        for place in np.flatnonzero(remaining > samples).tolist():
            if budget == 0:
                break
            budget -= self._plan_chunk(int(order[place]), int(remaining[place]), bool(samples[place]), budget)
        return budget

    def _plan_chunk(self, row: int, remaining: int, samples: bool, budget: int) -> int:
        """Compute up to `budget` of a row's `remaining` tokens; if that reaches its newest token and it `samples`, sample.

        Not if its client is too far behind: then the newest token stays for later. So 0 tokens may be left to compute now.
        """
        count = min(remaining, budget)
        start = int(self.rows.computed[row])
        if samples and count == remaining and not self.rows.readable(np.array([row]))[0]:
            samples, count = False, count - 1
        self.rows.computed[row] += count
        if samples and count == remaining:
            self.rows.pending[row] += 1
            self._builder.last_chunks.append((row, start, count))
        elif count:
            self._builder.chunks.append((row, start, count))
        seq = self.rows.seqs[row]
        assert seq is not None
        if seq.heirs and start + count >= len(seq.tokens) - 1:
            self._bequests.append(seq)
        return count

    def _prefill_budget(self, budget: int, decodes: int) -> int:
        return self.residents.costs.prefill_budget(budget, decodes, self.limits.target_step_s, self.page_size)

    def _admit(self, budget: int, now: float) -> None:
        if self.queue:
            self.queue.age(now)
        while budget > 0 and self.queue:
            if not self.rows.num_free and not self.residents.yield_unread(None, now):
                return
            seq = self.intake.next(now, budget)
            if seq is None:
                return
            if seq.has_work:  # not if its input was computed already
                self._start(seq, now)
                left = len(seq.tokens) - (not seq.generating) - seq.kept_tokens
                share = left if seq.encodes else budget
                budget -= self._plan_chunk(seq.row, left, seq.generating and not seq.silent, share)

    def _start(self, seq: Sequence, now: float) -> None:
        """Give a sequence that has its pages a row."""
        seq.move(SeqState.RUNNING, now)
        tenant = self.tenants.get(seq.owner)
        tenant.running += 1
        row = self.rows.take(seq, seq.kept_tokens, self.page_size, tenant.index)
        if seq.started_at is None:
            seq.started_at = now
            self.measures.queue.add(now - seq.turn_at)
            seq.cached_tokens = min(seq.kept_tokens, seq.prompt_len)  # a fork has more
            self.counters.prefix_hit_tokens += seq.cached_tokens
            self.counters.prefix_query_tokens += seq.prompt_len
        self._builder.row_adds.append(
            RowAdd(
                row=row,
                rid=seq.rid,
                tokens=pack_i32(seq.tokens),
                prompt_len=seq.prompt_len,
                num_computed=seq.kept_tokens,
                pages=pack_i32(seq.page_table),
                params=_row_params(seq),
                second_at=seq.second_at,
            )
        )

    def _issue(self, generation: int, now: float) -> StepPlan:
        """Turn the builder into a plan and remember what its result must look like."""
        builder = self._builder
        rows, stored = builder.decode, self.rows.computed[builder.decode]
        counts = None
        num_prefill = 0
        chunks = builder.last_chunks + builder.chunks
        if chunks:
            chunk_rows, starts, lengths = np.array(chunks, np.int64).T
            rows = np.concatenate([rows, chunk_rows])
            stored = np.concatenate([stored, starts + lengths])
            counts = np.concatenate([np.ones(len(builder.decode), np.int64), lengths])
            num_prefill = int(lengths.sum())
        epochs = self.rows.epoch[rows]
        last = self._last
        repeats = last is not None and equal(last.rows, rows) and equal(last.epochs, epochs)
        if last is not None and repeats:
            seqs, logs = last.seqs, last.logs
        else:
            seqs = [seq for row in rows.tolist() if (seq := self.rows.seqs[row]) is not None]
            logs = [seq.tokens for seq in seqs]
        assert len(seqs) == len(rows), "a row was planned that nobody holds"
        self.tenants.charge(self.tenants.counts(self.rows.tenant[rows], counts), now)
        step = InFlightStep(
            self.last_step + 1, rows, epochs, stored, len(builder.chunks), seqs, logs, len(builder.decode), num_prefill
        )
        if repeats and not chunks and not self.trial.is_on:
            self._steady = Steady.begin(self.rows, step, self.page_size, self.tenants, self.growth)
        self._note_issued(step)
        builder.row_frees, self.residents.freed_rows = self.residents.freed_rows, []
        copies, self.holdings.copies = self.holdings.copies, Copies()
        plan = builder.build(generation, step.step, self._last_decode, copies)
        self._last_decode, self._builder = builder.decode, PlanBuilder()
        bequests, self._bequests = self._bequests, []
        for seq in bequests:
            self.residents.bequeath(seq, now)
        return plan

    def _note_issued(self, step: InFlightStep) -> None:
        self.residents.host.settle()
        self.residents.working_set.step()
        self.last_step = self.holdings.last_step = step.step
        self.holdings.idle = False
        self.counters.steps += 1
        self.in_flight.append(step)
        self._last = step

    def least_time(self, num_prompt: int, num_output: int) -> float:
        """Seconds that a sequence's steps alone take, as far as measured."""
        return (num_output + num_prompt // self.limits.max_step_tokens) * self.residents.costs.step_s

    def next_end_s(self) -> float:
        """A guess at when the next sequence ends, at the measured step time: seconds, neither at once nor in an hour."""
        rows, order = self.rows, self.rows.order
        left = int((rows.max_len[order] - rows.known[order]).min()) if len(order) else 0
        return min(_LATEST_RETRY_S, max(_EARLIEST_RETRY_S, left * self.residents.costs.step_s))

    # ------------------------------------------------------------ results

    def complete(
        self,
        samples: NDArray[np.int32],
        failed: NDArray[np.int32],
        busy_s: float,
        now: float,
        results: tuple[RowResult, ...] = (),
    ) -> Outcome:
        """The oldest step in flight is done. `samples`: int[n,3] (row, position, token), `failed`: int[n,2] (row, reason)."""
        step = self.in_flight.popleft()
        self.residents.costs.note(busy_s, step.num_decodes, step.num_prefill)
        self.holdings.idle = not self.in_flight
        self.measures.step_done(busy_s, step.num_decodes, now, goes_on=bool(self.in_flight))
        outcome = commit_step(self.rows, step, samples, failed, self.vocab_size)
        if step.num_prefill:
            take_results(self.rows, step, results, failed, self.output_size, outcome)
        self.counters.tokens_committed += len(outcome.tokens)
        if outcome.batches is None:
            self._look_after(step, outcome, now)
        if self.trial.is_watching:
            self.trial.note_progress()
        self.pool.complete(step.step)
        return outcome

    def _look_after(self, step: InFlightStep, outcome: Outcome, now: float) -> None:
        """What a result that was not foreseen can mean for a sequence, besides its end."""
        if not self.rows.decoding[step.rows].all():
            self._note_decoding(step, now)
        for seq in outcome.recompute:
            self.residents.distrust(seq, now)
        for seq in outcome.bad:
            self.residents.void(seq)
            self.residents.distrust(seq, now)
        self.indexer.chunks_done(step)
        if step.num_silent:
            self._rest_prefilled(step, now)

    def _note_decoding(self, step: InFlightStep, now: float) -> None:
        """Rows that got their first token: their time passes for decode now."""
        rows = self.rows
        fresh = step.rows[~rows.decoding[step.rows] & (rows.epoch[step.rows] == step.epochs)]
        for row in fresh[rows.known[fresh] > rows.known_at_start[fresh]].tolist():
            rows.decoding[row] = True
            seq = rows.seqs[row]
            assert seq is not None
            seq.timeline.enter(Cause.DECODE, now)
            if rows.known_at_start[row] == seq.prompt_len:
                self.measures.first_token.add(now - seq.turn_at)

    def _rest_prefilled(self, step: InFlightStep, now: float) -> None:
        """Open sequences whose input is computed now, up to the newest token, leave their rows."""
        rows = self.rows
        first = len(step.rows) - step.num_silent
        for row, epoch, seq in zip(step.rows[first:].tolist(), step.epochs[first:].tolist(), step.seqs[first:]):
            if rows.epoch[row] == epoch and not seq.generating and rows.computed[row] >= len(seq.tokens) - 1:
                self.residents.rest(seq, now)

    def check(self) -> None:
        """Assert the invariants; O(pages + sequences)."""
        self.residents.check()
        if self._steady is not None:
            self._steady.check(self.rows)


def _row_params(seq: Sequence) -> SamplingParams:
    """What the executor is told: nothing that it need not compute again."""
    if not seq.generating:
        return PREFILL_ONLY
    if seq.params.prompt_logprobs is not None and not lacks_result(seq):
        return structs.replace(seq.params, prompt_logprobs=None)
    return seq.params
