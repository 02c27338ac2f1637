"""When the prefix cache learns of the pages that running sequences fill.

A prompt's pages as soon as the chunk that filled them is done: their keys are known since admission, and others may ask the same just
now. Pages that decode fills cost a hash each and are wanted later, by a next turn or a preempted sequence, so they come together, when
the row is given back: a steady step hashes nothing, and many pages at once cost half as much as one by one.

Invariant (`check`): column `indexed` counts the full pages at a row's beginning that the cache knows, or whose content it knew already.
For a row that decodes these are all of its prompt, but for the last if its last token was computed by a step of its own.
"""

from __future__ import annotations

import numpy as np

from llmos.microkernel.limits import SchedulerLimits
from llmos.microkernel.pages import PagePool
from llmos.microkernel.plan import InFlightStep
from llmos.microkernel.prefix import PrefixCache
from llmos.microkernel.rows import RowTable
from llmos.microkernel.sequence import Sequence


class Indexer:
    """Between the rows of one model and its prefix cache. Does nothing if the limits say that there is none."""

    def __init__(self, rows: RowTable, pool: PagePool, prefix: PrefixCache, limits: SchedulerLimits) -> None:
        self._rows = rows
        self._pool = pool
        self._prefix = prefix
        self._enabled = limits.prefix_cache
        self._shared = limits.share_prefixes

    def salt(self, seq: Sequence) -> bytes:
        """Pages are found only by sequences with the same salt."""
        return b"" if self._shared else seq.owner.encode()

    def chunks_done(self, step: InFlightStep) -> None:
        """Index what the chunks of a step filled."""
        if not self._enabled or not step.num_prefill:
            return
        rows, first = self._rows, step.num_decodes
        held, stored = step.rows[first:], step.stored[first:]
        full = np.minimum(stored, rows.known[held]) // self._prefix.page_size
        grown = (full > rows.indexed[held]) & (rows.epoch[held] == step.epochs[first:])
        for row, num_full in zip(held[grown].tolist(), full[grown].tolist()):
            self._index(row, num_full)

    def leave(self, row: int) -> None:
        """A row is about to be given back: index what decode filled."""
        rows = self._rows
        if self._enabled and rows.decoding[row]:
            # The newest token has not been computed, or not in a step that is done.
            self._index(row, (int(rows.known[row]) - 1) // self._prefix.page_size)

    def _index(self, row: int, num_full: int) -> None:
        seq, first = self._rows.seqs[row], int(self._rows.indexed[row])
        assert seq is not None
        if first < num_full:
            self._prefix.extend_keys(seq.page_hashes, seq.tokens, num_full * self._prefix.page_size, self.salt(seq))
            self._pool.know(*self._prefix.insert(seq.page_hashes[first:num_full], seq.page_table[first:num_full]))
            self._rows.indexed[row] = num_full

    def check(self) -> None:
        """Assert the invariant."""
        rows = self._rows
        held = rows.order[rows.decoding[rows.order]]
        assert not self._enabled or (rows.indexed[held] >= rows.prompt_len[held] // self._prefix.page_size - 1).all()
        assert (rows.indexed[rows.order] <= rows.known[rows.order] // self._prefix.page_size).all()
