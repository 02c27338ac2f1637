"""The list of planted bugs stays plantable, and a fixed sample of them is noticed. All of them: `python bench/planted_bugs.py`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from planted_bugs import BUGS, SURVIVORS, Bug
from planting import judge, places, plant

RESULT = Path(__file__).parents[2] / "bench" / "results" / "planted_bugs.json"
SAMPLE = (
    "a page with two holders is written without a copy",
    "host pages are kept after swapping in",
    "circles of sequences that wait for each other are accepted",
    "every gateway gets every token",
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.breaks)
def test_every_bug_can_be_planted(bug: Bug):
    """If this fails, the code has changed: change the bug with it, so that it breaks the same thing."""
    assert places(bug.old, bug.file) == 1
    assert bug.old != bug.new


def test_the_list_is_long_and_wide():
    assert len(BUGS) >= 100
    assert len({bug.breaks for bug in BUGS}) == len(BUGS)
    assert len({bug.file for bug in BUGS}) >= 20
    assert set(SURVIVORS) <= {bug.breaks for bug in BUGS}


def test_the_record_is_of_this_list():
    record = json.loads(RESULT.read_text())
    assert {bug["bug"] for bug in record["bugs"]} == {bug.breaks for bug in BUGS}
    assert record["share"] >= 0.95
    assert record["survivors"] == SURVIVORS


@pytest.mark.parametrize("name", SAMPLE)
def test_the_simulation_notices(name: str):
    [bug] = [bug for bug in BUGS if bug.breaks == name]
    with tempfile.TemporaryDirectory(prefix="planted-") as directory:
        plant(Path(directory), bug.file, bug.old, bug.new)
        verdict = judge(Path(directory), bug.breaks, bug.file, lives=10, unit=False)
    assert verdict.by == "simulation", verdict


def test_without_a_bug_nobody_complains():
    with tempfile.TemporaryDirectory(prefix="planted-") as directory:
        plant(Path(directory), "kernel.py", "class Kernel:", "class Kernel:  # as it is")
        verdict = judge(Path(directory), "none", "kernel.py", lives=3, unit=False)
    assert verdict.by == "nobody", verdict
