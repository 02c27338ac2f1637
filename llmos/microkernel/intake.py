"""From the queue into rows: who starts now, with which pages.

A sequence starts only with pages for all its present tokens, so prefill never has to grow and can not deadlock. It begins with what it
kept, with what was swapped out, or with what the prefix cache has. If pages are short, those that are kept without a row give way; what
runs is never preempted for a start. A sequence that still does not fit blocks the queue: smaller ones must not starve it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from llmos.microkernel.limits import SchedulerLimits
from llmos.microkernel.residents import Residents
from llmos.microkernel.results import lacks_result
from llmos.microkernel.sequence import QUEUED, Sequence
from llmos.microkernel.tenants import Tenant
from llmos.microkernel.trial import Trial


class Start(Enum):
    """What became of the attempt to start a sequence."""

    STARTED = 1
    NOT_NOW = 2  # its own or its tenant's affair: others may go first
    NO_PAGES = 3  # nobody goes before it, but within a guarantee


@dataclass(frozen=True, slots=True)
class _Need:
    """What a start takes. `shared`: pages of the prefix cache. `fresh`: pages to grant, one of them for a copy if `copy` is the place
    of a page to copy; `taken` leave what is grantable, `charged` count for the tenant. `num_computed` tokens need not be computed."""

    shared: list[int]
    num_computed: int
    copy: int | None
    fresh: int
    taken: int
    charged: int


class Intake:
    """Starts sequences of one model."""

    def __init__(self, residents: Residents, limits: SchedulerLimits, trial: Trial) -> None:
        self.residents = residents
        self.limits = limits
        self.trial = trial

    def next(self, now: float, budget: int) -> Sequence | None:
        """Try the waiting sequences in order until one starts, or nobody can. A row must be free. `budget`: tokens left in this step."""
        blocked = False
        for seq in self._candidates():
            if blocked and not self._is_guaranteed(seq):
                continue
            start = self._try(seq, now, budget)
            if start is Start.STARTED:
                return seq
            blocked |= start is Start.NO_PAGES
            if blocked and not self.residents.tenants.has_guarantees:
                break
        return None

    def _candidates(self) -> Iterator[Sequence]:
        """While sequences are on trial for killing executors, nobody else may be in flight with them."""
        if self.trial.is_on:
            return (seq for seq in self.trial.members() if seq.state in QUEUED)
        return self.residents.queue.heads()

    def _is_guaranteed(self, seq: Sequence) -> bool:
        """Would it start within its tenant's guarantee? Then nobody who waits for pages is in its way."""
        tenant = self.residents.tenants.get(seq.owner)
        if not tenant.limits.guaranteed_pages:
            return False
        return tenant.pages + self._need(seq, self._match(seq)).charged <= tenant.limits.guaranteed_pages

    def _try(self, seq: Sequence, now: float, budget: int) -> Start:
        residents = self.residents
        if seq.encodes and budget < min(len(seq.tokens), self.limits.max_step_tokens):
            return Start.NO_PAGES  # the whole text in one step, or one that is too long for that in a step of its own
        if seq.num_pending:
            # Its next token is on the way from a step that was in flight when it lost its row: that result comes first.
            return Start.NO_PAGES if residents.queue.is_preempted(seq) else Start.NOT_NOW
        tenant = residents.tenants.get(seq.owner)
        if not seq.generating:
            need = self._need(seq, self._match(seq))
            if need.num_computed >= len(seq.tokens) - 1:
                if self._may_share(tenant, need.shared):
                    residents.settle(seq, tenant, need.shared, need.num_computed, now)
                else:
                    residents.rest(seq, now)  # its next turn will find it, or compute it
                return Start.STARTED
        if not tenant.may_start(now):
            tenant.note_limited(True, now)
            return Start.NOT_NOW
        found = self._find_room(seq, tenant, now)
        tenant.note_limited(found is Start.NOT_NOW, now)
        if isinstance(found, Start):
            return found
        self._take_pages(seq, tenant, found, now)
        return Start.STARTED

    def _find_room(self, seq: Sequence, tenant: Tenant, now: float) -> _Need | Start:
        """Make room, if need be at the expense of who keeps pages without a row."""
        residents = self.residents
        shared = self._match(seq)
        while True:
            running = residents.working_set.reserve(residents.rows)  # less if one of them had to yield
            need = self._need(seq, shared)
            over_quota = tenant.pages + need.charged > tenant.limits.max_pages
            # Within its guarantee a tenant need not care for what the others' sequences may grow by.
            reserve = 0 if tenant.pages + need.charged <= tenant.limits.guaranteed_pages else running
            if not over_quota and need.taken + reserve <= residents.holdings.grantable(tenant):
                return need
            if not over_quota and residents.pool.num_quarantined:
                return Start.NO_PAGES  # pages come back when a step in flight is done
            if residents.reclaim(seq, tenant, own_only=over_quota):
                continue
            if residents.yield_unread(tenant, now, own_only=over_quota):
                continue
            if need.copy is None:
                return Start.NOT_NOW if over_quota else Start.NO_PAGES
            residents.holdings.release(seq)  # without its pages it needs no copy: they are computed again
            shared = self._match(seq)

    def _match(self, seq: Sequence) -> list[int]:
        """Cached pages for the beginning of a sequence that has none of its own; at least one token is left to compute. None if what is
        computed is asked for beside the tokens: then it has to be."""
        if seq.page_table or seq.host_pages or not self.limits.prefix_cache or lacks_result(seq):
            return []
        residents = self.residents
        usable = (len(seq.tokens) - 1) // residents.page_size
        salt = residents.indexer.salt(seq)
        residents.prefix.extend_keys(seq.page_hashes, seq.tokens, usable * residents.page_size, salt)
        return residents.prefix.match(seq.page_hashes[:usable])

    def _may_share(self, tenant: Tenant, shared: list[int]) -> bool:
        """May the tenant have these cached pages, by its quota and the others' guarantees?"""
        residents = self.residents
        unheld = sum(not residents.pool.refs[page] for page in shared)
        within_quota = tenant.pages + unheld <= tenant.limits.max_pages
        return not unheld or (
            within_quota and residents.pool.num_cached_among(shared) <= residents.holdings.grantable(tenant)
        )

    def _need(self, seq: Sequence, shared: list[int]) -> _Need:
        residents = self.residents
        kept = len(shared) * residents.page_size if shared else seq.kept_tokens
        num_computed = min(kept, len(seq.tokens) - 1)
        copy = residents.holdings.tail_to_copy(seq, num_computed)
        # One token more than it has, so that the first token it generates has a place.
        pages = residents.holdings.pages_for(len(seq.tokens) + (seq.generating and not seq.silent))
        fresh = max(0, pages - len(seq.page_table) - len(shared)) + (copy is not None)
        unheld = sum(not residents.pool.refs[page] for page in shared)
        taken = fresh + residents.pool.num_cached_among(shared)
        return _Need(shared, num_computed, copy, fresh, taken, fresh + unheld)

    def _take_pages(self, seq: Sequence, tenant: Tenant, need: _Need, now: float) -> None:
        residents, holdings = self.residents, self.residents.holdings
        residents.leave_queue(seq, now)
        holdings.unkeep(seq)
        holdings.share(seq, tenant, need.shared)
        if need.copy is not None:
            holdings.copy_tail(seq, tenant, need.copy)
            residents.counters.pages_copied += 1
        else:
            holdings.own_tail(seq, need.num_computed)
        holdings.extend(seq, tenant, need.fresh - (need.copy is not None))
        if seq.host_pages:
            holdings.swap_in(seq)
            residents.counters.swaps_in += 1
        seq.kept_tokens = need.num_computed
