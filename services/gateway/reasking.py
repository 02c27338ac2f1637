"""Whose questions a microkernel that has just come back is still to be asked, pure.

All at once, thousands of answers would lie in front of the tokens of those that run again. So at most `AT_ONCE` of them are unanswered
at a time, and who had output before comes first. Whoever wants to ask meanwhile lines up behind the others: the microkernel gives a
sequence to the reader that asked last, which has to be the one that came last.

States: idle (everybody asks at once) -> asking (`begin`) -> idle (all were asked). Invariant: a request is in line once at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

AT_ONCE = 128


class Reasking:
    """Requests by number."""

    def __init__(self) -> None:
        self._line: deque[int] = deque()
        self._in_line: set[int] = set()
        self._unanswered: set[int] = set()

    def begin(self, numbers: Iterable[int]) -> None:
        """These are to be asked again, in this order."""
        self.stop()
        for number in numbers:
            self.join(number)

    def stop(self) -> None:
        """There is nobody to ask any more."""
        self._line.clear()
        self._in_line.clear()
        self._unanswered.clear()

    def holds_up(self, number: int) -> bool:
        """Does this one have to wait for its turn to ask?"""
        return bool(self._line) and number not in self._unanswered

    def join(self, number: int) -> None:
        if number not in self._in_line:
            self._in_line.add(number)
            self._line.append(number)

    def answered(self, number: int) -> None:
        """Nothing is to be asked for it any more. Idempotent, for any number."""
        self._unanswered.discard(number)

    def next(self) -> int | None:
        """Whose turn it is now; it is unanswered from now on."""
        if not self._line or len(self._unanswered) >= AT_ONCE:
            return None
        number = self._line.popleft()
        self._in_line.discard(number)
        self._unanswered.add(number)
        return number
