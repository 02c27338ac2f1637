"""Budgets and counters of one model's scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Budgets from the configuration (llmos.config has units and meanings), bounded by what the executor can do."""

    max_rows: int = 256
    max_step_tokens: int = 2048
    steps_in_flight: int = 2
    client_window_tokens: int = 4096
    prefix_cache: bool = True
    share_prefixes: bool = False  # between tenants
    policy: str = "fair"
    ageing_s: float = 30.0
    target_step_s: float = 0.0  # 0 = no limit but `max_step_tokens`


@dataclass(frozen=True, slots=True)
class KernelLimits:
    """Budgets of the whole microkernel. `max_waiting` is per model."""

    max_waiting: int = 100_000
    retention_s: float = 600.0
    idle_timeout_s: float = 3600.0
    linger_s: float = 30.0


@dataclass(slots=True)
class SchedulerCounters:
    steps: int = 0
    steady_steps: int = 0  # of these, planned by the fast path
    tokens_committed: int = 0
    preemptions: int = 0
    swaps_out: int = 0
    swaps_in: int = 0
    pages_copied: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    deadline_misses: int = 0
