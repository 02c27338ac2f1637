"""Round trips over our ports between two processes: what a plan and its result cost on the wire.

    python bench/ipc.py            # half a minute; --out FILE keeps the figures

A listener here, a dialer in a child process, both blocking, over a unix socket as in the running system. "small": a plan that repeats the
one before, and a result with one token; "256 rows": the same with a result of 256 tokens; "prompt": a plan that brings a new row with
16,384 tokens. Encoding and decoding are included. "codec": the same encoding and decoding without a socket.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import machine, percentile, versions

from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Dialer, Listener
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, pack_i32
from llmos.protocol.params import SamplingParams

ROLES = frozenset({"executor"})
STEADY = m.StepPlan(1, 1, b"", (), b"", b"", None)
ROW = m.RowAdd(0, 1, pack_i32(range(16_384)), 16_384, 0, pack_i32(range(1024)), SamplingParams(seed=1))
PROMPT = m.StepPlan(1, 1, b"", (ROW,), b"", pack_i32([0, 0, 2048, 0]), b"")


def main() -> None:
    if sys.argv[1:2] == ["--echo"]:
        echo(Path(sys.argv[2]), int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trips", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    facts = {"machine": machine(), "versions": versions(), "round_trip_us": {}, "codec_us": {}}
    for name, plan, rows in (("small", STEADY, 1), ("256 rows", STEADY, 256), ("prompt", PROMPT, 1)):
        facts["round_trip_us"][name] = figures(round_trips(plan, rows, arguments.trips))
        facts["codec_us"][name] = figures(codec_trips(plan, rows, arguments.trips))
        print(name, "round trip", facts["round_trip_us"][name], "codec", facts["codec_us"][name], flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


def figures(seconds: list[float]) -> dict[str, float]:
    return {name: round(percentile(seconds, at) * 1e6, 1) for name, at in (("p50", 0.5), ("p99", 0.99))}


def result(rows: int) -> m.StepResult:
    return m.StepResult(1, 1, pack_i32(value for row in range(rows) for value in (row, 100, 7)), (), b"", 1000, 0)


def round_trips(plan: m.StepPlan, rows: int, count: int) -> list[float]:
    """Seconds of each, after a few that do not count."""
    with tempfile.TemporaryDirectory(prefix="llmos-") as folder:
        run_dir = RunDir(Path(folder) / "run")
        run_dir.create()
        listener: Listener[Any] = Listener(run_dir, "kernel", Schema(m.ToKernel), ROLES)
        child = subprocess.Popen([sys.executable, __file__, "--echo", str(run_dir.path), str(rows)])
        try:
            peer, _ = _next(listener)
            return _timed(lambda: _ask(listener, peer, plan), count)
        finally:
            child.kill()
            child.wait()
            listener.close()


def _ask(listener: Listener[Any], peer: Any, plan: m.StepPlan) -> None:
    listener.send(peer, plan)
    _next(listener)


def _next(listener: Listener[Any]) -> Any:
    while True:
        received = listener.receive()
        if received is not None:
            return received
        listener.socket.poll(10_000)


def echo(path: Path, rows: int) -> None:
    """The other end: answers each plan with a result."""
    dialer: Dialer[Any] = Dialer(RunDir(path), "kernel", Schema(m.FromKernel))
    dialer.greet("executor", "executor.bench", 10.0)
    answer = result(rows)
    dialer.send(answer)
    while True:
        if dialer.wait(60.0) is None:
            return
        dialer.send(answer)


def codec_trips(plan: m.StepPlan, rows: int, count: int) -> list[float]:
    to_executor: Schema[Any] = Schema(m.FromKernel)
    to_kernel: Schema[Any] = Schema(m.ToKernel)
    answer = result(rows)

    def trip() -> None:
        to_executor.decode(encode(plan))
        to_kernel.decode(encode(answer))

    return _timed(trip, count)


def _timed(trip: Callable[[], None], count: int) -> list[float]:
    times = []
    for number in range(count + count // 10):
        started = time.perf_counter()
        trip()
        if number >= count // 10:
            times.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
