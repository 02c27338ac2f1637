"""How long things take, as histograms that only grow: what `MeasuresGet` asks for and a monitoring system reads.

A histogram is counts per bucket, so that adding is a bisection and its size never changes. Times are differences of the `now` that callers
give, so measures replay as everything else. They belong to a model, outlive its executors, and begin at nothing with each microkernel.
"""

from __future__ import annotations

from bisect import bisect_left

from llmos.protocol.messages import EndedRow, HistogramRow, LaneMeasures

# Upper bounds in seconds, without the last bucket that has none.
_LONG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SHORT = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 5.0)


class Histogram:
    """`counts[i]`: values above `bounds[i - 1]` and up to `bounds[i]`; the last one has no bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def row(self, name: str) -> HistogramRow:
        return HistogramRow(name, self.bounds, tuple(self.counts), self.sum)


class Measures:
    """Of one model. Seconds.

    queue: from the request for a turn to its first row. first_token: from the request to its first token. between_tokens: from one
    decode step's result to the next one's, once for each token of the latter; waits outside of rows are not in it. step: what executors
    say that a step took them. `ended`: finish reason -> turns.
    """

    def __init__(self) -> None:
        self.queue = Histogram(_LONG)
        self.first_token = Histogram(_LONG)
        self.between_tokens = Histogram(_SHORT)
        self.step = Histogram(_SHORT)
        self.ended: dict[int, int] = {}
        self._last_done: float | None = None  # when a step ended, if another one was under way then

    def step_done(self, busy_s: float, num_decodes: int, now: float, *, goes_on: bool) -> None:
        """`goes_on`: the next step is in flight already."""
        self.step.add(busy_s)
        if self._last_done is not None and num_decodes:
            self.between_tokens.add(now - self._last_done, num_decodes)
        self._last_done = now if goes_on else None

    def turn_ended(self, reason: int) -> None:
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def report(self, model: str) -> LaneMeasures:
        histograms = tuple(
            histogram.row(name)
            for name, histogram in (
                ("queue", self.queue),
                ("first_token", self.first_token),
                ("between_tokens", self.between_tokens),
                ("step", self.step),
            )
        )
        return LaneMeasures(model, histograms, tuple(EndedRow(*item) for item in sorted(self.ended.items())))
