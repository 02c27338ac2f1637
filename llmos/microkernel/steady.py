"""The fast path: rows that decode together, step after step, while nobody comes, goes, prefills or falls behind.

In such a step every row computes its newest token and gets the next one, so all columns move by one, and what the general path works out
from the row table is known beforehand as a function of `index`, the number of the step since this began: which rows there are, what
position each samples, who needs a page. What remains is a handful of operations on arrays that are kept from step to
step. The general path (scheduler.py, commit.py) gives exactly the same plans and outcomes, but for pages granted ahead;
tests/microkernel/test_fast_path.py compares whole lives.

States: begun by a step that only repeats the decodes of the one before; over when the scheduler plans any other step. Steps that were
issued until then are still committed here, as long as nobody came or went since.

Pages: every row has a slot of `index` modulo the page size in which it gets its page: the one in which it needs it, as on the general path.
Only where so many rows need theirs in the same step that it would take twice as long as others, and pages are plenty, slots are spread
evenly, so that most rows get their page some steps ahead.

Invariants (`check`), as long as `rows.version` is what it was: `rows` are all occupied rows but the throttled ones, each with a token
committed in this life of the row; before the plan of `index` each has computed `first + index - 1` tokens and knows, with what is pending,
`first + index`, which is below its `max_len` and its `unread` for every index < `num_plans`; it has room for less than two pages of
tokens. A result of an index < `num_quiet` reaches nobody's `max_len`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmos.microkernel.commit import Outcome
from llmos.microkernel.growth import Growers, Growth
from llmos.microkernel.plan import InFlightStep, append_each
from llmos.microkernel.rows import RowTable
from llmos.microkernel.sequence import NOBODY
from llmos.microkernel.tenants import TenantTable

_LEAST = 4  # plans that a beginning must be good for
_CROWD = 16  # rows that may always grow in the same step


class Steady:
    """See the module docstring. Made by `begin`."""

    def __init__(
        self, rows: RowTable, step: InFlightStep, page_size: int, tenants: TenantTable, growth: Growth
    ) -> None:
        held = step.rows
        self.rows, self.epochs, self.seqs, self.logs = held, step.epochs, step.seqs, step.logs
        self.version = rows.version
        self.page_size = page_size
        self.index = 0  # of the next plan
        self.first = rows.computed[held] + 1
        self.num_plans = int((np.minimum(rows.max_len, rows.unread)[held] - self.first).min())
        self.num_quiet = int((rows.max_len[held] - 1 - self.first).min())
        self.charges = tenants.counts(rows.tenant[held])
        self._ones = np.zeros(len(rows.known), np.int64)
        self._ones[held] = 1
        self._room = rows.capacity[held] - rows.computed[held]  # when it began, in tokens
        self._slot = self._room % page_size
        if np.bincount(self._slot).max() > max(_CROWD, 2 * len(held) // page_size) and growth.has_spare(len(held)):
            self._slot = np.arange(len(held)) % page_size
        self._growers: list[Growers | None] = [None] * page_size  # by slot, made when first needed
        self._sampled = np.zeros((len(held), 3), "<i4")  # (row, position, token)
        self._sampled[:, 0], self._sampled[:, 1] = held, self.first
        self._columns = np.zeros((len(held), 3), "<i8")  # (rid, offset, token)
        self._columns[:, 0], self._columns[:, 1] = rows.rid[held], self.first - rows.prompt_len[held]
        self._at = 0  # the index that these two are for
        self._readers = rows.reader[held]
        peers = sorted(set(self._readers.tolist()))
        self._places = [(peer, np.flatnonzero(self._readers == peer)) for peer in peers if peer != NOBODY]
        self._reader = peers[0] if len(peers) == 1 else NOBODY  # the only one
        (rids, self._offsets, tokens), self._positions = self._columns.T, self._sampled[:, 1]
        self._outcome = Outcome(held, self._positions, tokens, rids, self._offsets, self._readers, step.seqs)

    @classmethod
    def begin(
        cls, rows: RowTable, step: InFlightStep, page_size: int, tenants: TenantTable, growth: Growth
    ) -> Steady | None:
        """From the next step on, if it can be foreseen that it goes on like this `step`, a pure decode that was just issued."""
        held, order = step.rows, rows.order
        if not len(held) or len(held) + np.count_nonzero(rows.throttled[order]) != len(order):
            return None
        if not rows.decoding[held].all():
            return None
        steady = cls(rows, step, page_size, tenants, growth)
        return steady if steady.num_plans >= _LEAST and steady._room.max() < 2 * page_size else None

    # ------------------------------------------------------------ plans

    def plan(self, rows: RowTable, growth: Growth) -> bytes | None:
        """All rows compute one more token. Returns the page appends; None, and nothing has changed, if this is over."""
        if self.version != rows.version or self.index >= self.num_plans:
            return None
        appends = b""
        growers = self._growers[self.index % self.page_size] or self._find_growers(growth)
        if growers.tables:
            if not growth.is_plenty(growers):
                return None
            appends = growth.extend(growers)
        rows.computed += self._ones
        rows.pending += self._ones
        self.index += 1
        return appends

    def issued(self, step: int) -> InFlightStep:
        """What was planned last, as step number `step`."""
        index = self.index - 1
        count = len(self.seqs)
        stored = self.first + index
        return InFlightStep(step, self.rows, self.epochs, stored, 0, self.seqs, self.logs, count, 0, self, index)

    def _find_growers(self, growth: Growth) -> Growers:
        slot, room, size = self.index % self.page_size, self._room, self.page_size
        mine = self._slot == slot
        if self.index < size:  # some have a page more than they need, and some need one before their first turn
            mine = (mine & (room < slot + size)) | ((room == slot) & (self._slot > slot))
        growers = growth.growers(self.rows[mine])
        if self.index >= size:
            self._growers[slot] = growers
        return growers

    # ------------------------------------------------------------ results

    def commit(self, rows: RowTable, index: int, samples: NDArray[np.int32], vocab_size: int) -> Outcome | None:
        """Append the tokens of a step. None, and nothing has changed, if somebody may end or it is not what was asked."""
        if self.version != rows.version or index >= self.num_quiet or samples.shape != self._sampled.shape:
            return None
        sampled, columns, outcome = self._sampled, self._columns, self._outcome
        if index != self._at:
            self._positions += index - self._at
            self._offsets += index - self._at
            self._at = index
        tokens = samples[:, 2]
        sampled[:, 2] = tokens
        # As unsigned numbers negative ones are large; bytes are compared faster than arrays.
        if sampled.tobytes() != samples.tobytes() or np.maximum.reduce(tokens.view("<u4")) >= vocab_size:
            return None
        listed = tokens.tolist()
        if not rows.stop_ids.isdisjoint(listed):
            return None
        append_each(self.logs, listed)
        rows.known += self._ones
        rows.pending -= self._ones
        outcome.tokens[:] = tokens
        everything = outcome.everything = columns.tobytes()
        if self._reader != NOBODY:
            outcome.batches = [(self._reader, everything)]
        else:
            outcome.batches = [(peer, columns[places].tobytes()) for peer, places in self._places]
        return outcome

    def check(self, rows: RowTable) -> None:
        """Assert the invariants, if this goes on."""
        if self.version != rows.version:
            return
        held = self.rows
        others = set(rows.order.tolist()) - set(held.tolist())
        assert rows.throttled[sorted(others)].all()
        assert not rows.throttled[held].any()
        assert rows.decoding[held].all()
        assert (rows.epoch[held] == self.epochs).all()
        assert (rows.reader[held] == self._readers).all()
        assert all(rows.seqs[row] is seq for row, seq in zip(held.tolist(), self.seqs, strict=True))
        assert all(seq.tokens is log for seq, log in zip(self.seqs, self.logs, strict=True))
        assert (rows.computed[held] == self.first + (self.index - 1)).all()
        assert (rows.known[held] + rows.pending[held] == self.first + self.index).all()
        assert (np.minimum(rows.max_len, rows.unread)[held] >= self.first + self.num_plans).all()
        assert (rows.max_len[held] > self.first + self.num_quiet).all()
        room = rows.capacity[held] - rows.computed[held]
        assert (room >= 0).all()
        assert (room < 2 * self.page_size).all()
        if self.index >= self.page_size:
            ahead = (self._room - self._slot) % self.page_size
            assert (room == (self._slot - self.index) % self.page_size + ahead).all()
