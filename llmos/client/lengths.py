"""How many tokens open sequences have, as far as this client was told: so that after an interruption it can tell whether its last
input arrived.

A change makes the length unknown until its result is entered; of changes that overlap, only the last one's result is believed.
Somebody else who writes to the same sequence is not noticed here: a sequence has one writer at a time.
"""

from __future__ import annotations

import itertools

MOST = 4096


class Lengths:
    """By rid; those that changed first are forgotten first."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int | None]] = {}  # rid -> its last change, and its length after that
        self._changes = itertools.count(1)

    def get(self, rid: int) -> int | None:
        return self._known.get(rid, (0, None))[1]

    def change(self, rid: int) -> int:
        """The sequence is about to get another length; returns the number of this change."""
        self._known.pop(rid, None)
        change = next(self._changes)
        self._known[rid] = change, None
        if len(self._known) > MOST:
            del self._known[next(iter(self._known))]
        return change

    def enter(self, rid: int, change: int, num_tokens: int) -> None:
        """So long it was after that change."""
        if rid in self._known:
            last, _ = self._known[rid]
            self._known[rid] = last, num_tokens if last == change else None


def is_possible(before: int, after: int, token_ids: bytes | None) -> bool:
    """Can these be the lengths before and after one append, done or not? Of text nobody here knows how many tokens it makes."""
    grown = after - before
    return grown >= 0 if token_ids is None else grown in (0, len(token_ids) // 4)
