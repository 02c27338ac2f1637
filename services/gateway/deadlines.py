"""Until when each request waits for the answer it waits for now, pure. All wait equally long, so the next one late is the oldest."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator


class Deadlines:
    """Requests by number. What they wait for is a phase: any value that differs from that of the phase before."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._waiting: dict[int, tuple[object, float]] = {}
        self._queue: deque[tuple[float, int]] = deque()  # entries that no longer hold stay until their time comes

    def watch(self, number: int, phase: object | None, now: float) -> None:
        """It is in this phase; if that is news, since now. None: it waits for nothing."""
        if phase is None:
            self._waiting.pop(number, None)
        elif number not in self._waiting or self._waiting[number][0] is not phase:
            until = now + self._timeout_s
            self._waiting[number] = (phase, until)
            self._queue.append((until, number))

    def late(self, now: float) -> Iterator[int]:
        """Those whose time is over, each once."""
        while self._queue and self._queue[0][0] <= now:
            _, number = self._queue.popleft()
            if number in self._waiting and self._waiting[number][1] <= now:
                del self._waiting[number]
                yield number
