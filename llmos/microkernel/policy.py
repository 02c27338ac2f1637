"""Policies: who goes first and who gives way. The step loop and the queue ask; they decide nothing themselves.

`FairShare` (configuration "fair"): five priority classes by `nice` with ageing, inside a class the tenant with the smallest virtual
token counter (tenants.py), inside a tenant the earliest deadline, then the job that arrived first. `FirstCome` ("fcfs"): arrival.
"""

from __future__ import annotations

from typing import Protocol

from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import Tenant
from llmos.protocol.limits import MAX_NICE, MIN_NICE

NUM_CLASSES = 5
_NO_DEADLINE = float("inf")

Rank = tuple[float, ...]  # compared like tuples are; the smallest goes first


class Policy(Protocol):
    """Pure functions of what they are given."""

    num_classes: int

    def level(self, seq: Sequence) -> int:
        """Priority class of a sequence that begins to wait: 0 (best) .. num_classes - 1."""
        ...

    def order(self, seq: Sequence) -> Rank:
        """Order between waiting sequences of one tenant and class. Must not change while it waits, or it is pushed anew."""
        ...

    def tenant_rank(self, tenant: Tenant, head: Sequence) -> Rank:
        """Order between tenants of one class, each with its first waiting sequence."""
        ...

    def preemption_rank(self, seq: Sequence) -> Rank:
        """Order between running sequences when pages are short: the greatest gives way."""
        ...


class FairShare:
    """See the module docstring."""

    num_classes = NUM_CLASSES

    def level(self, seq: Sequence) -> int:
        return priority_class(seq.nice)

    def order(self, seq: Sequence) -> Rank:
        return (_NO_DEADLINE if seq.deadline is None else seq.deadline, seq.job.rid, seq.rid)

    def tenant_rank(self, tenant: Tenant, head: Sequence) -> Rank:
        return (tenant.counter, tenant.index)

    def preemption_rank(self, seq: Sequence) -> Rank:
        return (priority_class(seq.nice), seq.rid)


class FirstCome:
    """Arrival, whoever asks. Tenants' limits and guarantees still hold."""

    num_classes = 1

    def level(self, seq: Sequence) -> int:
        return 0

    def order(self, seq: Sequence) -> Rank:
        return (seq.rid,)

    def tenant_rank(self, tenant: Tenant, head: Sequence) -> Rank:
        return (head.rid,)

    def preemption_rank(self, seq: Sequence) -> Rank:
        return (seq.rid,)


POLICIES: dict[str, type[FairShare] | type[FirstCome]] = {"fair": FairShare, "fcfs": FirstCome}


def priority_class(nice: int) -> int:
    """Eight steps of nice a class."""
    assert MIN_NICE <= nice <= MAX_NICE
    return (nice - MIN_NICE) // ((MAX_NICE - MIN_NICE + 1) // NUM_CLASSES)
