"""gpu.py without a GPU: all of its own parts run on tiny shapes, and parts that are there already are skipped. As on a strange machine,
llmos is not installed (-S leaves out the links to checkouts), and neither are its libraries."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
WITHOUT = """
import runpy, sys
for name in ("msgspec", "zmq", "safetensors", "transformers", "psutil", "uvloop"):
    sys.modules[name] = None
sys.path.append(sys.argv[1])
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    libraries = sysconfig.get_path("purelib")
    command = [sys.executable, "-P", "-S", "-c", WITHOUT, libraries, str(BENCH / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_dry_run(tmp_path):
    out = tmp_path / "gpu.json"
    parts = ["copy", "matmul", "kernels", "executor", "sequences"]
    done = gpu("--dry-run", "--out", str(out), "--parts", ",".join(parts))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["dry_run"]
    assert list(found["parts"]) == parts
    assert found["parts"]["kernels"]["wrong"] == []
    assert len(found["parts"]["kernels"]["checks"]) > 20
    assert found["parts"]["executor"]["tiny"]["decode"][0]["ms"] > 0
    assert found["parts"]["sequences"]["output_tokens"] > 0
    again = gpu("--dry-run", "--out", str(out), "--parts", "copy,sequences")
    assert again.stdout.count("there already") == 2


def test_an_unknown_part_is_named():
    done = gpu("--dry-run", "--parts", "copy,lunch")
    assert done.returncode == 2
    assert "'lunch'" in done.stderr
