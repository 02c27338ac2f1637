"""The microkernel dies after each event of a life, once each and all at once (T3). A fixed share; 200 lives of 40 events:

python bench/simulate.py --crash-everywhere --seeds 200 --events-per-seed 40 --jobs 2
"""

from __future__ import annotations

import pytest
from simulation.everywhere import crash_after, crashes
from simulation.run import live, setup_of
from simulation.shrink import attempt, shrink, story

from llmos.microkernel.recovery import Fold

EVENTS = 20


@pytest.mark.parametrize("seed", [1, 7])
def test_nothing_is_lost_wherever_it_dies(seed: int) -> None:
    lives = 0
    for _, violation in crashes(seed, EVENTS):
        lives += 1
        if violation is not None:
            pytest.fail(story(seed, EVENTS, setup_of(seed), shrink(setup_of(seed), violation)), pytrace=False)
    assert lives == EVENTS + 2


def test_the_crash_is_where_it_should_be() -> None:
    setup, events = setup_of(7), live(7, EVENTS).events
    made = crash_after(setup, events, {0, 3, EVENTS})
    where = [place for place, event in enumerate(made) if event.kind == "crash" and event not in events]
    more = 1 + len(setup.models)
    assert where == [0, 3 + more, EVENTS + 2 * more]
    assert [event for event in made if event.number < 1_000_000] == events


def test_a_token_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the last token of each step is not read back."""
    real = Fold._tokens

    def forgets(fold: Fold, record) -> None:
        real(fold, type(record)(record.columns[:-24]))

    monkeypatch.setattr(Fold, "_tokens", forgets)
    found = next(violation for _, violation in crashes(7, EVENTS) if violation is not None)
    assert attempt(setup_of(7), list(found.events)) is not None
