"""Who holds which pages: page tables of sequences, counted for their tenants, within quotas and guarantees.

Keepers are sequences without a row that still hold pages (suspended with `keep_pages`, or resumed and waiting). Their pages are theirs
only until somebody else needs them: the one that has kept its pages longest gives them back first.
Invariants: tenant.pages = length of its sequences' page tables together; a tenant never takes a page that another one's guarantee
still needs; page references in the pool = page tables that hold the page.
"""

from __future__ import annotations

from collections import OrderedDict

from llmos.microkernel.pages import PagePool
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import Tenant, TenantTable


class Holdings:
    """Page tables over one pool. `last_step` is the newest issued step; the scheduler keeps it up to date."""

    def __init__(self, pool: PagePool, tenants: TenantTable) -> None:
        self.pool = pool
        self.tenants = tenants
        self.last_step = 0
        self.idle = True  # no step is in flight
        self._keepers: OrderedDict[int, Sequence] = OrderedDict()

    def grantable(self, tenant: Tenant) -> int:
        """Pages that this tenant could get now without taking another one's guarantee. May be negative."""
        return self.pool.available - self.tenants.reserved_for_others(tenant)

    def extend(self, seq: Sequence, tenant: Tenant, shared: list[int], count: int) -> None:
        """Add `shared` pages (prefix hits) and `count` new ones to a page table; the caller has checked that they are there."""
        for page in shared:
            self.pool.share(page)
        seq.page_table += shared + self.pool.grant(count)
        tenant.pages += len(shared) + count

    def release(self, seq: Sequence, tenant: Tenant) -> None:
        """Give back all pages of a sequence."""
        tenant.pages -= len(seq.page_table)
        self.pool.release(seq.page_table, self.last_step)
        seq.page_table = []
        self._keepers.pop(seq.rid, None)
        if self.idle:
            self.pool.complete(self.last_step)

    def keep(self, seq: Sequence) -> None:
        """The sequence has no row now but keeps its pages while nobody needs them."""
        self._keepers[seq.rid] = seq

    def unkeep(self, seq: Sequence) -> None:
        """The sequence has a row again."""
        self._keepers.pop(seq.rid, None)

    def drop_oldest_keeper(self, spare: Sequence, tenant: Tenant, *, own_only: bool = False) -> bool:
        """Take the pages of the longest keeper that `tenant` may take them from, but not of `spare`; False if there is none."""
        for seq in self._keepers.values():
            other = self.tenants.get(seq.owner)
            mine = other is tenant
            if seq is not spare and (mine or (not own_only and other.pages > other.limits.guaranteed_pages)):
                self.release(seq, other)
                return True
        return False

    def keepers(self) -> list[Sequence]:
        return list(self._keepers.values())
