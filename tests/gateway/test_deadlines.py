"""Waiting for an answer, phase by phase."""

from __future__ import annotations

from llmos.services.gateway.deadlines import Deadlines


def test_each_phase_has_its_time() -> None:
    deadlines = Deadlines(10.0)
    deadlines.watch(1, "encoding", 0.0)
    deadlines.watch(1, "encoding", 4.0)  # no news
    deadlines.watch(2, "encoding", 5.0)
    assert list(deadlines.late(9.9)) == []
    deadlines.watch(1, "submitted", 9.0)
    assert list(deadlines.late(14.9)) == []
    assert list(deadlines.late(15.0)) == [2]
    assert list(deadlines.late(19.0)) == [1]
    assert list(deadlines.late(1e9)) == []


def test_who_waits_for_nothing_is_never_late() -> None:
    deadlines = Deadlines(10.0)
    deadlines.watch(1, "encoding", 0.0)
    deadlines.watch(1, None, 1.0)
    deadlines.watch(2, None, 1.0)
    assert list(deadlines.late(1e9)) == []


def test_a_pause_begins_the_time_anew() -> None:
    deadlines = Deadlines(10.0)
    for now in (0.0, 8.0, 16.0):
        deadlines.watch(1, "resuming", now)
        assert list(deadlines.late(now + 7.9)) == []
        deadlines.watch(1, None, now + 7.9)
    deadlines.watch(1, "resuming", 30.0)
    assert list(deadlines.late(39.9)) == []
    assert list(deadlines.late(40.0)) == [1]


def test_the_late_ones_may_begin_another_phase_at_once() -> None:
    deadlines = Deadlines(10.0)
    deadlines.watch(1, "a", 0.0)
    deadlines.watch(2, "a", 0.0)
    for number in deadlines.late(10.0):
        deadlines.watch(number, "b", 10.0)
    assert list(deadlines.late(20.0)) == [1, 2]
