"""The microkernel's death at every place of a life: after each of its events, one after the other, and after all of them at once.

What is compared is what the ledger compares in every life (oracles.py): delivered tokens stay, each stream goes on at the next offset and
ends right, nothing is left over. The executors register again at once, so that the rest of the life is a life.
"""

from __future__ import annotations

from collections.abc import Iterator

from simulation.events import Event
from simulation.run import setup_of
from simulation.setup import Setup
from simulation.shrink import Violation, attempt, find

_FIRST_NUMBER = 2_000_000  # of events that are put in


def crash_after(setup: Setup, events: list[Event], places: set[int]) -> list[Event]:
    """The events, with a crash in front of each of these places (0: before the first)."""
    result: list[Event] = []
    number = _FIRST_NUMBER
    for place in range(len(events) + 1):
        if place in places:
            for kind, args in (("crash", {}), *(("ready", {"model": model}) for model in setup.models)):
                result.append(Event(number, kind, 0.0, args))
                number += 1
        result += events[place : place + 1]
    return result


def crashes(seed: int, num_events: int) -> Iterator[tuple[list[Event], Violation | None]]:
    """A seed's life once for each place in it, then once with a crash at all of them."""
    life, violation = find(seed, num_events)
    if life is None:
        yield [], violation
        return
    setup = setup_of(seed)
    for places in (*({place} for place in range(num_events + 1)), set(range(num_events + 1))):
        events = crash_after(setup, life.events, places)
        yield events, attempt(setup, events)
