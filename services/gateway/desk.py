"""Who may talk to the tokenizer now, pure.

States: open (everybody talks) -> closed (it died; who wants to talk waits) -> trying (another one is there; those who wait take
turns) -> open (nobody waits) ...

A text may be what killed it. So after a death the waiting ones talk one at a time, each until it is where it was before: if the
tokenizer dies again, it is known of what. Those that many tokenizers died of come last, so the others are served before it can
happen again. Whoever comes while turns are taken, waits too.

Invariant: everybody who waits gets a turn, and one turn holds up the others for `TURN_S` at most.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

TURN_S = 1.0


class Desk:
    """Requests by number."""

    def __init__(self) -> None:
        self._is_open = False
        self._waiting: list[tuple[int, int]] = []  # heap of (strikes, number)
        self._queued: set[int] = set()
        self._turn: int | None = None
        self._turn_until = 0.0

    def admit(self, number: int, strikes: int) -> bool:
        """It wants to talk. True: at once; else it waits. `strikes`: how many tokenizers died while they had something of it."""
        if number in self._queued:
            return False
        if self._is_open and self._turn is None and not self._waiting:
            return True
        self._queued.add(number)
        heappush(self._waiting, (max(1, strikes), number))  # newcomers behind the innocent, who are most
        return False

    def close(self) -> None:
        """The tokenizer is gone. Who wants to talk to the next one says so again."""
        self._is_open, self._turn = False, None
        self._waiting.clear()
        self._queued.clear()

    def open(self) -> None:
        self._is_open = True

    def next(self, is_busy: Callable[[int], bool], now: float) -> int | None:
        """Whose turn it is, if nobody has one: if the last one is not busy any more, or was for too long."""
        if not self._is_open or (self._turn is not None and now < self._turn_until and is_busy(self._turn)):
            return None
        self._turn = None
        if self._waiting:
            _, self._turn = heappop(self._waiting)
            self._queued.discard(self._turn)
            self._turn_until = now + TURN_S
        return self._turn
