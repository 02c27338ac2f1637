"""Whose pages are taken when somebody needs some: watched where the scheduler asks for it.

Rules: keepers (who hold pages without a row) are asked before anybody who runs; a tenant within its guarantee gives nothing to others; who
is over its own quota takes only from itself; of those that run the worst by the policy gives way.
"""

from __future__ import annotations

from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.sequence import NO_ROW, Sequence
from llmos.microkernel.tenants import Tenant


def watch_takings(scheduler: Scheduler, policy: str) -> None:
    """Check every `reclaim` and `preempt` of this scheduler from now on."""
    watch = _Watch(scheduler, policy)
    scheduler.residents.reclaim = watch.reclaim
    scheduler.residents.preempt = watch.preempt


class _Watch:
    def __init__(self, scheduler: Scheduler, policy: str) -> None:
        self._residents = scheduler.residents
        self._reclaim, self._preempt = scheduler.residents.reclaim, scheduler.residents.preempt
        self._policy = policy
        self._asked: tuple[Tenant, bool] | None = None  # for whom no keeper was found, and whether it is over its quota

    def reclaim(self, spare: Sequence, tenant: Tenant, *, own_only: bool = False) -> bool:
        keepers = [seq for seq in self._residents.live() if seq.row == NO_ROW and seq.page_table and seq is not spare]
        may_lose = [seq.rid for seq in keepers if self._gives(seq, tenant, own_only)]
        found = self._reclaim(spare, tenant, own_only=own_only)
        lost = [seq.rid for seq in keepers if not seq.page_table]
        assert len(lost) == found
        assert set(lost) <= set(may_lose), f"pages of {lost} were taken, only {may_lose} may lose theirs"
        assert found or not may_lose, f"nobody was asked, though {may_lose} keep pages"
        self._asked = None if found else (tenant, own_only)
        return found

    def preempt(self, seq: Sequence, now: float, *, drop: bool = False) -> None:
        if not drop:
            assert self._asked is not None, f"{seq.rid} was preempted before those that only keep pages"
            tenant, own_only = self._asked
            running = [each for each in self._residents.rows.seqs if each is not None]
            may_lose = {self._rank(each): each.rid for each in running if self._gives(each, tenant, own_only)}
            assert seq.rid in may_lose.values(), f"{seq.rid} was preempted for {tenant.name}"
            assert seq.rid == may_lose[max(may_lose)], f"{seq.rid} was preempted, not {may_lose[max(may_lose)]}"
        self._preempt(seq, now, drop=drop)

    def _gives(self, seq: Sequence, tenant: Tenant, own_only: bool) -> bool:
        owner = self._residents.tenants.get(seq.owner)
        return owner is tenant or (not own_only and owner.pages > owner.limits.guaranteed_pages)

    def _rank(self, seq: Sequence) -> tuple[int, int]:
        """The greatest gives way."""
        return ((seq.nice + 20) // 8 if self._policy == "fair" else 0, seq.rid)
