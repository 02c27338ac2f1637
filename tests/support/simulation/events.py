"""An event of a simulated life, as data: it says everything that the driver of the kernel would say, and nothing of what follows.

Sequences are named by the event that made them: "17" was made by event 17, "20.1" is the second child of the fork in event 20. An event
about a sequence that does not exist (because the event that made it was left out, or refused) does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """`dt` seconds pass, then it happens."""

    number: int
    kind: str
    dt: float = 0.0
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        args = " ".join(f"{name}={value}" for name, value in self.args.items() if value not in (None, (), []))
        return f"#{self.number:<5} {f'+{self.dt:g}s' if self.dt else '':8} {self.kind:12} {args}"

    def as_list(self) -> list[Any]:
        """For a JSON file."""
        return [self.number, self.kind, self.dt, self.args]


def from_list(row: list[Any]) -> Event:
    """The inverse of `Event.as_list`."""
    number, kind, dt, args = row
    return Event(number, kind, dt, args)
