"""The examples of docs/http.md, copied out of the page and run against the demonstration model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import running

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "http.md"
DEMO = """
[[models]]
name = "demo"
threads = 1
kv_cache_gib = 0.1

[http]
address = "127.0.0.1:0"
"""
EXPECTED = (
    ("bash", "The capital of France is Paris."),
    ("python", "12 + 7 = 19"),
    ("python", "Paris"),
    ("python", '{"sum":'),
    ("python", "Once upon a time there was a fox"),
)


def test_examples() -> None:
    examples = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in examples] == [kind for kind, _ in EXPECTED]
    with running(DEMO) as daemon:
        llmosctl = [Path(sys.executable).with_name("llmosctl"), "--run-dir", str(daemon.run_dir)]
        told = subprocess.run([*llmosctl, "env", "--json"], capture_output=True, text=True, check=True)
        environment = os.environ | json.loads(told.stdout)
        for (kind, code), (_, expected) in zip(examples, EXPECTED):
            command = ["bash", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            assert expected in done.stdout, done.stdout
