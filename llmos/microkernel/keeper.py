"""Keeps the journal of a kernel: recovers it at the start, writes what happened each turn, and sees to it that new work is refused while
nothing can be written. Without a journal it does nothing.
"""

from __future__ import annotations

import logging

from llmos.errors import Unavailable
from llmos.killpoints import ARMED, reach
from llmos.microkernel.journal import Journal, Recovered
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.recovery import restore

log = logging.getLogger(__name__)
_RETRY_S = 1.0
_LISTED = 50


class Keeper:
    """`summary` is one line for people: what was recovered."""

    def __init__(self, kernel: Kernel, journal: Journal | None, now: float) -> None:
        self._state = kernel.state
        self._journal = journal
        self._retry_at = 0.0
        self.summary = "no journal"
        if journal is None:
            return
        if ARMED:
            reach("microkernel.start.begin")
        try:
            recovered = journal.recover()
        except OSError as error:
            raise Unavailable(f"the journal can not be read: {error}", field="state_dir") from None
        restore(self._state, recovered.fold, recovered.shift_s, now)
        if ARMED:
            reach("microkernel.start.restored")
        journal.start(self._state)
        self._state.notes = []
        self._state.refusal = journal.refusal
        self.summary = f"{len(self._state.sequences)} sequences from the journal"
        log.info(
            "%d records: %d live and %d ended sequences, %d records without meaning",
            recovered.records, len(self._state.sequences), len(self._state.ended), recovered.fold.ignored,
        )  # fmt: skip
        if recovered.dropped:
            self._tell_damage(recovered)

    def _tell_damage(self, recovered: Recovered) -> None:
        fold = recovered.fold
        damage = f"{recovered.dropped} bytes of the journal are damaged, at {recovered.places} places"
        self.summary += f"; {damage}"
        log.error("%s", damage)
        if fold.corrupt:
            log.error("sequences that ended because of it: %s", _listed(sorted(fold.corrupt)))
        if fold.lost:
            log.error("sequences of which nothing is left but later records: %s", _listed(sorted(fold.lost)))

    def write(self, now: float) -> None:
        """Once per turn, before anybody hears of what happened in it."""
        journal, notes = self._journal, self._state.notes
        if journal is None or notes is None:
            return
        if notes:
            if ARMED:
                reach("microkernel.journal.before")
            journal.write(notes)
            notes.clear()
            if ARMED:
                reach("microkernel.journal.after")
        journal.turn(self._state, now)
        if journal.is_broken and now >= self._retry_at:
            self._retry_at = now + _RETRY_S
            journal.retry(self._state)
        self._state.refusal = journal.refusal

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


def _listed(rids: list[int]) -> str:
    return ", ".join(map(str, rids[:_LISTED])) + (f" and {len(rids) - _LISTED} more" if len(rids) > _LISTED else "")
