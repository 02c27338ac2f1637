"""chaos.py as a whole: a short run against real processes, and what its options refuse."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
KINDS = "executor,storage,tokenizer,gateway,microkernel"


def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "chaos.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--minutes", "0"), "not above 0"),
        (("--minutes", "1", "--kinds", "executor,kernel"), "'kernel'"),
        (("--minutes", "1", "--faults", "unplug"), "'unplug'"),
        (("--minutes", "1", "--clients", "0"), "--clients"),
        ((), "--minutes"),
        (("--points", "microkernel.lunch"), "'microkernel.lunch'"),
        (("--minutes", "1", "--pairs"), "--pairs needs --points"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, word):
    done = chaos(*arguments)
    assert done.returncode == 2
    assert word in done.stderr


@pytest.mark.slow
def test_kills_under_load_harm_nobody(tmp_path):
    out = tmp_path / "chaos.json"
    folders = set(Path(tempfile.gettempdir()).glob("llmos-chaos-*"))
    options = ("--minutes", "0.3", "--clients", "6", "--seed", "3", "--mean-seconds", "1.5", "--step-ms", "20")
    done = chaos(*options, "--kinds", KINDS, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    total = result["total"]
    assert {row["kind"] for row in result["rows"]} == set(KINDS.split(","))
    assert total["injected"] == total["recovered"] > 4
    assert (total["failed"], total["lost"], total["duplicated"], total["changed"]) == (0, 0, 0, 0)
    assert result["requests"]["generate"] > 10
    assert total["requests_hit"] > 10
    assert result["tokens"] > 1000
    assert set(Path(tempfile.gettempdir()).glob("llmos-chaos-*")) <= folders


@pytest.mark.slow
def test_kills_at_points_of_the_code_harm_nobody(tmp_path):
    out = tmp_path / "points.json"
    points = (
        "microkernel.journal.torn,microkernel.sent.one,executor.step.computed,gateway.kernel.received,tokenizer.decoded"
    )
    options = ("--clients", "6", "--step-ms", "10", "--out", str(out))
    done = chaos("--points", points, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert sorted(f"{row['kind']}.{row['fault']}" for row in result["rows"]) == sorted(points.split(","))
    total = result["total"]
    assert (total["injected"], total["recovered"]) == (5, 5)
    assert (total["failed"], total["lost"], total["duplicated"], total["changed"]) == (0, 0, 0, 0)
    assert total["requests_hit"] > 5
