"""What the faults did to the requests: violations, requests hit and stalls by kind of fault. Pure.

A stall is the time between two events that a client saw of one request. It counts for the first fault within it; if there was none,
for the last fault before it. Of each request a fault has one stall, the longest. A violation counts for the last fault before it.
A request is hit by all faults between its asking and its end.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.judge import Verdict, Violation
from chaos.output import HARMS

IN_FLIGHT_S = 0.05  # so much later a client may still see what was on its way when the fault struck
MOST_VIOLATIONS = 200
MOST_STALLS = 10
NO_FAULT = "before any fault"
Cause = tuple[str, str]  # kind of process, signal


@dataclass
class Fault:
    """One that was injected. `recovered_at`: the service ran again, by llmosd's own status. `noticed` False: a stopped process that
    had to be continued, because nobody replaced it."""

    kind: str
    fault: str
    service: str
    pid: int
    at: float
    recovered_at: float | None = None
    noticed: bool = True

    @property
    def cause(self) -> Cause:
        return self.kind, self.fault


@dataclass(frozen=True, order=True)
class Stall:
    """A gap in what a client saw of one request, and what it counts for."""

    seconds: float
    begin: float
    client: int
    req: int
    verb: str
    cause: Cause


@dataclass
class Row:
    """One line of the table."""

    injected: int = 0
    recovered: int = 0
    unnoticed: int = 0
    hit: int = 0
    harms: Counter[str] = field(default_factory=Counter)
    stalls: list[float] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)

    def add(self, other: Row) -> None:
        self.injected += other.injected
        self.recovered += other.recovered
        self.unnoticed += other.unnoticed
        self.hit += other.hit
        self.harms += other.harms
        self.stalls += other.stalls
        self.recoveries += other.recoveries

    def summary(self) -> dict[str, Any]:
        return {
            "injected": self.injected, "recovered": self.recovered, "unnoticed": self.unnoticed,
            "recovery_p50_s": percentile(self.recoveries, 0.5), "recovery_max_s": max(self.recoveries, default=0.0),
            "requests_hit": self.hit, **{harm: self.harms[harm] for harm in HARMS},
            "stall_p50_s": percentile(self.stalls, 0.5), "stall_p99_s": percentile(self.stalls, 0.99),
            "stall_max_s": max(self.stalls, default=0.0),
        }  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed; 0 of nothing."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Tally:
    """`fault` before it strikes, `violation` and `verdict` as the judge gives them."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.violations: list[Violation] = []
        self.num_violations = 0
        self.requests: Counter[str] = Counter()  # by verb
        self.accepted = self.tokens = self.refusals = 0
        self._times: list[float] = []
        self._hit: Counter[Cause] = Counter()
        self._harms: dict[Cause | None, Counter[str]] = defaultdict(Counter)
        self._stalls: dict[Cause, list[float]] = defaultdict(list)
        self._counted: set[tuple[int, int, str]] = set()
        self.longest: list[Stall] = []

    def fault(self, fault: Fault) -> None:
        assert not self._times or fault.at >= self._times[-1]
        self.faults.append(fault)
        self._times.append(fault.at)

    def violation(self, violation: Violation) -> None:
        """A request counts once for each kind of harm, however much of it there was."""
        self.num_violations += 1
        if len(self.violations) < MOST_VIOLATIONS:
            self.violations.append(violation)
        case = (violation.client, violation.req, violation.harm)
        if case not in self._counted:
            self._counted.add(case)
            last = self._last_before(violation.at)
            self._harms[None if last is None else last.cause][violation.harm] += 1

    def verdict(self, verdict: Verdict) -> None:
        self.requests[verdict.verb] += 1
        self.accepted += verdict.accepted
        self.tokens += verdict.tokens
        self.refusals += verdict.refusals
        moments = verdict.moments
        if not moments:
            return
        first, last = bisect.bisect_left(self._times, moments[0]), bisect.bisect_right(self._times, moments[-1])
        for fault in self.faults[first:last]:
            self._hit[fault.cause] += 1
        longest: dict[int, Stall] = {}
        for begin, end in itertools.pairwise(moments):
            index = self._blame(begin, end)
            if index is not None and (index not in longest or end - begin > longest[index].seconds):
                where = (verdict.client, verdict.req, verdict.verb)
                longest[index] = Stall(end - begin, begin, *where, self.faults[index].cause)
        for stall in longest.values():
            self._stalls[stall.cause].append(stall.seconds)
        self.longest = heapq.nlargest(MOST_STALLS, [*self.longest, *longest.values()])

    @property
    def longest_stall(self) -> float:
        return self.longest[0].seconds if self.longest else 0.0

    def _blame(self, begin: float, end: float) -> int | None:
        """Which fault this gap counts for."""
        inside = bisect.bisect_left(self._times, begin - IN_FLIGHT_S)
        if inside < len(self._times) and self._times[inside] <= end:
            return inside
        return inside - 1 if inside else None

    def _last_before(self, at: float) -> Fault | None:
        index = bisect.bisect_right(self._times, at) - 1
        return self.faults[index] if index >= 0 else None

    # ------------------------------------------------------------ results

    @property
    def harmed(self) -> int:
        """All that must be 0."""
        return sum(counter.total() for counter in self._harms.values())

    def harm(self, name: str) -> int:
        return sum(counter[name] for counter in self._harms.values())

    def rows(self) -> dict[Cause, Row]:
        """One per kind and signal, in the order of their first fault; what went wrong before any fault is a row of its own."""
        rows: dict[Cause, Row] = {}
        if None in self._harms:
            rows[NO_FAULT, ""] = Row(harms=Counter(self._harms[None]))
        for fault in self.faults:
            row = rows.setdefault(fault.cause, Row())
            row.injected += 1
            row.unnoticed += not fault.noticed
            if fault.recovered_at is not None:
                row.recovered += 1
                row.recoveries.append(fault.recovered_at - fault.at)
        for cause, row in rows.items():
            row.hit += self._hit[cause]
            row.harms += self._harms.get(cause, Counter())
            row.stalls += self._stalls[cause]
        return rows

    def total(self) -> Row:
        total = Row()
        for row in self.rows().values():
            total.add(row)
        return total
