"""chaos.py as a whole: a short run against real processes, and what its options refuse."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
KINDS = "executor,storage"


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
