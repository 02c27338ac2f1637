"""The benchmark of the scheduler measures what it says: its executor answers as the microkernel expects, bars are compared."""

from __future__ import annotations

import pytest
import scheduler
from scheduler import FORK_TOKENS, PAGE_SIZE, Bench, Figure, slope

from llmos.microkernel.steady import Steady


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scheduler, "PAGES", 6000)
    monkeypatch.setattr(scheduler, "ROWS", 8)
    monkeypatch.setattr(Steady, "begin", Steady.begin)  # put back what a bench sets


def counters(bench: Bench):
    return bench.kernel.state.lanes["bench"].scheduler.counters


def test_slope_is_the_exponent():
    assert slope({10: 3.0, 100: 3.0, 1000: 3.0}) == 0
    assert slope({10: 5.0, 100: 50.0, 1000: 500.0}) == pytest.approx(1)
    assert slope({10: 2.0, 1000: 20.0}) == pytest.approx(0.5)


def test_a_figure_says_whether_its_bar_is_met():
    assert "bar 100: met" in str(Figure("step", 100.0, "us", 100.0))
    assert "bar 2: MISSED" in str(Figure("spread", 2.001, "x", 2.0))
    assert "bar" not in str(Figure("step", 3.0, "us"))
    assert [Figure("x", 1.0, "", bar).met for bar in (None, 0.5, 1.0)] == [None, False, True]


@pytest.mark.parametrize("staggered", [True, False])
def test_steps_are_steady_and_every_token_counts(staggered: bool):
    bench = Bench(8, 4, staggered=staggered)
    before = counters(bench).steps, counters(bench).steady_steps, counters(bench).tokens_committed
    for _ in range(300):  # over an acknowledgement of every reader
        assert bench.step_us() > 0
    after = counters(bench).steps, counters(bench).steady_steps, counters(bench).tokens_committed
    assert [late - early for early, late in zip(before, after)] == [300, 300, 300 * 8]
    assert all(seq.acked for seq in bench.kernel.state.lanes["bench"].scheduler.rows.seqs)
    bench.kernel.check()


def test_the_general_path_alone():
    bench = Bench(8, 0, general=True)
    for _ in range(20):
        bench.step_us()
    assert counters(bench).steady_steps == 0


def test_churn_is_one_end_and_one_beginning_a_step():
    bench = Bench(64, 200, churn=True)
    ended = len(bench.kernel.state.ended)
    for _ in range(100):
        bench.step_us()
    assert len(bench.kernel.state.ended) - ended == pytest.approx(100, abs=4)
    assert len(bench.kernel.state.lanes["bench"].scheduler.rows) >= 62


def test_all_parts_have_their_figures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scheduler, "QUEUES", (2, 20))
    with_bars = {figure.name for figure in scheduler.verb_figures(2, each=3) if figure.bar is not None}
    assert with_bars == {
        f"{verb}, slope (exponent of n)" for verb in ("submit", "nice", "cancel of a queued one", "admission")
    }
    lookup, hashing = scheduler.prefix_figures(2, pages=5, sequences=2)
    assert (lookup.bar, hashing.bar) == (0.2, None)
    fork, copied = scheduler.fork_figures(2)
    assert FORK_TOKENS // PAGE_SIZE == 2048
    assert (fork.bar, copied.value, copied.bar) == (100.0, 0.0, 0.0)
