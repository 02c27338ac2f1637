"""How long to go on trying, by a clock of our own; and what is known of lengths."""

from __future__ import annotations

import itertools

import pytest

from llmos.client import lengths as lengths_module
from llmos.client.lengths import Lengths, is_possible
from llmos.client.patience import STEADY_S, Patience, Pauses


def test_pauses_grow_to_the_longest() -> None:
    pauses = Pauses()
    given = [pauses.next() for _ in range(12)]
    assert given[:4] == pytest.approx([0.02, 0.03, 0.045, 0.0675])
    assert given[6] < given[7] == given[11] == 0.3
    pauses.reset()
    assert pauses.next() == 0.02


def run(patience: Patience, now: float, *, progressed: bool = False, accepted: bool = False) -> float | None:
    return patience.interrupted(now, progressed=progressed, accepted=accepted)


def test_the_first_attempt_is_at_once_and_the_last_in_time() -> None:
    patience = Patience(1.0)
    patience.asked(100.0)
    assert [run(patience, now) for now in (103.0, 103.1, 103.5, 103.99, 104.0)] == [0.0, 0.02, 0.03, 0.045, None]


def test_what_gets_further_is_never_given_up() -> None:
    patience = Patience(1.0)
    for now in itertools.islice(itertools.count(10.0, 0.9), 50):
        assert run(patience, now, progressed=True) == 0.0
        assert run(patience, now + 0.5) == 0.02


def test_what_lay_quiet_for_long_begins_anew() -> None:
    """Waiting for its turn brings no tokens, but is no failure either."""
    patience = Patience(1.0)
    assert run(patience, 10.0) == 0.0
    patience.asked(10.5)
    assert run(patience, 10.5 + STEADY_S, accepted=True) == 0.0
    patience.asked(16.0)
    assert run(patience, 16.0 + STEADY_S, accepted=False) is None, "it was not even accepted"


def test_no_patience_at_all() -> None:
    assert run(Patience(0), 10.0, progressed=True) is None


def test_a_length_is_known_until_the_next_change() -> None:
    lengths = Lengths()
    assert lengths.get(7) is None
    first = lengths.change(7)
    assert lengths.get(7) is None
    lengths.enter(7, first, 5)
    assert lengths.get(7) == 5
    second = lengths.change(7)
    assert lengths.get(7) is None
    lengths.enter(7, second, 9)
    assert lengths.get(7) == 9
    lengths.enter(8, second, 1)
    assert lengths.get(8) is None


def test_of_changes_that_overlap_the_last_one_counts() -> None:
    lengths = Lengths()
    first, second = lengths.change(7), lengths.change(7)
    lengths.enter(7, first, 5)
    assert lengths.get(7) is None
    lengths.enter(7, second, 9)
    assert lengths.get(7) == 9
    lengths.enter(7, first, 5)
    assert lengths.get(7) is None, "whose was last, nobody knows"


def test_lengths_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "MOST", 3)
    lengths = Lengths()
    for rid in (1, 2, 3, 1, 4):
        lengths.enter(rid, lengths.change(rid), rid)
    assert [lengths.get(rid) for rid in (1, 2, 3, 4)] == [1, None, 3, 4]


@pytest.mark.parametrize(
    ("before", "after", "token_ids", "possible"),
    [
        (5, 5, bytes(8), True), (5, 7, bytes(8), True), (5, 6, bytes(8), False), (5, 4, bytes(8), False),
        (5, 5, None, True), (5, 99, None, True), (5, 4, None, False),
    ],
)  # fmt: skip
def test_what_one_append_can_have_done(before: int, after: int, token_ids: bytes | None, possible: bool) -> None:
    assert is_possible(before, after, token_ids) is possible
