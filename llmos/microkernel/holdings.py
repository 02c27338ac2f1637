"""Who holds which pages: page tables of sequences, counted for their tenants (payers.py), within quotas and guarantees; and their host
pages.

Keepers are sequences without a row that still hold pages (at rest, suspended, or waiting again). Their pages are theirs only until
somebody else needs them: the one that has kept its pages longest gives them back first, to the host if that is cheaper than to
compute them again.

Copy-on-write: a sequence that gets a row with a partly filled last page that others can read gets a copy of it, made by the plan of
that step. While it runs it writes on in place: others that share the page since then read only what was there before.

Invariants: a tenant never takes a page that another one's guarantee still needs; page references in the pool = page tables that hold
the page; a host page belongs to one sequence.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from llmos.microkernel.host_pages import HostPool
from llmos.microkernel.pages import PagePool, Pages
from llmos.microkernel.payers import Payers
from llmos.microkernel.plan import Copies, append_each
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import Tenant, TenantTable


class Holdings:
    """Page tables over one pool. `last_step` is the newest issued step; the scheduler keeps it up to date."""

    def __init__(self, pool: PagePool, host: HostPool, tenants: TenantTable, page_size: int) -> None:
        self.pool = pool
        self.host = host
        self.tenants = tenants
        self.page_size = page_size
        self.last_step = 0
        self.idle = True  # no step is in flight
        self.copies = Copies()  # for the next plan
        self._payers = Payers(pool.num_pages, tenants)
        self._keepers: OrderedDict[int, Sequence] = OrderedDict()

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def grantable(self, tenant: Tenant) -> int:
        """Pages that this tenant could get now without taking another one's guarantee. May be negative."""
        return self.pool.available - self.tenants.reserved_for_others(tenant)

    def extend(self, seq: Sequence, tenant: Tenant, count: int) -> list[int]:
        """Add `count` new pages to a page table; the caller has checked that they are there."""
        pages = self.pool.grant(count)
        self._payers.take(pages, tenant)
        seq.page_table.extend(pages)
        return pages

    def extend_each(
        self, tables: list[array[int]], payers: NDArray[np.int32], charges: list[tuple[Tenant, int]]
    ) -> Pages:
        """Add a new page to each page table; the caller has checked that they are there. `payers`: the index of the tenant that each
        is for, `charges`: those tenants, each with the number of its tables."""
        pages = self.pool.grant_array(len(tables))
        self._payers.take_each(pages, payers, charges)
        append_each(tables, pages.tolist())
        return pages

    def share(self, seq: Sequence, tenant: Tenant, pages: list[int]) -> None:
        """Begin a page table with pages of the prefix cache."""
        for page in pages:
            (self._payers.share if self.pool.refs[page] else self._payers.take)((page,), tenant)
            self.pool.share(page)
        seq.page_table.extend(pages)

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """`child` begins with the pages of the parent's first `num_tokens` tokens. Nothing is copied now."""
        assert not child.page_table
        assert not child.host_pages
        child.page_table = parent.page_table[: self.pages_for(num_tokens)]
        self.pool.share_used(child.page_table)
        self._payers.fork(child.page_table, self.tenants.get(child.owner))
        child.kept_tokens = num_tokens
        if child.page_table:
            self.keep(child)

    def tail_to_copy(self, seq: Sequence, num_tokens: int) -> int | None:
        """Place in the page table of the page that `seq` would go on writing after `num_tokens`, if others hold it too."""
        place, used = divmod(num_tokens, self.page_size)
        return place if used and place < len(seq.page_table) and self.pool.refs[seq.page_table[place]] > 1 else None

    def own_tail(self, seq: Sequence, num_tokens: int) -> None:
        """`seq` is about to write behind `num_tokens` into a page that it alone holds."""
        place, used = divmod(num_tokens, self.page_size)
        if used and place < len(seq.page_table):
            self.pool.forget(seq.page_table[place])

    def copy_tail(self, seq: Sequence, tenant: Tenant, place: int) -> None:
        """Replace that page by a copy; the caller has checked that a page is there."""
        source = seq.page_table[place]
        [target] = self.pool.grant(1)
        self._payers.take((target,), tenant)
        self.copies.copy(source, target)
        self._let_go(seq, array("i", [source]), self.last_step + 1)
        seq.page_table[place] = target

    def swap_out(self, seq: Sequence) -> None:
        """Copy a sequence's KV to host pages, then give its pages back; the caller has checked the room."""
        used = seq.page_table[: self.pages_for(seq.kept_tokens)]
        seq.host_pages = self.host.grant(len(used))
        self.copies.swap_out(used, seq.host_pages)
        seq.swaps += 1
        self._release(seq, self.last_step + 1)

    def swap_in(self, seq: Sequence) -> None:
        """Copy a sequence's KV back into its page table, which is long enough."""
        self.copies.swap_in(seq.host_pages, seq.page_table[: len(seq.host_pages)])
        self.host.release(seq.host_pages)
        seq.host_pages = array("i")

    def release(self, seq: Sequence) -> None:
        """Give back all pages of a sequence, also those at the host."""
        self.host.release(seq.host_pages)
        if not self.copies:
            self.host.settle()
        seq.host_pages = array("i")
        seq.kept_tokens = 0
        self._release(seq, self._last_use)
        if self.idle:
            self.pool.complete(self.last_step)

    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Give back the pages behind the first `num_tokens` tokens."""
        kept = self.pages_for(num_tokens)
        self._let_go(seq, seq.page_table[kept:], self._last_use)
        del seq.page_table[kept:]
        if self.idle:
            self.pool.complete(self.last_step)

    def keep(self, seq: Sequence) -> None:
        """The sequence has no row now but keeps its pages while nobody needs them."""
        self._keepers[seq.rid] = seq

    def unkeep(self, seq: Sequence) -> None:
        """The sequence has a row again, or no pages."""
        self._keepers.pop(seq.rid, None)

    def oldest_keeper(self, spare: Sequence, tenant: Tenant, *, own_only: bool = False) -> Sequence | None:
        """Who has kept its pages longest, of those that `tenant` may take pages from, but not `spare`."""
        for seq in self._keepers.values():
            other = self.tenants.get(seq.owner)
            if seq is not spare and (other is tenant or (not own_only and other.pages > other.limits.guaranteed_pages)):
                return seq
        return None

    @property
    def _last_use(self) -> int:
        """The newest step that may touch a page that is let go now: if copies are ordered, the one that will make them."""
        return self.last_step + bool(self.copies)

    def _release(self, seq: Sequence, after_step: int) -> None:
        self._keepers.pop(seq.rid, None)
        self._let_go(seq, seq.page_table, after_step)
        seq.page_table = array("i")

    def _let_go(self, seq: Sequence, pages: array[int], after_step: int) -> None:
        self._payers.leave(pages, self.tenants.get(seq.owner), self.pool.refs)
        freed = self.pool.release(pages, after_step)
        if freed:
            self._payers.free(freed)

    def check(self, live: list[Sequence]) -> None:
        """Assert the invariants, given all live sequences; O(pages + page tables)."""
        self.pool.check()
        held = [0] * self.pool.num_pages
        holders: dict[int, list[int]] = {}
        for seq in live:
            index = self.tenants.get(seq.owner).index
            for page in seq.page_table:
                held[page] += 1
                holders.setdefault(page, []).append(index)
        assert self.pool.refs.tolist() == held
        self._payers.check(holders)
        without_row = {seq.rid for seq in live if seq.row < 0 and seq.page_table}
        assert without_row == set(self._keepers)
        self.host.check([page for seq in live for page in seq.host_pages])
        for seq in live:
            assert not (seq.page_table and seq.host_pages), f"sequence {seq.rid} holds pages here and there"
            kept = self.pages_for(seq.kept_tokens)
            if seq.row < 0:
                assert len(seq.page_table or seq.host_pages) >= kept, f"sequence {seq.rid} keeps tokens without pages"
                assert seq.kept_tokens <= len(seq.tokens) + seq.num_pending
