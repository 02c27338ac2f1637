"""The row table: what a step needs to know of every running sequence, as numpy columns.

A row belongs to one running sequence at a time; rows are reused, so `epoch` tells lives of a row apart. A steady decode step touches a
dozen columns with one vector operation each instead of looping over objects (docs/decisions.md has the figures).

Columns, in tokens from the start of the prompt unless said:
    known      prompt and committed output                 computed   KV in pages once all issued steps are done
    pending    sampled in steps in flight                  capacity   what the granted pages hold
    max_len    the sequence ends here                      min_len    stop tokens count only above this
    unread     its client must have read up to here minus the window (known + pending stays below it); no bound without a reader
    indexed    pages the prefix cache knows                stop       up to `_STOP_COLUMNS` stop token ids, -1 = none
    tenant     index in the tenant table                   decoding   it got a token in this row
    throttled  its client does not read (as last seen)     known_at_start  known when it got the row
    many_stops more stop ids than columns: look at the sequence instead
    reader     peer that gets its tokens   computed_at_start  computed when it got the row
    silent     it computes its newest token, too, though nothing is sampled from it

Invariant: while `version` stays the same, nobody comes or goes, no row's reader or `max_len` changes and nobody who fell behind catches up,
so of these columns only those move that every step moves, and `unread`, upwards.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from llmos.microkernel.sequence import NO_ROW, NOBODY, Sequence
from llmos.protocol.limits import UNLIMITED

_STOP_COLUMNS = 4
_NO_TOKEN = -1
_LEAST_ROOM = 64  # tokens

Ints = NDArray[np.int64]


def _stagger(tokens: array[int], row: int) -> None:
    """Arrays of equal length that grow together would all ask for more memory in the same step, which would take five times as long.

    At which length an array asks again depends on how long it has been. So let each have been longer by another part of what arrays
    of this length grow by, which is a sixteenth; they keep what they have if not more than 15 items go at once.
    """
    length = len(tokens)
    longest = max(length, _LEAST_ROOM)
    longest += row % (longest // 16 + 7)
    tokens.frombytes(bytes((longest - length) * tokens.itemsize))
    while len(tokens) > length:
        del tokens[max(length, len(tokens) - 15) :]


class RowTable:
    """Fixed number of rows. `order` lists occupied rows, oldest sequence first."""

    def __init__(self, num_rows: int, window: int) -> None:
        self.window = window
        self.seqs: list[Sequence | None] = [None] * num_rows
        self.known, self.pending, self.computed, self.capacity = (np.zeros(num_rows, np.int64) for _ in range(4))
        self.max_len, self.min_len, self.unread, self.indexed = (np.zeros(num_rows, np.int64) for _ in range(4))
        self.epoch, self.rid, self.prompt_len, self.reader = (np.zeros(num_rows, np.int64) for _ in range(4))
        self.stop = np.full((num_rows, _STOP_COLUMNS), _NO_TOKEN, np.int64)
        self.tenant, self.known_at_start, self.computed_at_start = (np.zeros(num_rows, np.int64) for _ in range(3))
        self.many_stops, self.decoding, self.throttled, self.silent = (np.zeros(num_rows, bool) for _ in range(4))
        self._stop_counts: dict[int, int] = {}  # how many rows have that stop token
        self.order: Ints = np.zeros(0, np.int64)
        self.stop_ids: set[int] = set()  # of any row: what is not in it ends nobody
        self.version = 0
        self._free = list(range(num_rows - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.order)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, seq: Sequence, num_computed: int, page_size: int, tenant: int) -> int:
        """Give `seq`, whose page table is set, a row."""
        row = self._free.pop()
        self.version += 1
        seq.row = row
        self.seqs[row] = seq
        self.known[row] = self.known_at_start[row] = len(seq.tokens)
        self.pending[row] = 0
        self.computed[row] = self.computed_at_start[row] = num_computed
        self.capacity[row] = len(seq.page_table) * page_size
        self.max_len[row] = seq.max_len
        self.min_len[row] = seq.prompt_len + seq.params.least_output
        self.indexed[row] = num_computed // page_size
        self.rid[row] = seq.rid
        self.prompt_len[row] = seq.prompt_len
        self.tenant[row] = tenant
        self.decoding[row] = self.throttled[row] = False
        self.silent[row] = seq.silent
        self.read(seq)
        self._count_stops(seq, 1)
        _stagger(seq.tokens, row)
        stops = seq.params.stop_token_ids
        self.many_stops[row] = len(stops) > _STOP_COLUMNS
        self.stop[row] = _NO_TOKEN
        self.stop[row, : min(len(stops), _STOP_COLUMNS)] = stops[:_STOP_COLUMNS]
        place = int(np.searchsorted(self.rid[self.order], seq.rid))
        self.order = np.insert(self.order, place, row)
        return row

    def free(self, seq: Sequence) -> int:
        """Take the row back; returns it."""
        row = seq.row
        assert self.seqs[row] is seq
        self.seqs[row] = None
        self.version += 1
        self._count_stops(seq, -1)
        self.epoch[row] += 1
        self.order = self.order[self.order != row]
        self._free.append(row)
        seq.row = NO_ROW
        return row

    def _count_stops(self, seq: Sequence, change: int) -> None:
        """A row came or went."""
        for token in seq.stop_ids:
            count = self._stop_counts.get(token, 0) + change
            self._stop_counts[token] = count
            if count == 0:
                del self._stop_counts[token]
                self.stop_ids.discard(token)
            elif count == change:
                self.stop_ids.add(token)

    def read(self, seq: Sequence) -> None:
        """The client's acknowledgement moved, or the sequence has another reader."""
        row = seq.row
        if row != NO_ROW:
            if self.throttled[row] or self.reader[row] != seq.reader:
                self.version += 1
            self.reader[row] = seq.reader
            # Where nobody reads, nobody's buffers are in danger.
            self.unread[row] = seq.prompt_len + seq.acked + (UNLIMITED if seq.reader == NOBODY else self.window)

    def may_run_on(self, seq: Sequence) -> bool:
        """Is its reader near enough?"""
        return seq.reader == NOBODY or seq.num_output < seq.acked + self.window

    def remaining(self, rows: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Tokens each row can compute now, and whether it then samples: 1 in decode, more in prefill, 0 with nothing to do.

        The newest token of a row that may not sample any more is not computed: nothing follows it yet. But for silent rows.
        """
        known = self.known[rows] + self.pending[rows]
        samples: NDArray[np.bool_] = known < self.max_len[rows]
        return known - ~(samples | self.silent[rows]) - self.computed[rows], samples

    def readable(self, rows: Ints) -> NDArray[np.bool_]:
        """False where the client is too far behind to run on."""
        behind: NDArray[np.bool_] = self.known[rows] + self.pending[rows] < self.unread[rows]
        return behind

    def hits_stop(self, rows: Ints, tokens: Ints, known: Ints) -> NDArray[np.bool_]:
        """Rows for which the token just committed, the `known`th, is or may be a stop token."""
        hit: NDArray[np.bool_] = (self.stop[rows] == tokens[:, None]).any(axis=1) | self.many_stops[rows]
        return hit & (known > self.min_len[rows]) if hit.any() else hit

    def check(self) -> None:
        """Assert the invariants; O(rows)."""
        occupied = [row for row, seq in enumerate(self.seqs) if seq is not None]
        assert sorted(self.order) == occupied
        assert not set(self._free) & set(occupied)
        assert len(self._free) + len(occupied) == len(self.seqs)
        assert list(self.rid[self.order]) == sorted(self.rid[self.order])
        assert (
            self.stop_ids == set(self._stop_counts) == {t for seq in self.seqs if seq is not None for t in seq.stop_ids}
        )
        for row in occupied:
            seq = self.seqs[row]
            assert seq is not None
            assert seq.row == row
            assert self.known[row] == len(seq.tokens) <= seq.max_len
            assert self.computed[row] <= min(self.capacity[row], self.known[row] + self.pending[row])
