"""Who talks to the microkernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sender:
    """Who a message came from. `peer` is never reused and above 0."""

    peer: int
    role: str
    name: str
    pid: int = 0  # 0: not known
