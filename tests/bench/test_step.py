"""Parts of step.py: the plans of the executor that drives itself are possible ones, and rounds are told apart."""

from __future__ import annotations

import numpy as np
import step

from llmos.services.executor.rows import RowTable


def test_self_made_plans_are_possible_and_grant_pages_when_they_are_needed():
    rows, steps = 3, 40
    plans = step.make_plans([[1] * step.CONTEXT] * rows, steps)
    table = RowTable(rows, step.CONTEXT + steps + 2, step.PAGE_SIZE, 64)
    for plan in plans:
        work = table.apply(plan)  # asserts whatever a plan must not do
        table.computed_to(work)
        sampled = np.array([*work.decode.tolist(), *(chunk.row for chunk in work.chunks)])
        assert sorted(sampled) == [0, 1, 2]
        table.append(sampled, np.ones(rows, np.int32))
    assert len(plans) == steps + 1
    assert table.length.tolist() == [step.CONTEXT + steps + 1] * rows
    assert (table.num_pages * step.PAGE_SIZE - table.length).max() < 2 * step.PAGE_SIZE


def test_rounds_begin_after_a_pause_and_leave_out_prompts():
    one_round = [(50, 300_000, 2), (900, 10, 4), (500, 5, 4), (501, 6, 4), (400, 5, 3)]
    found = step._rounds(one_round + one_round, 4)
    assert found == [[(500, 5, 4), (501, 6, 4)]] * 2
    assert step._idle_share(found[0]) == 11 / 1012
