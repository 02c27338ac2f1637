"""Which tenant a held page counts for.

A page counts once, however many page tables hold it: for the tenant whose sequence took it first; when that tenant lets go of it, for the
one that has shared it longest. Only where tenants find each other's pages in the prefix cache can a page have holders of several
tenants; those that it does not count for are its guests.

Invariants: tenant.pages = held pages that count for it; a page counts for a tenant that holds it; `_guests[page]` = references by
sequences of other tenants than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from llmos.microkernel.pages import Pages
from llmos.microkernel.tenants import Tenant, TenantTable


class Payers:
    """Costs nothing more than an array as long as no page has guests. Tenants by their index in the table."""

    def __init__(self, num_pages: int, tenants: TenantTable) -> None:
        self._tenants = tenants
        self._payer = np.zeros(num_pages, np.int32)
        self._guests: dict[int, dict[int, int]] = {}

    def take(self, pages: Iterable[int], tenant: Tenant) -> None:
        """These were held by nobody, and are by this tenant now."""
        for page in pages:
            self._payer[page] = tenant.index
            tenant.pages += 1

    def take_each(self, pages: Pages, payers: NDArray[np.int32], charges: list[tuple[Tenant, int]]) -> None:
        """As `take`, each page for its own tenant. `payers`: their indices, `charges`: the tenants with the number of their pages."""
        self._payer[pages] = payers
        for tenant, count in charges:
            tenant.pages += count

    def share(self, pages: Iterable[int], tenant: Tenant) -> None:
        """These are held, and one more page table of this tenant holds them."""
        for page in pages:
            if self._payer[page] != tenant.index:
                guests = self._guests.setdefault(page, {})
                guests[tenant.index] = guests.get(tenant.index, 0) + 1

    def fork(self, pages: Iterable[int], tenant: Tenant) -> None:
        """As `share`, of pages that a page table of this tenant holds already."""
        if self._guests:
            self.share(pages, tenant)

    def leave(self, pages: Iterable[int], tenant: Tenant, refs: NDArray[np.int32]) -> None:
        """A page table of this tenant is about to let go of them. `refs`: references so far."""
        if not self._guests:
            return
        for page in pages:
            guests = self._guests.get(page)
            if guests is None:
                continue
            if self._payer[page] != tenant.index:
                guests[tenant.index] -= 1
                if not guests[tenant.index]:
                    del guests[tenant.index]
            elif int(refs[page]) - sum(guests.values()) == 1:  # its last one: the next pays
                heir = next(iter(guests))
                self._payer[page] = heir
                tenant.pages -= 1
                self._tenants.all[heir].pages += 1
                del guests[heir]
            if not guests:
                del self._guests[page]

    def free(self, pages: list[int]) -> None:
        """Nobody holds these any more."""
        for index, count in enumerate(np.bincount(self._payer[pages]).tolist()):
            self._tenants.all[index].pages -= count

    def check(self, holders: dict[int, list[int]]) -> None:
        """Assert the invariants. `holders`: for each held page, the tenant of each page table that holds it."""
        payers = self._payer.tolist()
        use = Counter(payers[page] for page in holders)
        for tenant in self._tenants.all:
            assert tenant.pages == use[tenant.index], f"{tenant.name}: {tenant.pages} pages, holds {use[tenant.index]}"
        guests = {}
        for page, tenants in holders.items():
            own = tenants.count(payers[page])
            assert own, f"page {page} counts for a tenant that does not hold it"
            if own < len(tenants):
                guests[page] = Counter(index for index in tenants if index != payers[page])
        assert guests == self._guests, "pages have other guests"
