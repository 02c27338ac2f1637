"""How long a step may take before its executor counts as hung, and how many wrong answers are too many.

A step may take `_FACTOR` times what the slowest comparable ones took: a maximum that steps of about the same shape keep up and others let
decay, so about the 99th percentile. A shape that was not seen yet is judged by those that were, by the number of tokens. It outlives the
executors of its model: the next one is not slower.
"""

from __future__ import annotations

from collections import deque

_FACTOR = 20.0
_LEAST_S = 2.0
_LONG_S = 30.0  # nobody waits longer for a step that should take less than `_LONG_S / _LONG_FACTOR`
_LONG_FACTOR = 3.0
_UNKNOWN_S = 300.0  # no step was ever seen
_DECAY = 0.01
_MOST_WRONG, _WRONG_WITHIN_S = 3, 10.0
_STALL_S = 1.0
Shape = tuple[int, int]


class StepWatch:
    """One model's. `waiting_since`: the executor has had the oldest step in flight since then."""

    def __init__(self) -> None:
        self._slow: dict[Shape, float] = {}  # seconds
        self._waiting_since = 0.0
        self._looked_at = 0.0
        self._wrong: deque[float] = deque(maxlen=_MOST_WRONG)

    def begun(self, now: float) -> None:
        """The executor has nothing older to do than a step that it was given now, or long ago."""
        self._waiting_since = now

    def done(self, num_decodes: int, num_prefill: int, now: float) -> None:
        """The oldest step in flight is done."""
        shape = _shape(num_decodes, num_prefill)
        took = max(0.0, now - self._waiting_since)
        old = self._slow.get(shape, 0.0)
        self._slow[shape] = max(took, old + _DECAY * (took - old))
        self._waiting_since = now

    def limit(self, num_decodes: int, num_prefill: int) -> float:
        """Seconds that such a step may take."""
        if not self._slow:
            return _UNKNOWN_S
        shape = _shape(num_decodes, num_prefill)
        if shape in self._slow:
            expected = self._slow[shape]
            most = _LONG_FACTOR * expected
        else:  # a token of a prompt costs no more than one of a decode step: this guess is high already
            most = expected = max(
                took * max(1.0, _tokens(shape) / _tokens(known)) for known, took in self._slow.items()
            )
        return min(max(_LEAST_S, _FACTOR * expected), max(_LONG_S, most))

    def is_overdue(self, num_decodes: int, num_prefill: int, now: float) -> bool:
        """Has the oldest step in flight, of this shape, been there for too long? To be asked all the time: if it was not, then it was us
        who slept, and the time begins anew."""
        if now - self._looked_at > _STALL_S:
            self._waiting_since = max(self._waiting_since, now)
        self._looked_at = now
        waited = now - self._waiting_since
        return waited > _LEAST_S and waited > self.limit(num_decodes, num_prefill)  # no limit is below that

    def wrong(self, now: float) -> bool:
        """The executor gave an answer that can not be right. Is it beyond hope?"""
        self._wrong.append(now)
        return len(self._wrong) == _MOST_WRONG and now - self._wrong[0] <= _WRONG_WITHIN_S

    def renew(self) -> None:
        """Another executor: it has done nothing wrong yet."""
        self._wrong.clear()


def _shape(num_decodes: int, num_prefill: int) -> Shape:
    """Alike within a factor of two."""
    return num_decodes.bit_length(), num_prefill.bit_length()


def _tokens(shape: Shape) -> int:
    return (1 << shape[0]) + (1 << shape[1])
