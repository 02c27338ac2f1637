"""Keeps the journal of a kernel: recovers it at the start, writes what happened each turn, and sees to it that new work is refused while
nothing can be written. Without a journal it does nothing.
"""

from __future__ import annotations

import logging

from llmos.errors import Unavailable
from llmos.microkernel.journal import Journal
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.recovery import restore

log = logging.getLogger(__name__)
_RETRY_S = 1.0


class Keeper:
    """`summary` is one line for people: what was recovered."""

    def __init__(self, kernel: Kernel, journal: Journal | None, now: float) -> None:
        self._state = kernel.state
        self._journal = journal
        self._retry_at = 0.0
        self.summary = "no journal"
        if journal is None:
            return
        try:
            recovered = journal.recover()
            restore(self._state, recovered.fold, recovered.shift_s, now)
            journal.begin(self._state)
        except OSError as error:
            raise Unavailable(f"the journal can not be opened: {error}", field="state_dir") from None
        self._state.notes = []
        self.summary = f"{len(self._state.sequences)} sequences from the journal"
        log.info(
            "%d records: %d live and %d ended sequences, %d records without meaning, %d bytes damaged",
            recovered.records, len(self._state.sequences), len(self._state.ended), recovered.fold.ignored,
            recovered.dropped,
        )  # fmt: skip

    def write(self, now: float) -> None:
        """Once per turn, before anybody hears of what happened in it."""
        journal, notes = self._journal, self._state.notes
        if journal is None or notes is None:
            return
        if notes:
            journal.write(notes)
            notes.clear()
        journal.turn(self._state, now)
        if journal.failure is not None and now >= self._retry_at:
            self._retry_at = now + _RETRY_S
            if journal.retry(self._state):
                log.warning("the journal can be written again")
        self._state.refusal = None if journal.failure is None else f"the journal can not be written: {journal.failure}"

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
