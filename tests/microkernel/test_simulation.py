"""The seeded simulation (tests/support/simulation): a fixed share of what `python bench/simulate.py` runs at length.

A failing seed is cut down to the events that are needed, and says how to see it again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
from simulation.choose import KINDS
from simulation.events import Event, from_list
from simulation.run import Life, replay, setup_of
from simulation.shrink import Violation, attempt, find, leave_out, shrink, story

from llmos.codes import FinishReason
from llmos.microkernel.holdings import Holdings

SEEDS = range(112)
EVENTS = 700
SCRIPT = Path(__file__).parents[2] / "bench" / "simulate.py"


@lru_cache
def lived(seed: int) -> tuple[Life | None, Violation | None]:
    return find(seed, EVENTS)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_life(seed: int):
    _, violation = lived(seed)
    if violation is not None:
        pytest.fail(story(seed, EVENTS, setup_of(seed), shrink(setup_of(seed), violation)), pytrace=False)


def test_these_lives_reach_everything():
    """A simulation in which nothing happens finds nothing."""
    kinds, reasons, counts, events = Counter(), Counter(), Counter(), 0
    for seed in SEEDS:
        life, _ = lived(seed)
        assert life is not None
        events += life.count
        kinds.update(event.kind for event in life.events)
        reasons.update(known.reason for known in life.world.ledger.all)
        for lane in life.world.kernel.state.lanes.values():
            counters = lane.scheduler.counters
            counts.update({name: getattr(counters, name) for name in counters.__slots__})
            counts["dropped"] += lane.results_dropped
    assert events > 60_000
    assert set(KINDS) == set(kinds)
    rare = {FinishReason.SHUTDOWN, FinishReason.POISONED, FinishReason.JOURNAL_CORRUPT}
    rare |= {FinishReason.GRAMMAR_FAILED}  # an executor's word, which the fake one never says
    assert set(FinishReason) - set(reasons) <= rare
    least = {
        "preemptions": 200, "swaps_out": 50, "swaps_in": 20, "pages_copied": 20, "prefix_hit_tokens": 1000,
        "deadline_misses": 20, "dropped": 50, "tokens_committed": 10_000,
        "steady_steps": 300,
    }  # fmt: skip
    assert {name: counts[name] for name in least if counts[name] < least[name]} == {}


def test_a_seed_gives_the_same_life_in_every_process():
    life, _ = find(3, 300)
    assert life is not None
    for hash_seed in ("1", "2"):
        command = [sys.executable, str(SCRIPT), "--seed", "3", "--events-per-seed", "300"]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        )
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["digest"] == f"{life.digest:08x}"
        assert (result["events"], result["violations"]) == (life.count, 0)


def test_a_life_is_its_list_of_events():
    life, _ = find(4, 300)
    assert life is not None
    events = [from_list(json.loads(json.dumps(event.as_list()))) for event in life.events]
    again = replay(life.setup, events)
    assert (again.digest, again.count) == (life.digest, life.count)


def test_any_part_of_a_life_is_a_life():
    for seed in (5, 6):
        life, _ = find(seed, 300)
        assert life is not None
        for part in (life.events[::2], life.events[1::3], life.events[150:], [e for e in life.events if e.number % 7]):
            assert attempt(life.setup, part) is None


def test_a_violation_is_cut_down_and_told(monkeypatch: pytest.MonkeyPatch):
    """Planted: a sequence writes on in a page that others read."""
    monkeypatch.setattr(Holdings, "tail_to_copy", lambda self, seq, num_tokens: None)
    seed, violation = next((seed, found) for seed in range(50) if (found := find(seed, 300)[1]) is not None)
    small = shrink(setup_of(seed), violation)
    assert small.kind == violation.kind
    assert len(small.events) <= 12 < len(violation.events)
    assert attempt(setup_of(seed), small.events).kind == violation.kind
    for place in range(len(small.events)):  # none of them could be left out
        fewer = attempt(setup_of(seed), small.events[:place] + small.events[place + 1 :])
        assert fewer is None or fewer.kind != violation.kind
    lines = story(seed, 300, setup_of(seed), small).splitlines()
    assert lines[0] == f"replay: python bench/simulate.py --seed {seed} --events-per-seed 300"
    assert lines[1].startswith("setup ")
    assert lines[2 : 2 + len(small.events)] == [str(event) for event in small.events]
    assert lines[-1] == small.text


def test_leave_out_finds_the_two_that_matter():
    events = [Event(number, "time") for number in range(100)]
    tries = 0

    def still_fails(rest: list[Event]) -> bool:
        nonlocal tries
        tries += 1
        return {3, 77} <= {event.number for event in rest}

    assert [event.number for event in leave_out(events, still_fails, lambda: True)] == [3, 77]
    assert tries < 60


def test_an_event_reads_well():
    event = Event(17, "fork", 0.01, {"gate": "g1", "seq": "4.1", "count": 2, "owner": None})
    assert str(event) == "#17    +0.01s   fork         gate=g1 seq=4.1 count=2"
