"""Which sequence kills executors? Found by bisection, so that it fails alone (failure reason `poisoned`).

A death without progress since the last one is a strike against every sequence that was in flight; a committed token clears it. Chance
deaths leave one strike at most. From two strikes on, the suspects are tried: half of them run while everybody else waits. If the executor
survives until each of them made progress they are cleared and half of the rest is next; if it dies, half of that half is next. Who was
alone in flight twice is convicted: once could be chance. A single culprit among B sequences costs at most ceil(log2 B) + 3 deaths.

States of a sequence: unsuspected -> watched (one strike) -> suspect -> on trial -> unsuspected | convicted. One whose turn it is while it
can not run (its tenant is over its rate, say) is let out: it stays a suspect, and is the only one if it strikes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmos.codes import SeqState
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.timeline import Cause

_STRIKES_TO_SUSPECT = 2
_DEATHS_ALONE_TO_CONVICT = 2


@dataclass(slots=True)
class _Record:
    """`mark`: its length at the newest strike. `alone`: how often nobody else was in flight. `out`: let out since."""

    seq: Sequence
    mark: int
    strikes: int = 0
    alone: int = 0
    out: bool = False

    @property
    def has_progressed(self) -> bool:
        """It got further, or it has left the race for a while: nobody waits for those."""
        seq = self.seq
        out = seq.reason is not None or not seq.has_work or seq.state is SeqState.SUSPENDED or seq.held_back
        return out or len(seq.tokens) > self.mark or seq.timeline.cause is Cause.CLIENT


class Trial:
    """One model's. It outlives the executors."""

    def __init__(self) -> None:
        self._watched: dict[int, _Record] = {}  # everybody with a strike, in order of the first
        self._group: list[int] = []  # on trial now

    @property
    def is_on(self) -> bool:
        """May only `members` run?"""
        return bool(self._group)

    @property
    def is_watching(self) -> bool:
        return bool(self._watched)

    def members(self) -> Iterator[Sequence]:
        return (self._watched[rid].seq for rid in self._group)

    def executor_died(self, in_flight: Iterable[Sequence]) -> Sequence | None:
        """The executor died with these in flight. Returns who is convicted, if anybody is."""
        self.note_progress()
        hit = [seq for seq in in_flight if seq.reason is None]
        # Besides those on trial only those can be in flight that have just been cleared.
        hit = [seq for seq in hit if seq.rid in self._group] or hit
        for seq in hit:
            record = self._watched.setdefault(seq.rid, _Record(seq, 0))
            record.mark, record.out = len(seq.tokens), False
            record.strikes += 1
            record.alone += len(hit) == 1
        if len(hit) == 1 and self._watched[hit[0].rid].alone >= _DEATHS_ALONE_TO_CONVICT:
            self._drop(hit[0].rid)
            return hit[0]
        if hit:
            self._group = self._half([seq.rid for seq in hit])
        return None

    def note_progress(self) -> None:
        """Steps were committed: clear who got further."""
        for rid in [rid for rid, record in self._watched.items() if record.has_progressed]:
            self._drop(rid)

    def let_out(self) -> None:
        """Nobody on trial can run for now: others need not wait for that."""
        for rid in self._group:
            self._watched[rid].out = True
        self._group = self._half(list(self._watched))

    def _drop(self, rid: int) -> None:
        del self._watched[rid]
        if rid in self._group:
            self._group.remove(rid)
            if not self._group:
                self._group = self._half(list(self._watched))

    def _half(self, rids: list[int]) -> list[int]:
        """The first half of the suspects among these."""
        records = [self._watched[rid] for rid in rids]
        suspects = [record.seq.rid for record in records if record.strikes >= _STRIKES_TO_SUSPECT and not record.out]
        return suspects[: (len(suspects) + 1) // 2]
