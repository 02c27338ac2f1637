"""The seeded script of faults: when, to which kind of process, which signal. Pure: the same arguments give the same script.

Kinds and signals come from a shuffled bag that holds each pair twice: all are hit about equally often, also in a short run, and
the same one may still be hit twice in a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KINDS = ("executor", "tokenizer", "storage", "gateway", "microkernel", "supervisor")
FAULTS = ("kill", "stop")
LEAST_PAUSE_S = 0.02
MOST_PAUSES = 5.0  # an exponential distribution has no longest pause; a run of ten seconds should still have faults


@dataclass(frozen=True)
class Planned:
    """`pause_s` after the one before it. `pick` in [0, 1) chooses among several processes of the kind."""

    pause_s: float
    kind: str
    fault: str
    pick: float


def make_script(seed: int, kinds: Sequence[str], faults: Sequence[str], mean_s: float) -> Iterator[Planned]:
    """Without end. Pauses are exponentially distributed: faults do not keep a distance from each other."""
    chance = random.Random(seed)
    bag: list[tuple[str, str]] = []
    while True:
        if not bag:
            bag = [(kind, fault) for kind in kinds for fault in faults] * 2
            chance.shuffle(bag)
        kind, fault = bag.pop()
        pause = min(max(chance.expovariate(1 / mean_s), LEAST_PAUSE_S), MOST_PAUSES * mean_s)
        yield Planned(pause, kind, fault, chance.random())


class CrashLoopLimit:
    """A service that dies again and again is given up by its restart policy, as it should be: the promise holds below that limit.

    So a service may be hit `burst` times in quick succession, and once more for each `every_s` that pass; that has to be longer than
    the policy takes to forget a death. A supervisor that was killed has forgotten all of them.
    """

    def __init__(self, burst: int, every_s: float) -> None:
        self._burst = burst
        self._every_s = every_s
        self._paid_until: dict[str, float] = {}  # when the service's hits so far will be forgiven

    def delay_s(self, kind: str, now: float) -> float:
        """How long to wait before the next hit."""
        return max(0.0, self._paid_until.get(kind, 0.0) - now - (self._burst - 1) * self._every_s)

    def hit(self, kind: str, now: float) -> None:
        if kind == "supervisor":
            self._paid_until.clear()
        else:
            self._paid_until[kind] = max(now, self._paid_until.get(kind, 0.0)) + self._every_s
