"""Where a sequence's time goes: one stretch follows another, each with one cause, and together they are its whole life.

Invariant: the times of all causes add up to `now - born`.
"""

from __future__ import annotations

from enum import IntEnum


class Cause(IntEnum):
    """Why a stretch of time passed."""

    QUEUE = 0  # waited for its first row, or again after a suspension
    PREFILL = 1  # in a row, computing prompt or recomputing
    DECODE = 2  # in a row, a token a step
    PREEMPTED = 3  # lost its pages to others
    SUSPENDED = 4  # its owner's wish
    CLIENT = 5  # in a row and ready, but its client does not read
    FINISHED = 6
    SWAPPED = 7  # its pages went to the host
    BLOCKED = 8  # waited for input or for other sequences
    QUOTA = 9  # waited because its tenant's own limits forbade more


class Timeline:
    """Seconds by cause."""

    __slots__ = ("_cause", "_since", "_spent")

    def __init__(self, born: float, cause: Cause) -> None:
        self._spent = [0.0] * len(Cause)
        self._cause = cause
        self._since = born

    @property
    def cause(self) -> Cause:
        return self._cause

    def enter(self, cause: Cause, now: float) -> None:
        """From `now` on, time passes for another cause."""
        self._spent[self._cause] += now - self._since
        self._cause = cause
        self._since = now

    def shift(self, seconds: float, source: Cause, target: Cause) -> None:
        """Some of the time of `source` had another cause, as it turned out."""
        self._spent[source] -= seconds
        self._spent[target] += seconds

    def spent(self, now: float) -> list[float]:
        """Seconds per cause until `now`, by `Cause`."""
        spent = self._spent.copy()
        spent[self._cause] += now - self._since
        return spent
