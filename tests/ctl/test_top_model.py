"""The parts under `llmosctl top`: rates, the listing with its selection and columns, text of an exact width."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from top_world import busy_rows, polled, rids, selected, seq_row, state_of, type_keys

from llmos.codes import SeqState
from llmos.ctl.top import columns, keys
from llmos.ctl.top.listing import choose
from llmos.ctl.top.look import ASCII, UNICODE, clean, cut, pad, sparkline, spread
from llmos.ctl.top.rates import Rates

# Rates


def test_a_rate_needs_two_readings() -> None:
    rates: Rates[str] = Rates()
    assert rates.get("a") is None
    rates.add(10.0, {"a": 100})
    assert rates.get("a") is None
    rates.add(12.0, {"a": 150, "b": 7})
    assert (rates.get("a"), rates.get("b"), rates.get("c")) == (25.0, None, None)


def test_a_counter_that_falls_begins_anew() -> None:
    rates: Rates[str] = Rates()
    for at, count in ((0.0, 100), (1.0, 200), (2.0, 5)):
        rates.add(at, {"a": count})
    assert rates.get("a") is None
    rates.add(3.0, {"a": 35})
    assert rates.get("a") == 30.0


def test_fast_readings_are_taken_together_over_a_second() -> None:
    rates: Rates[str] = Rates()
    for tenth in range(31):
        rates.add(tenth / 10, {"a": 0 if tenth < 20 else 10 * (tenth - 20), "b": tenth})
    assert rates.get("a") == pytest.approx(100.0)
    assert rates.get("b") == pytest.approx(10.0)
    rates.add(3.1, {"a": 3})
    assert rates.get("a") is None
    rates.add(3.2, {"a": 5})
    assert rates.get("a") == pytest.approx(20.0)


def test_slow_readings_use_the_newest_two() -> None:
    rates: Rates[str] = Rates()
    for at, count in ((0.0, 0), (2.0, 2000), (4.0, 2010)):
        rates.add(at, {"a": count})
    assert rates.get("a") == 5.0


def test_two_readings_at_once_give_no_rate() -> None:
    rates: Rates[str] = Rates()
    rates.add(1.0, {"a": 1})
    rates.add(1.0, {"a": 2})
    assert rates.get("a") is None


# The listing


def test_order_by_state_then_number() -> None:
    states = (
        SeqState.SUSPENDED,
        SeqState.WAITING,
        SeqState.RUNNING,
        SeqState.SWAPPED,
        SeqState.RUNNING,
        SeqState.BLOCKED,
        99,
    )
    state = state_of(*(seq_row(rid, state=int(value)) for rid, value in enumerate(states, 1)))
    assert rids(state) == [3, 5, 4, 2, 6, 1, 7]
    assert type_keys(state, "r") == []
    assert rids(state) == [7, 1, 6, 2, 4, 3, 5]


def test_numbers_begin_with_the_largest_and_names_with_the_first() -> None:
    rows = (seq_row(1, owner="bob", pages=5), seq_row(2, owner="alice", pages=9), seq_row(3, owner="bob", pages=9))
    state = state_of(*rows)
    state.sequences.order("pages")
    assert rids(state) == [2, 3, 1]
    state.sequences.order("pages", backwards=True)
    assert rids(state) == [1, 2, 3]
    state.sequences.order("owner")
    assert rids(state) == [2, 1, 3]


def test_sort_goes_around_the_columns_on_the_screen() -> None:
    state = state_of(*busy_rows(3))
    state.shown_columns = ["rid", "state", "pages"]
    type_keys(state, "r")
    seen = []
    for _ in range(4):
        type_keys(state, "s")
        seen.append((state.sequences.sort, state.sequences.backwards))
    assert seen == [("pages", False), ("rid", False), ("state", False), ("pages", False)]
    state.shown_columns = ["rid", "age"]
    type_keys(state, "s")
    assert state.sequences.sort == "rid"


def test_every_column_can_be_sorted_by() -> None:
    state = state_of(*busy_rows(12))
    for name in state.sequences.columns:
        state.sequences.order(name)
        assert sorted(rids(state)) == list(range(1000, 1012))
    for name in state.tenants.columns:
        state.tenants.order(name)
        assert len(state.tenants.rows) == 3


def test_a_filter_wants_every_word_somewhere() -> None:
    rows = (
        seq_row(11, owner="alice", model="Demo", state=int(SeqState.WAITING)),
        seq_row(12, owner="bob", job=11),
        seq_row(30, owner="malice"),
    )
    state = state_of(*rows)
    for text, expected in (
        ("alice", [30, 11]), ("ALICE wait", [11]), ("11", [12, 11]), ("demo", [12, 30, 11]), ("bob 11", [12]), ("zz", []),
        ("  ", [12, 30, 11]),
    ):  # fmt: skip
        state.sequences.narrow(text)
        assert rids(state) == expected, text


def test_while_nobody_chose_the_first_row_is_selected() -> None:
    state = state_of(seq_row(5), seq_row(6))
    assert selected(state) == 5
    state.take(polled(seq_row(3), seq_row(5), seq_row(6)))
    assert selected(state) == 3


def test_the_selection_stays_with_its_row() -> None:
    state = state_of(*(seq_row(rid) for rid in (5, 6, 7, 8)))
    type_keys(state, keys.DOWN)
    assert selected(state) == 6
    state.take(polled(*(seq_row(rid) for rid in (1, 2, 5, 6, 8))))
    assert (selected(state), state.sequences.index) == (6, 3)
    state.sequences.order("rid", backwards=True)
    assert (selected(state), state.sequences.index) == (6, 1)
    state.sequences.order("rid")
    state.take(polled(*(seq_row(rid) for rid in (1, 2, 5, 8, 9))))
    assert selected(state) == 8  # took the place of the one that left
    state.take(polled(seq_row(1)))
    assert selected(state) == 1
    state.take(polled())
    assert selected(state) is None
    state.take(polled(seq_row(4), seq_row(9)))
    assert selected(state) == 4
    type_keys(state, keys.END, keys.HOME)
    state.take(polled(seq_row(2), seq_row(4), seq_row(9)))
    assert selected(state) == 2  # the top again, whichever it is


def test_keys_move_the_selection_within_the_rows() -> None:
    state = state_of(*(seq_row(rid) for rid in range(1, 101)))
    listing = state.sequences
    listing.window(10)
    for key, expected in (
        (keys.UP, 1), ("j", 2), (keys.DOWN, 3), ("k", 2), (keys.PAGE_DOWN, 12), (" ", 22), (keys.PAGE_UP, 12), (keys.END, 100),
        (keys.DOWN, 100), (keys.PAGE_DOWN, 100), (keys.HOME, 1), (keys.PAGE_UP, 1), ("G", 100), ("g", 1),
    ):  # fmt: skip
        type_keys(state, key)
        assert selected(state) == expected, key
        assert state.selected in [each.row for each in listing.window(10)]


@given(st.lists(st.tuples(st.sampled_from(["up", "down", "page-up", "page-down", "home", "end"]), st.integers(1, 30))))
@settings(max_examples=100, deadline=None)
def test_the_window_always_holds_the_selection_and_no_gap(moves: list[tuple[str, int]]) -> None:
    state = state_of(*(seq_row(rid) for rid in range(1, 24)))
    for key, height in moves:
        type_keys(state, key)
        rows = state.sequences.window(height)
        assert len(rows) == min(height, 23)
        assert state.selected in [each.row for each in rows]


def test_columns_are_left_out_by_rank_and_grow_into_the_rest() -> None:
    listing = columns.sequences({})
    for width in range(4, 260):
        chosen = choose(listing.columns.values(), width)
        assert sum(cells for _, cells in chosen) + len(chosen) - 1 <= width
        assert chosen[0][0].name == "rid"
    names = [column.name for column, _ in choose(listing.columns.values(), 78)]
    assert names == ["rid", "owner", "model", "state", "nice", "pages", "output", "rate", "age", "job"]
    assert [column.name for column, _ in choose(listing.columns.values(), 30)] == ["rid", "owner", "state", "rate"]
    assert len(choose(listing.columns.values(), 200)) == len(listing.columns)


def test_numbers_that_name_a_sequence_are_never_cut() -> None:
    state = state_of(seq_row(7), seq_row(123_456_789_012))
    assert dict((c.name, cells) for c, cells in choose(state.sequences.columns.values(), 80))["rid"] == 12


# Text


def test_clean_text_is_one_harmless_line() -> None:
    assert clean("a\x1b[31mb\nc\t\u202ed\u2028\x85e") == "a�[31mb�c��d��e"
    assert clean("naïve 漢字 [bold]x[/bold]") == "naïve 漢字 [bold]x[/bold]"
    assert clean("\ud800") == "�"


def test_cut_and_pad_count_cells() -> None:
    assert [cut("abcdef", width) for width in (0, 1, 3, 6, 9)] == ["", "…", "ab…", "abcdef", "abcdef"]
    assert cut("漢字漢字", 4) == "漢…"
    assert cut("abcdef", 4, ASCII) == "abc~"
    assert (pad("ab", 4), pad("ab", 4, right=True), pad("漢字漢", 5)) == ("ab  ", "  ab", "漢字…")


def test_spread_gives_all_cells_in_proportion() -> None:
    assert spread([50, 50], 10) == [5, 5]
    assert spread([1, 0, 999], 10) == [1, 0, 9]
    assert spread([0, 0], 10) == [0, 0]
    assert spread([1, 1, 1, 1], 2) in ([1, 1, 0, 0], [0, 0, 1, 1])


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=30), st.integers(0, 100))
@settings(max_examples=300, deadline=None)
def test_spread_is_exact(counts: list[int], width: int) -> None:
    cells = spread(counts, width)
    assert sum(cells) == (width if sum(counts) else 0)
    assert min(cells) >= 0
    if sum(1 for count in counts if count) <= width:
        assert all((count > 0) == (cell > 0) for count, cell in zip(counts, cells))


def test_sparkline() -> None:
    assert sparkline([0.0, 30.0, 70.0], 8, UNICODE) == "▁▄█"
    assert sparkline([1.0, 2.0, 4.0], 2, ASCII) == "=#"
    assert (sparkline([0.0], 5, UNICODE), sparkline([], 5, UNICODE), sparkline([1.0], 0, UNICODE)) == ("▁", "", "")


@pytest.mark.parametrize(
    ("rate", "text"),
    [(None, "-"), (0.0, "-"), (3.14, "3.1"), (99.94, "99.9"), (99.96, "100"), (1234.5, "1234"), (2e6, "2M")],
)
def test_rate_text(rate: float | None, text: str) -> None:
    assert columns.rate_text(rate) == text
