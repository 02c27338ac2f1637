"""How long a run lasts and how its learning rate moves.

Invariants: progress is in [0, 1] and never falls; at progress 1 the run is over and the rate is 0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

Schedule = tuple[tuple[float, float], ...]  # (progress, share of the full learning rate), in order

FIRST_REST = 0.3  # share of a fresh run after which its first cycle has cooled down
# Warm up, hold, cool down, warm up again, hold, cool down to nothing.
FRESH: Schedule = ((0.0, 0.05), (0.01, 1.0), (0.2, 1.0), (FIRST_REST, 0.05), (0.32, 1.0), (0.55, 1.0), (1.0, 0.0))
# A run that goes on from an exported model has cold optimizers and warm weights: one cycle.
CONTINUED: Schedule = ((0.0, 0.05), (0.04, 0.8), (0.35, 0.8), (1.0, 0.0))


@dataclass(frozen=True, slots=True)
class Limits:
    """The run ends at whichever limit comes first; None is no limit."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, started: float) -> float:
        shares = [0.0]
        if self.steps is not None:
            shares.append(step / self.steps)
        if self.minutes is not None:
            shares.append((time.monotonic() - started) / (60 * self.minutes))
        return min(1.0, max(shares))


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int  # of the training text
    limits: Limits
    schedule: Schedule
    batch_tokens: int = 4096
    focus: tuple[str, ...] = ()  # tasks that the training text has more of

    def learning_rate_share(self, progress: float) -> float:
        for (left, low), (right, high) in pairwise(self.schedule):
            if progress <= right:
                return low + (high - low) * (progress - left) / (right - left)
        return self.schedule[-1][1]
