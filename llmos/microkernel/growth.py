"""Page tables of running sequences that grow: by one page for every row whose newest token has no place.

If pages are plenty and rows many, all get theirs at once. If they are short, or somebody is near a quota, or pages must be left for
guarantees, each row is looked at alone, oldest first, and others give way if they have to. Where both are possible they grant the same
pages to the same rows.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmos.microkernel.residents import Residents
from llmos.microkernel.rows import Ints
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import Tenant
from llmos.protocol.codec import pack_i32

_MANY = 8  # rows that are worth the preparations
_SPARE = 8  # free pages per row


@dataclass(slots=True)
class Growers:
    """Rows that need a page in the same step, oldest first.

    `gain`: what that adds to the capacity of every row. `appends`: int32[n,3] (row, place in the page table, page), as on the wire; the
    places are those of the pages that they have, so each time that they grow is one further.
    """

    gain: Ints
    tables: list[array[int]]
    payers: NDArray[np.int32]
    charges: list[tuple[Tenant, int]]
    appends: NDArray[np.int32]


class Growth:
    """Over the residents of one executor generation."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._rows = residents.rows
        self._tenants = residents.tenants
        self._holdings = residents.holdings

    def growers(self, short: Ints) -> Growers:
        tables = [seq.page_table for row in short.tolist() if (seq := self._rows.seqs[row]) is not None]
        payers = self._rows.tenant[short]
        appends = np.zeros((len(short), 3), "<i4")
        appends[:, 0], appends[:, 1] = short, [len(table) - 1 for table in tables]
        gain = np.zeros_like(self._rows.capacity)
        gain[short] = self._holdings.page_size
        return Growers(gain, tables, payers.astype(np.int32), self._tenants.counts(payers), appends)

    def grow(self, decode: Ints, short: Ints, now: float) -> tuple[Ints, bytes]:
        """A page for each row of `short`. Returns the rows of `decode` that can run in this step, and the appends for the plan."""
        if len(short) >= _MANY:
            growers = self.growers(short)
            if self.is_plenty(growers):
                return decode, self.extend(growers)
        return self._one_by_one(decode, short, now)

    def is_plenty(self, growers: Growers) -> bool:
        """Can all have their page without a look at each?"""
        for tenant, count in growers.charges:
            if tenant.pages + count > tenant.limits.max_pages:
                return False
        return len(growers.tables) + self._tenants.reserved() <= self._holdings.pool.available

    def has_spare(self, num_rows: int) -> bool:
        """Are there so many pages that as many rows may get some before they need them?"""
        return self._holdings.pool.available - self._tenants.reserved() >= _SPARE * num_rows

    def extend(self, growers: Growers) -> bytes:
        """Give each its page; the caller has checked that there are plenty. Returns the appends for the plan."""
        pages = self._holdings.extend_each(growers.tables, growers.payers, growers.charges)
        appends = growers.appends
        places = appends[:, 1]
        places += 1
        appends[:, 2] = pages
        self._rows.capacity += growers.gain
        return appends.tobytes()

    def _one_by_one(self, decode: Ints, short: Ints, now: float) -> tuple[Ints, bytes]:
        rows = self._rows
        skipped: set[int] = set()
        grown: list[tuple[int, int, int]] = []
        for row in short.tolist():
            seq = rows.seqs[row]
            if seq is None:
                continue  # preempted for another one
            tenant = self._tenants.get(seq.owner)
            if not self._make_room(seq, tenant, now):
                skipped.add(row)
                continue
            self._holdings.extend(seq, tenant, 1)
            grown.append((row, len(seq.page_table) - 1, seq.page_table[-1]))
            rows.capacity[row] += self._holdings.page_size
        # Who was preempted after it grew is not there any more.
        appends = pack_i32([value for append in grown if rows.seqs[append[0]] is not None for value in append])
        kept = [row for row in decode.tolist() if rows.seqs[row] is not None and row not in skipped]
        return np.array(kept, np.int64), appends

    def _make_room(self, seq: Sequence, tenant: Tenant, now: float) -> bool:
        """Have one page grantable for `seq`, if need be by preempting. False: `seq` does not run in this step."""
        while True:
            over_quota = tenant.pages >= tenant.limits.max_pages
            if not over_quota and self._holdings.grantable(tenant) > 0:
                return True
            if not over_quota and self._holdings.pool.num_quarantined:
                return False  # pages come back when a step in flight is done
            if self._residents.reclaim(seq, tenant, own_only=over_quota):
                continue
            victim = self._victim(tenant, own_only=over_quota)
            self._residents.preempt(victim, now)
            if victim is seq:
                return False

    def _victim(self, tenant: Tenant, *, own_only: bool) -> Sequence:
        """Whom to preempt so that `tenant` gets a page: never somebody within another tenant's guarantee."""
        candidates: list[Sequence] = []
        for row in self._rows.order.tolist():
            seq = self._rows.seqs[row]
            assert seq is not None
            other = self._tenants.get(seq.owner)
            if other is tenant or (not own_only and other.pages > other.limits.guaranteed_pages):
                candidates.append(seq)
        return max(candidates, key=self._residents.policy.preemption_rank)
