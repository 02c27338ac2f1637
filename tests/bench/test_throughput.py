"""The summary of throughput.py from known rates, and the whole script once with a tiny model and no baselines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from common import Shape, random_model
from load import LoadResult
from throughput import summary

BENCH = Path(__file__).parents[2] / "bench"


def test_summary_takes_medians_ratios_and_goals():
    rates = defaultdict(list, {("llmos", 1): [30.0, 10.0, 20.0], ("generate bfloat16", 1): [10.0, 16.0, 13.0]})
    rates["continuous bfloat16", 1] = [2.0]
    load = LoadResult(1, 8, 1.0, (0.5, 0.75), (0.125, 0.25))
    bench = SimpleNamespace(rates=rates, loads={("llmos", 1): [load]})
    llmos, generate, continuous = summary(bench, 40.0)
    assert llmos["tokens_per_s"] == 20.0
    assert llmos["share_of_floor"] == 0.5
    assert (llmos["ttft_p50_ms"], llmos["ttft_p99_ms"]) == (500.0, 750.0)
    assert (llmos["gap_p50_ms"], llmos["gap_p99_ms"]) == (125.0, 250.0)
    assert generate["llmos_is_faster_by"] == 20.0 / 13.0
    assert (generate["goal"], continuous["goal"]) == (1.3, 5.0)
    assert continuous["llmos_is_faster_by"] == 10.0


@pytest.mark.slow
def test_the_whole_benchmark_on_a_tiny_model(tmp_path):
    model = random_model(tmp_path, Shape(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, vocab=64, context=64))
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCH / "throughput.py"), "--model", str(model), "--quick", "--threads", "1"]
    command += ["--concurrency", "1", "8", "--baselines", "generate", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    found = [(entry["system"], entry["streams"]) for entry in result["results"]]
    assert found == [("llmos", 1), ("generate bfloat16", 1), ("llmos", 8), ("generate bfloat16", 8)]
    assert all(entry["tokens_per_s"] > 0 for entry in result["results"])
    assert result["threads"] == 1
    assert "MB of weights a step" in done.stdout
