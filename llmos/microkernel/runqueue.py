"""Waiting sequences of one model, first come first served; preempted ones come back to the front.

Every operation is O(1): a scheduling step costs the same with 10 or 100,000 sequences waiting (promise P7).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from llmos.microkernel.sequence import Sequence


class RunQueue:
    """Ordered map rid -> sequence."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting.values())

    def push(self, seq: Sequence) -> None:
        self._waiting[seq.rid] = seq

    def push_front(self, seq: Sequence) -> None:
        self._waiting[seq.rid] = seq
        self._waiting.move_to_end(seq.rid, last=False)

    def peek(self) -> Sequence:
        return next(iter(self._waiting.values()))

    def remove(self, seq: Sequence) -> None:
        del self._waiting[seq.rid]
