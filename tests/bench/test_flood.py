"""Crowds against a real daemon, at a small size. At full size: `python bench/flood.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.slow
def test_a_crowd_ends_a_gateway_at_most_and_nobody_loses_a_token(tmp_path: Path) -> None:
    out = tmp_path / "flood.json"
    names = ["connections", "multipart", "descriptors"]
    command = [
        sys.executable,
        str(BENCH / "flood.py"),
        "--scale",
        "0.4",
        "--tokens",
        "100",
        "--gateway-mib",
        "256",
        "--back-seconds",
        "10",
    ]
    command += ["--out", str(out), *(word for name in names for word in ("--scenario", name))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["scenario"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == names
    assert rows["descriptors"]["deaths"] == {"gateway": 1}
    assert rows["connections"]["connections"] == 2000
    assert rows["connections"]["answered"] == 1000
    assert 128 < rows["multipart"]["mib_sent"] < 409  # memory ran out before the message did
