"""How long to go on trying, and how often. Pure: time is an argument.

A request that is interrupted again and again without getting anywhere must end some day, however promptly the gateway comes back each
time: it may be what kills it.
"""

from __future__ import annotations

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.3  # a second would be a third of the longest pause that a restart should cost
GROWTH = 1.5  # what is back after t seconds is found after less than 1.5 t
STEADY_S = 5.0  # an interruption after so long a quiet time is the first of a new row


class Pauses:
    """Between attempts: they grow."""

    def __init__(self) -> None:
        self._next = FIRST_PAUSE_S

    def next(self) -> float:
        pause = self._next
        self._next = min(GROWTH * pause, LONGEST_PAUSE_S)
        return pause

    def reset(self) -> None:
        self._next = FIRST_PAUSE_S


class Patience:
    """Of one request that is asked for again after each interruption, for `limit_s` at most without getting any further."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: float | None = None
        self._asked_at = 0.0
        self._pauses = Pauses()

    def asked(self, now: float) -> None:
        self._asked_at = now

    def interrupted(self, now: float, *, progressed: bool, accepted: bool) -> float | None:
        """The pause before the next attempt, None if it is enough. `progressed`, `accepted`: since it was last asked for."""
        is_first = self._since is None or progressed or (accepted and now - self._asked_at >= STEADY_S)
        if is_first:
            self._since = now
            self._pauses.reset()
        assert self._since is not None
        if self._limit_s <= 0 or now - self._since >= self._limit_s:
            return None
        return 0.0 if is_first else self._pauses.next()
