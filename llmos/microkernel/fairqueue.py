"""Waiting sequences of one model, in the order in which they should be admitted.

Order: preempted sequences first (they hold up a stream that has begun), oldest first; then by priority class; inside a class the
tenant with the smallest virtual token counter (tenants.py); inside a tenant the earliest deadline, then arrival. Classes come from
`nice` (-20 best .. 19 worst, eight steps a class). Ageing: who waited `ageing_s` in a class moves one class up, so nobody waits
longer than `NUM_CLASSES * ageing_s` before being served as the best class is: the bound on starvation.

Costs: push, remove and renice O(log n) of the tenant's own waiting sequences; head O(tenants that wait). None depends on how many
sequences wait in all. Removed entries stay in their heap until they surface.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush

from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import Tenant
from llmos.protocol.limits import MAX_NICE, MIN_NICE

NUM_CLASSES = 5
_NO_DEADLINE = float("inf")


def priority_class(nice: int) -> int:
    """0 (best) .. NUM_CLASSES - 1."""
    assert MIN_NICE <= nice <= MAX_NICE
    return (nice - MIN_NICE) // ((MAX_NICE - MIN_NICE + 1) // NUM_CLASSES)


class _Lane:
    """One tenant's waiting sequences of one class: a heap with lazy deletion."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.members: dict[int, Sequence] = {}
        self._heap: list[tuple[float, int, Sequence]] = []

    def push(self, seq: Sequence) -> None:
        self.members[seq.rid] = seq
        heappush(self._heap, (_key(seq), seq.rid, seq))

    def head(self) -> Sequence:
        while True:
            key, rid, seq = self._heap[0]
            if self.members.get(rid) is seq and key == _key(seq):
                return seq
            heappop(self._heap)


def _key(seq: Sequence) -> float:
    return seq.deadline if seq.deadline is not None else _NO_DEADLINE


class FairQueue:
    """See the module docstring."""

    def __init__(self, ageing_s: float) -> None:
        self.ageing_s = ageing_s
        self._preempted: OrderedDict[int, Sequence] = OrderedDict()
        self._lanes: list[dict[str, _Lane]] = [{} for _ in range(NUM_CLASSES)]
        self._entered: list[OrderedDict[int, tuple[float, Sequence]]] = [OrderedDict() for _ in range(NUM_CLASSES)]
        self._class_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._preempted) + len(self._class_of)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted.values()
        for entered in self._entered:
            yield from (seq for _, seq in entered.values())

    def push(self, seq: Sequence, tenant: Tenant, now: float) -> None:
        """A new sequence, or one whose nice value changed."""
        self._enter(seq, tenant, priority_class(seq.nice), now)

    def push_front(self, seq: Sequence) -> None:
        """A preempted sequence. Victims come newest first, so the oldest ends up in front."""
        self._preempted[seq.rid] = seq
        self._preempted.move_to_end(seq.rid, last=False)

    def remove(self, seq: Sequence) -> None:
        if self._preempted.pop(seq.rid, None) is not None:
            return
        level = self._class_of.pop(seq.rid)
        del self._entered[level][seq.rid]
        lane = self._lanes[level][seq.owner]
        del lane.members[seq.rid]
        if not lane.members:
            del self._lanes[level][seq.owner]

    def age(self, now: float) -> None:
        """Move up who waited long enough. O(1) plus the moves; a sequence moves at most NUM_CLASSES - 1 times."""
        for level in range(1, NUM_CLASSES):
            entered = self._entered[level]
            while entered:
                since, seq = next(iter(entered.values()))
                if now - since < self.ageing_s:
                    break
                tenant = self._lanes[level][seq.owner].tenant
                self.remove(seq)
                self._enter(seq, tenant, level - 1, now)

    def is_preempted(self, seq: Sequence) -> bool:
        return seq.rid in self._preempted

    def heads(self) -> Iterator[Sequence]:
        """The best waiting sequence, then the next tenants' ones: whoever can not start does not block another tenant."""
        if self._preempted:
            yield next(iter(self._preempted.values()))
        for lanes in self._lanes:
            for lane in sorted(lanes.values(), key=lambda lane: (lane.tenant.counter, lane.tenant.name)):
                yield lane.head()

    def _enter(self, seq: Sequence, tenant: Tenant, level: int, now: float) -> None:
        lane = self._lanes[level].get(seq.owner)
        if lane is None:
            lane = self._lanes[level][seq.owner] = _Lane(tenant)
        lane.push(seq)
        self._entered[level][seq.rid] = (now, seq)
        self._class_of[seq.rid] = level
