"""Waiting sequences of one model, in the order in which they should be admitted. The policy says what that is.

Order: preempted sequences first (they hold up a stream that has begun), oldest first; then by class; inside a class by tenant; inside
a tenant by the policy's order. Ageing: who waited `ageing_s` in a class moves one class up, so nobody waits longer than
`num_classes * ageing_s` before being served as the best class is: the bound on starvation.

Costs: push, remove and renice O(log n) of the tenant's own waiting sequences; head O(tenants that wait). None depends on how many
sequences wait in all. Removed entries stay in their heap until they surface.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush

from llmos.microkernel.policy import Policy, Rank
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import Tenant


class _Lane:
    """One tenant's waiting sequences of one class: a heap with lazy deletion."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.members: dict[int, Sequence] = {}
        self._order: dict[int, Rank] = {}
        self._heap: list[tuple[Rank, int]] = []

    def push(self, seq: Sequence, order: Rank) -> None:
        self.members[seq.rid] = seq
        self._order[seq.rid] = order
        heappush(self._heap, (order, seq.rid))

    def remove(self, seq: Sequence) -> None:
        del self.members[seq.rid], self._order[seq.rid]

    def head(self) -> Sequence:
        while True:
            order, rid = self._heap[0]
            if self._order.get(rid) == order:
                return self.members[rid]
            heappop(self._heap)


class RunQueue:
    """See the module docstring."""

    def __init__(self, policy: Policy, ageing_s: float) -> None:
        self.ageing_s = ageing_s
        self._policy = policy
        self._preempted: OrderedDict[int, Sequence] = OrderedDict()
        self._lanes: list[dict[str, _Lane]] = [{} for _ in range(policy.num_classes)]
        self._entered: list[OrderedDict[int, tuple[float, Sequence]]] = [
            OrderedDict() for _ in range(policy.num_classes)
        ]
        self._class_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._preempted) + len(self._class_of)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted.values()
        for entered in self._entered:
            yield from (seq for _, seq in entered.values())

    def push(self, seq: Sequence, tenant: Tenant, now: float) -> None:
        """A new sequence, or one whose nice value changed."""
        self._enter(seq, tenant, self._policy.level(seq), now)

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
        lane.remove(seq)
        if not lane.members:
            del self._lanes[level][seq.owner]

    def age(self, now: float) -> None:
        """Move up who waited long enough. O(1) plus the moves; a sequence moves at most num_classes - 1 times."""
        for level in range(1, self._policy.num_classes):
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
        owners = set()
        for seq in self._preempted.values():
            if seq.owner not in owners:
                owners.add(seq.owner)
                yield seq
        for lanes in self._lanes:
            heads = [(self._policy.tenant_rank(lane.tenant, lane.head()), lane) for lane in lanes.values()]
            for _, lane in sorted(heads, key=lambda ranked: ranked[0]):
                yield lane.head()

    def _enter(self, seq: Sequence, tenant: Tenant, level: int, now: float) -> None:
        lane = self._lanes[level].get(seq.owner)
        if lane is None:
            lane = self._lanes[level][seq.owner] = _Lane(tenant)
        lane.push(seq, self._policy.order(seq))
        self._entered[level][seq.rid] = (now, seq)
        self._class_of[seq.rid] = level
