"""Tenants: who shares the machine, with what rights to it, and what each has used.

Fair share is the virtual token counter of Sheng et al. 2024 ("Fairness in Serving Large Language Models", VTC): every token computed
for a tenant raises its counter by 1/weight; the tenant with the smallest counter among those that wait is served next. A tenant that
was idle starts at the smallest counter of the active ones, so that idling saves nothing up and costs nothing. While two tenants both
wait, weight-normalised service differs by at most what two sequences can get at once (the paper's Theorem 4.4; property test).

Invariants: 0 <= guaranteed_pages <= max_pages; pages, running and waiting count live sequences only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmos.errors import InvalidRequest
from llmos.protocol.limits import UNLIMITED


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may use of one model. A page counts once, however many of its page tables hold it."""

    weight: float = 1.0
    max_pages: int = UNLIMITED
    guaranteed_pages: int = 0
    max_running: int = UNLIMITED
    max_waiting: int = UNLIMITED
    tokens_per_s: float = 0.0  # 0 = no limit; a burst of one second's tokens is allowed

    def check(self) -> None:
        """Raise `InvalidRequest` if the values, each in range (protocol/checks.py), contradict each other."""
        if self.guaranteed_pages > self.max_pages:
            raise InvalidRequest(
                f"guaranteed_pages {self.guaranteed_pages} is above max_pages {self.max_pages}",
                field="guaranteed_pages",
            )


@dataclass(slots=True)
class Tenant:
    """A tenant's limits and use on one model."""

    name: str
    limits: TenantLimits = field(default_factory=TenantLimits)
    pages: int = 0
    running: int = 0
    waiting: int = 0
    tokens: int = 0  # computed for it, prompt and output
    counter: float = 0.0  # virtual: tokens / weight, lifted when it comes back from idling
    index: int = 0  # its place in the table
    _rate_from: float = 0.0  # token bucket: all tokens before this moment are paid for
    _limited_s: float = 0.0  # how long its own limits kept its waiting sequences from starting
    _limited_since: float | None = None

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)

    def charge(self, tokens: int, now: float) -> None:
        """`tokens` were computed for it."""
        self.tokens += tokens
        self.counter += tokens / self.limits.weight
        if self.limits.tokens_per_s:
            self._rate_from = max(self._rate_from, now - 1.0) + tokens / self.limits.tokens_per_s

    def over_rate(self, now: float) -> bool:
        """True while it has computed more than its token rate allows."""
        return bool(self.limits.tokens_per_s) and self._rate_from > now

    def may_start(self, now: float) -> bool:
        """Do its own limits, but for pages, allow one more running sequence?"""
        return self.running < self.limits.max_running and not self.over_rate(now)

    def note_limited(self, limited: bool, now: float) -> None:
        """Its best waiting sequence was looked at: do its own limits keep it from starting?"""
        if limited and self._limited_since is None:
            self._limited_since = now
        elif not limited and self._limited_since is not None:
            self._limited_s += now - self._limited_since
            self._limited_since = None

    def limited_s(self, now: float) -> float:
        """Seconds until `now` in which its own limits were what its waiting sequences waited for."""
        return self._limited_s + (now - self._limited_since if self._limited_since is not None else 0.0)

    def lift(self, counter: float) -> None:
        """It comes back from idling: start level with the least served."""
        self.counter = max(self.counter, counter)


class TenantTable:
    """All tenants that one model has met. Limits come from `limits_of(name)`; use is kept over executor generations."""

    def __init__(self, limits_of: Callable[[str], TenantLimits]) -> None:
        self._limits_of = limits_of
        self._by_name: dict[str, Tenant] = {}
        self.all: list[Tenant] = []
        self.has_guarantees = False
        self.has_rates = False

    def get(self, name: str) -> Tenant:
        tenant = self._by_name.get(name)
        if tenant is None:
            tenant = self._by_name[name] = Tenant(name, self._limits_of(name), index=len(self.all))
            self.all.append(tenant)
            self._note()
        return tenant

    def meet(self, names: Iterable[str]) -> None:
        """These have limits: what they are guaranteed is kept for them from now on, though they may never come."""
        for name in names:
            self.get(name)

    def refresh(self) -> None:
        """Limits changed."""
        for tenant in self.all:
            tenant.limits = self._limits_of(tenant.name)
        self._note()

    def reset(self) -> None:
        """The executor is gone: nobody runs or holds pages; what was computed stays counted."""
        for tenant in self.all:
            tenant.pages = tenant.running = tenant.waiting = 0

    def arrive(self, tenant: Tenant) -> None:
        """One more of its sequences waits; if it was idle it starts level with the least served."""
        if tenant.idle:
            active = [other.counter for other in self.all if not other.idle]
            if active:
                tenant.lift(min(active))
        tenant.waiting += 1

    def counts(self, indices: NDArray[np.int64], weights: NDArray[np.int64] | None = None) -> list[tuple[Tenant, int]]:
        """The tenants among these table indices, each with how often it is there, or with the sum of its weights."""
        found = np.bincount(indices, weights).tolist()
        return [(tenant, int(count)) for tenant, count in zip(self.all, found) if count]

    def charge(self, counts: list[tuple[Tenant, int]], now: float) -> None:
        """A step computes so many tokens for each."""
        for tenant, tokens in counts:
            tenant.charge(tokens, now)

    def reserved(self) -> int:
        """Pages that must stay grantable for guarantees."""
        if not self.has_guarantees:
            return 0
        return sum(max(0, tenant.limits.guaranteed_pages - tenant.pages) for tenant in self.all)

    def reserved_for_others(self, tenant: Tenant) -> int:
        """Pages that must stay grantable for other tenants' guarantees."""
        if not self.has_guarantees:
            return 0
        return sum(max(0, other.limits.guaranteed_pages - other.pages) for other in self.all if other is not tenant)

    def guaranteed_to_others(self, tenant: Tenant) -> int:
        """Pages that this tenant can never count on."""
        return sum(other.limits.guaranteed_pages for other in self.all if other is not tenant)

    def _note(self) -> None:
        self.has_guarantees = any(tenant.limits.guaranteed_pages for tenant in self.all)
        self.has_rates = any(tenant.limits.tokens_per_s for tenant in self.all)
