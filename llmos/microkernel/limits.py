"""Budgets and counters of one model's scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Budgets from the configuration, already bounded by what the executor can do."""

    max_rows: int
    max_step_tokens: int
    steps_in_flight: int
    client_window_tokens: int
    prefix_cache: bool
    ageing_s: float


@dataclass(slots=True)
class SchedulerCounters:
    steps: int = 0
    tokens_committed: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    deadline_misses: int = 0
