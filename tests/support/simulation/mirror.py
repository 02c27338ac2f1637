"""What plans must obey, seen from the executor: budgets, order, rates, whose content a page holds, which pages steps in flight touch.

A mirror lives as long as one generation of one model's executor. It follows plans when they are issued, the executor when it runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kernel_world import FakeExecutor

from llmos.microkernel.pages import Pages
from llmos.microkernel.scheduler import Scheduler
from llmos.protocol import messages as m
from llmos.protocol.codec import unpack_i32
from simulation.ledger import Known, Ledger
from simulation.setup import Setup
from simulation.takings import watch_takings

_ROUNDING = 1e-9


@dataclass(slots=True)
class _Row:
    known: Known
    pages: list[int]


@dataclass(slots=True)
class _Flight:
    """A step that was issued and is not done: the pages it may touch."""

    touched: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)  # by a copy
    rids: set[int] = field(default_factory=set)


class Mirror:
    """See the module docstring. `peer` is the executor's."""

    def __init__(
        self, setup: Setup, ledger: Ledger, executor: FakeExecutor, peer: int, model: str, scheduler: Scheduler
    ) -> None:
        self.setup = setup
        self.ledger = ledger
        self.executor = executor
        self.peer = peer
        self.model = model
        self.scheduler = scheduler
        self.flights: dict[int, _Flight] = {}
        self.last_step = 0
        self._rows: dict[int, _Row] = {}
        self._decode: list[int] = []
        self._writer: dict[int, str] = {}  # page -> whose tokens it holds
        self._host_writer: dict[int, str] = {}
        self._grants: list[tuple[int, int, tuple[int, ...]]] = []  # page, newest issued step, steps in flight
        self._watch_grants(scheduler)
        watch_takings(scheduler, setup.policy)

    def issued(self, plan: m.StepPlan, now: float, charged: dict[tuple[str, str], list[float]]) -> None:
        """A plan arrives. `charged`: (model, owner) -> [tokens, moment up to which its rate is used up]."""
        assert plan.generation == self.executor.generation
        assert plan.step == self.last_step + 1, "a step was left out"
        self.last_step = plan.step
        flight = self.flights[plan.step] = _Flight()
        assert len(self.flights) <= self.setup.steps_in_flight, "too many steps in flight"
        for row in unpack_i32(plan.row_frees):
            del self._rows[row]
        self._copied(plan, flight)
        for add in plan.row_adds:
            self._added(add, now)
        appends = unpack_i32(plan.page_appends)
        for row, page in zip(appends[0::3], appends[2::3]):
            self._rows[row].pages.append(page)
        assert len(self._rows) <= self.setup.max_rows
        if plan.decode is not None:
            self._decode = list(unpack_i32(plan.decode))
        prefill = unpack_i32(plan.prefill)
        lengths = [1] * len(self._decode) + list(prefill[2::4])
        rows = self._decode + list(prefill[0::4])
        assert len(set(rows)) == len(rows), "a row computes twice in one step"
        self._check_budget(sum(prefill[2::4]))
        self._charge(rows, lengths, now, charged)
        for row in rows:
            flight.rids.add(self._rows[row].known.rid)
            flight.touched.update(self._rows[row].pages)
            owner = self._rows[row].known.owner
            for page in self._rows[row].pages:
                self._writer.setdefault(page, owner)
        self._check_grants()

    @property
    def in_flight(self) -> set[int]:
        """Sequences that issued steps compute."""
        return {rid for flight in self.flights.values() for rid in flight.rids}

    def done(self, step: int) -> None:
        """The executor finished a step."""
        assert step == next(iter(self.flights))
        del self.flights[step]

    # ------------------------------------------------------------ rules

    def _check_budget(self, num_prefill: int) -> None:
        num_decodes, costs = len(self._decode), self.scheduler.residents.costs
        assert num_prefill + num_decodes <= self.setup.max_step_tokens, "over the token budget"
        if num_decodes and self.setup.target_step_s and costs.prefill_s:
            affordable = (self.setup.target_step_s - costs.decode_s) / costs.prefill_s
            assert num_prefill <= max(self.setup.page_size, affordable + _ROUNDING), "prompts make the step too long"

    def _charge(
        self, rows: list[int], lengths: list[int], now: float, charged: dict[tuple[str, str], list[float]]
    ) -> None:
        """No tenant gets tokens while it is over its rate; all it gets is counted."""
        total: dict[str, int] = {}
        for row, length in zip(rows, lengths):
            owner = self._rows[row].known.owner
            total[owner] = total.get(owner, 0) + length
        for owner, tokens in total.items():
            account, rate = charged.setdefault((self.model, owner), [0, 0.0]), self.ledger.limits_of(owner).tokens_per_s
            account[0] += tokens
            if rate:
                assert account[1] <= now + _ROUNDING, f"{owner} is over its rate"
                account[1] = max(account[1], now - 1.0) + tokens / rate

    def _added(self, add: m.RowAdd, now: float) -> None:
        known = self.ledger.by_rid[add.rid]
        assert add.row not in self._rows
        pages = list(unpack_i32(add.pages))
        num_kept = -(-add.num_computed // self.setup.page_size)
        if not self.setup.share_prefixes:
            foreign = [page for page in pages[:num_kept] if self._writer.get(page, known.owner) != known.owner]
            assert not foreign, f"{known.owner} was given pages with another tenant's tokens"
        for page in pages[num_kept:]:
            self._writer[page] = known.owner
        self._rows[add.row] = _Row(known, pages)
        known.move("prefill", now)
        known.row_tokens, known.started = len(add.tokens) // 4, True

    def _copied(self, plan: m.StepPlan, flight: _Flight) -> None:
        for blob, source, target in (
            (plan.swap_out, self._writer, self._host_writer),
            (plan.swap_in, self._host_writer, self._writer),
            (plan.copies, self._writer, self._writer),
        ):
            ids = unpack_i32(blob)
            moved = {to: source[page] for page, to in zip(ids[0::2], ids[1::2]) if page in source}
            for to in ids[1::2]:
                target.pop(to, None)
            target.update(moved)
        out, back, within = (unpack_i32(blob) for blob in (plan.swap_out, plan.swap_in, plan.copies))
        flight.read.update(out[0::2], within[0::2])
        flight.touched.update(out[0::2], back[1::2], within)

    # ------------------------------------------------------------ pages that are granted again

    def _watch_grants(self, scheduler: Scheduler) -> None:
        pool, grant, grant_array = scheduler.pool, scheduler.pool.grant, scheduler.pool.grant_array

        def note(pages: list[int]) -> None:
            flights = tuple(step.step for step in scheduler.in_flight)
            self._grants += [(page, scheduler.last_step, flights) for page in pages]
            for page in pages:
                self._writer.pop(page, None)

        def watched(count: int) -> list[int]:
            pages = grant(count)
            note(pages)
            return pages

        def watched_array(count: int) -> Pages:
            pages = grant_array(count)
            note(pages.tolist())
            return pages

        pool.grant, pool.grant_array = watched, watched_array

    def _check_grants(self) -> None:
        """A page is not granted as long as a step that was issued before may touch it, or the same plan still copies from it."""
        later = []
        for page, last_step, flights in self._grants:
            if last_step >= self.last_step:
                later.append((page, last_step, flights))  # for a plan that has not arrived yet
                continue
            for step in flights:
                flight = self.flights.get(step)
                assert flight is None or page not in flight.touched, f"page {page} granted while step {step} uses it"
            copied = self.flights[last_step + 1].read if last_step + 1 in self.flights else ()
            assert page not in copied, f"page {page} granted while a copy from it is ordered"
        self._grants = later
