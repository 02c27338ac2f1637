"""What a seed decides before anything happens: the machine, the configuration, and which kinds of events are frequent."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from llmos.microkernel.limits import KernelLimits, SchedulerLimits
from llmos.microkernel.tenants import TenantLimits
from llmos.protocol.limits import UNLIMITED

OWNERS = ("alice", "bob", "carol", "dave")
NO_WINDOW = 10**6


@dataclass(frozen=True)
class Setup:
    """One machine."""

    models: tuple[str, ...] = ("demo",)
    num_pages: int = 32
    page_size: int = 4
    host_pages: int = 0
    swap_us: float = 1.0
    max_rows: int = 8
    max_step_tokens: int = 32
    max_context: int = 120
    steps_in_flight: int = 2
    window: int = NO_WINDOW
    prefix_cache: bool = True
    share_prefixes: bool = False
    policy: str = "fair"
    ageing_s: float = 30.0
    target_step_s: float = 0.0
    max_waiting: int = 1000
    retention_s: float = 600.0
    idle_timeout_s: float = 3600.0
    linger_s: float = 30.0
    max_live: int = 20
    stored: tuple[tuple[str, TenantLimits], ...] = ()  # what storage knows of earlier lives

    @property
    def kernel_limits(self) -> KernelLimits:
        return KernelLimits(self.max_waiting, self.retention_s, self.idle_timeout_s, self.linger_s)

    @property
    def scheduler_limits(self) -> SchedulerLimits:
        return SchedulerLimits(
            max_rows=self.max_rows, max_step_tokens=self.max_step_tokens, steps_in_flight=self.steps_in_flight,
            client_window_tokens=self.window, prefix_cache=self.prefix_cache, share_prefixes=self.share_prefixes,
            policy=self.policy, ageing_s=self.ageing_s, target_step_s=self.target_step_s,
        )  # fmt: skip

    def __str__(self) -> str:
        default = Setup()
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return "setup " + " ".join(f"{name}={value}" for name, value in changed.items())


def draw_setup(rng: random.Random) -> Setup:
    """Any machine, from one on which almost nothing fits to a comfortable one."""
    page_size = rng.choice((1, 2, 3, 4, 8, 16))
    slots = rng.choice((rng.randint(4, 24), rng.randint(24, 60), rng.randint(40, 120), rng.randint(90, 300)))
    num_pages = max(1, slots // page_size)
    host_pages = rng.choice((0, rng.randint(1, 4), rng.randint(1, num_pages), rng.randint(1, 2 * num_pages)))
    return Setup(
        models=("demo", "tiny") if rng.random() < 0.25 else ("demo",),
        num_pages=num_pages,
        page_size=page_size,
        host_pages=host_pages,
        swap_us=rng.choice((0.0, 1.0, 1.0, 1.0, 200.0, 1e6)),
        max_rows=rng.choice((1, 2, 3, 5, 8, 12)),
        max_step_tokens=rng.choice((1, 2, 3, 5, 8, 16, 40)),
        max_context=rng.choice((6, 24, 60, 60, 120, 120, 120)),
        steps_in_flight=rng.randint(1, 4),
        window=rng.choice((1, 3, 8, NO_WINDOW, NO_WINDOW)),
        prefix_cache=rng.random() < 0.75,
        share_prefixes=rng.random() < 0.4,
        policy=rng.choice(("fair", "fair", "fcfs")),
        ageing_s=rng.choice((0.02, 1.0, 30.0)),
        target_step_s=rng.choice((0.0, 0.0, 0.0005, 0.004)),
        max_waiting=rng.choice((2, 1000, 1000, 1000)),
        retention_s=rng.choice((0.05, 2.0, 600.0)),
        idle_timeout_s=rng.choice((0.5, 20.0, 3600.0)),
        linger_s=rng.choice((0.1, 2.0, 30.0)),
        max_live=rng.choice((3, 8, 14, 20, 24)),
        stored=_draw_stored(rng, num_pages) if rng.random() < 0.3 else (),
    )


def _draw_stored(rng: random.Random, num_pages: int) -> tuple[tuple[str, TenantLimits], ...]:
    return tuple((name, replace(TenantLimits(), **draw_limit(rng, num_pages))) for name in rng.sample(OWNERS, 2))


def draw_limit(rng: random.Random, num_pages: int) -> dict[str, Any]:
    """A change of one limit of a tenant."""
    return rng.choice(
        (
            {"weight": rng.choice((0.5, 1.0, 3.0))},
            {"max_pages": rng.choice((num_pages // 3, num_pages // 2, num_pages, UNLIMITED))},
            {"guaranteed_pages": rng.choice((0, 0, num_pages // 8, num_pages // 4, num_pages // 2))},
            {"max_running": rng.choice((0, 1, 2, UNLIMITED))},
            {"max_waiting": rng.choice((0, 2, UNLIMITED))},
            {"tokens_per_s": rng.choice((0.0, 0.0, 3.0, 30.0, 1000.0))},
        )
    )
