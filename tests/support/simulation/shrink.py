"""The shortest life that still fails: leave out chunks of its events, large ones first, as long as the same violation comes.

That is the delta debugging of Zeller and Hildebrandt 2002 ("Simplifying and Isolating Failure-Inducing Input"), with a limit on time.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmos.errors import LlmosError
from simulation.events import Event
from simulation.run import Life, live, replay
from simulation.setup import Setup

VIOLATIONS = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    LlmosError,
    TypeError,
    ValueError,
    RuntimeError,
)


@dataclass(frozen=True)
class Violation:
    """`kind`: the exception and where it was raised: what counts as the same. `text`: for people."""

    kind: tuple[str, str, str]
    text: str
    events: tuple[Event, ...]


def violation_of(error: BaseException, events: Iterable[Event]) -> Violation:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    text = f"{type(error).__name__} in {frame.name} ({where}): {error or frame.line}"
    return Violation((type(error).__name__, frame.filename, frame.name), text, tuple(events))


def find(seed: int, num_events: int) -> tuple[Life | None, Violation | None]:
    """Live a seed's life; one of the two comes back."""
    try:
        return live(seed, num_events), None
    except VIOLATIONS as error:
        return None, violation_of(error, error.life.events)  # type: ignore[attr-defined]


def attempt(setup: Setup, events: Iterable[Event]) -> Violation | None:
    """What goes wrong with these events."""
    events = list(events)
    try:
        replay(setup, events)
    except VIOLATIONS as error:
        return violation_of(error, events)
    return None


def shrink(setup: Setup, violation: Violation, limit_s: float = 60.0) -> Violation:
    """A violation of the same kind with as few events as could be found in the time."""
    best = violation
    ends_at = time.monotonic() + limit_s

    def still_fails(events: list[Event]) -> bool:
        nonlocal best
        found = attempt(setup, events)
        if found is None or found.kind != violation.kind:
            return False
        best = found
        return True

    leave_out(list(violation.events), still_fails, lambda: time.monotonic() < ends_at)
    return best


def leave_out(
    events: list[Event], still_fails: Callable[[list[Event]], bool], may_go_on: Callable[[], bool]
) -> list[Event]:
    """Chunks of half the list, of a quarter, ..., of one; from the end, because what came late is needed least often."""
    size = max(1, len(events) // 2)
    while may_go_on():
        shorter = False
        start = ((len(events) - 1) // size) * size
        while start >= 0 and may_go_on():
            rest = events[:start] + events[start + size :]
            if still_fails(rest):
                events, shorter = rest, True
            start -= size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2)
    return events


def story(seed: int, num_events: int, setup: Setup, violation: Violation) -> str:
    """How to see it again, and what happened."""
    lines = [
        f"replay: python bench/simulate.py --seed {seed} --events-per-seed {num_events}",
        str(setup),
        *map(str, violation.events),
        violation.text,
    ]
    return "\n".join(lines)
