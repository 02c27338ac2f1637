"""How much to take on: measured costs, and the three decisions that follow from them.

Costs are exponential averages of what executors report, so decisions replay exactly. `prefill_budget` protects the latency between
tokens from long prompts; `WorkingSet` protects running sequences from those that would be admitted on their pages (thrashing);
`fate` chooses between copying a sequence's pages to the host and computing them again.
"""

from __future__ import annotations

import numpy as np

from llmos.codes import PageFate
from llmos.microkernel.rows import RowTable

_WEIGHT = 0.05  # of the newest measurement in the average
_RESERVE_SHARE = 100  # of the pool: what a sequence per row keeps in reserve at most
_MAX_HORIZON = 4096
_CALM_STEPS = 256


class Costs:
    """Seconds. 0 = not measured yet. `swap_s`: one page, one way; 0 = this executor does not swap."""

    def __init__(self, swap_s: float) -> None:
        self.swap_s = swap_s
        self.step_s = 0.0  # any step
        self.decode_s = 0.0  # a step that only decodes
        self.prefill_s = 0.0  # one prompt token

    def note(self, busy_s: float, num_decodes: int, num_prefill: int) -> None:
        """A step took `busy_s`."""
        self.step_s = _average(self.step_s, busy_s)
        if not num_prefill:
            self.decode_s = _average(self.decode_s, busy_s)
            return
        decode_s = self.decode_s if num_decodes else 0.0
        self.prefill_s = _average(self.prefill_s, max(0.0, busy_s - decode_s) / num_prefill)

    def prefill_budget(self, budget: int, num_decodes: int, target_step_s: float, least: int) -> int:
        """Prompt tokens for a step in which `num_decodes` streams wait for their next token; `least` keeps prompts moving."""
        if not (num_decodes and target_step_s and self.prefill_s):
            return budget
        affordable = int((target_step_s - self.decode_s) / self.prefill_s)
        return min(budget, max(least, affordable))

    def fate(self, num_tokens: int, num_pages: int, num_freed: int, host_free: int) -> PageFate:
        """Swap or drop? `num_freed` of the sequence's `num_pages` pages would become free; the others have more holders."""
        if not self.swap_s or num_pages > host_free or 2 * num_freed < num_pages:
            return PageFate.DROP
        there_and_back_s = 2 * num_pages * self.swap_s
        # While recomputing has not been measured, swapping is the safe guess: a prompt token costs a forward pass.
        return PageFate.DROP if 0 < num_tokens * self.prefill_s < there_and_back_s else PageFate.SWAP


class WorkingSet:
    """How many pages admission must leave to what runs already, by feedback.

    It starts at a page per running sequence, bounded by a share of the pool. Each preemption doubles the horizon: the tokens that every
    running sequence is expected to grow by before anybody new comes in. A calm spell halves it again.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._least = num_pages // _RESERVE_SHARE
        self._page_size = page_size
        self._horizon = 0
        self._calm_steps = 0

    def preempted(self) -> None:
        self._horizon = min(_MAX_HORIZON, max(self._page_size, 2 * self._horizon))
        self._calm_steps = 0

    def step(self) -> None:
        """A step without preemption."""
        self._calm_steps += 1
        if self._calm_steps >= _CALM_STEPS:
            self._calm_steps = 0
            self._horizon //= 2

    def reserve(self, rows: RowTable) -> int:
        """Pages; 0 when nothing runs."""
        if not self._horizon:
            return min(len(rows), self._least)
        running = rows.order[~rows.throttled[rows.order]]  # who is not read does not grow
        growth = np.minimum(rows.max_len[running] - rows.known[running], self._horizon)
        return int(growth.sum()) // self._page_size


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old) if old else new
