"""Rates from counters that are read now and then.

A counter that falls was started anew: its rate is unknown until it was read once more. Rates are taken over the newest readings that
lie at least `WINDOW_S` apart, so that fast polling does not make them jump.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

WINDOW_S = 1.0
_ROUNDING_S = 0.05  # a poll that comes a little early counts as in time
K = TypeVar("K", bound=Hashable)


class Rates(Generic[K]):
    def __init__(self) -> None:
        self._readings: deque[tuple[float, Mapping[K, int]]] = deque()
        self._older: tuple[tuple[float, Mapping[K, int]], ...] = ()

    def add(self, at: float, counts: Mapping[K, int]) -> None:
        """All counters at the time `at`, in seconds; times grow."""
        self._readings.append((at, counts))
        while len(self._readings) > 2 and at - self._readings[1][0] >= WINDOW_S - _ROUNDING_S:
            self._readings.popleft()
        self._older = tuple(reversed(self._readings))[1:]

    def get(self, key: K) -> float | None:
        """Per second; None while it is unknown."""
        if not self._readings:
            return None
        now, counts = self._readings[-1]
        newest = counts.get(key)
        if newest is None:
            return None
        first_at, first = now, newest
        for at, counts in self._older:
            count = counts.get(key)
            if count is None or count > first:
                break
            first_at, first = at, count
        return (newest - first) / (now - first_at) if now > first_at else None
