"""What the isolation costs: an executor that the microkernel's process drives, against the same executor that drives itself.

    python bench/step.py                 # about two minutes on an idle machine; --quick for a look; --out FILE keeps the figures

"driven": a real microkernel process and a real executor process; this program is the gateway that submits the sequences and reads their
tokens. "alone": the same backend in a process that makes the same plans itself (same rows, lengths, pages granted at the same steps), with
nobody beside it. Both serve the same model with as many threads, in turns, one waiting while the other works. A step's time is from the
end of one step to the end of the next, so waiting for a plan counts. The second figure is of the fake executor with a step of 1 ms and 256
rows: the share of the time for which it waited for plans, as it reports it itself.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import Shape, machine, percentile, prompts, random_model, versions

from llmos.config import ModelConfig
from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Dialer
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, pack_i32
from llmos.protocol.params import SamplingParams

PAGE_SIZE = 16
CONTEXT = 32
PAUSE_US = 100_000
COST_BAR, IDLE_BAR = 0.02, 0.05
FAKE_ROWS, FAKE_STEP_MS = 256, 1.0
NOTES_VARIABLE = "LLMOS_BENCH_NOTES"
DEADLINE_S = 120.0
CONFIG = """
[daemon]
log_level = "warning"
[microkernel]
max_rows = {rows}
max_step_tokens = 65536
target_step_ms = 0
prefix_cache = false
journal = "process"
[[models]]
name = "bench"
path = "{model}"
backend = "{backend}"
threads = {threads}
page_size = 16
num_pages = {pages}
[storage]
state_dir = "{state}"
"""


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        sys.argv = [sys.argv[0], *sys.argv[2:]]
        serve()
        return
    if sys.argv[1:2] == ["--alone"]:
        alone(json.loads(sys.argv[2]))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse_arguments()
    model = random_model(arguments.work_dir, arguments.shape)
    facts: dict[str, Any] = {"machine": machine(), "versions": versions(), "threads": arguments.threads}
    facts["cpu_executor"] = measure_cost(arguments, model)
    facts["fake_executor"] = measure_idle(arguments)
    print(json.dumps(facts, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "llmos-bench")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="decode steps of a round")
    parser.add_argument("--fake-steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    arguments.shape = Shape()
    if arguments.quick:
        arguments.rounds, arguments.steps, arguments.fake_steps = 2, 12, 300
        arguments.shape = Shape(hidden=256, layers=4, heads=4, kv_heads=2, ffn=512, vocab=2000)
    return arguments


# ---------------------------------------------------------------- the two figures


def measure_cost(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Rounds of both kinds in turns; medians of each, and of the differences."""
    tokens = prompts(arguments.rows, CONTEXT, arguments.shape.vocab)
    with ExitStack() as stack:
        driven = stack.enter_context(Driven(model, "cpu", arguments.rows, arguments.threads, arguments.steps))
        self_driven = stack.enter_context(Alone(model, arguments.rows, arguments.threads, arguments.steps))
        alone_ms: list[list[float]] = []
        for number in range(arguments.rounds + 1):  # the first is a warm-up
            driven.run(tokens, arguments.steps)
            alone_ms.append(self_driven.run())
            print(f"round {number}: alone {statistics.median(alone_ms[-1]):.3f} ms a step", flush=True)
        notes = driven.finish()
    rounds = _rounds(notes, arguments.rows)
    driven_ms = [[(busy + idle) / 1e3 for busy, idle, _ in steps] for steps in rounds]
    idle_share = _idle_share([note for steps in rounds[1:] for note in steps])
    pairs = [(statistics.median(a), statistics.median(b)) for a, b in zip(driven_ms[1:], alone_ms[1:], strict=True)]
    costs = [there / here - 1 for there, here in pairs]
    cost = statistics.median(costs)
    return {
        "rows": arguments.rows, "context": CONTEXT, "steps_per_round": arguments.steps, "rounds": len(pairs),
        "driven_ms": round(statistics.median([pair[0] for pair in pairs]), 3),
        "alone_ms": round(statistics.median([pair[1] for pair in pairs]), 3),
        "cost_by_round": [round(value, 4) for value in costs], "cost": round(cost, 4), "bar": COST_BAR,
        "met": cost < COST_BAR, "waited_for_plans": round(idle_share, 5),
    }  # fmt: skip


def measure_idle(arguments: argparse.Namespace) -> dict[str, Any]:
    """One long round of the fake executor."""
    os.environ["LLMOS_FAKE_STEP_MS"] = str(FAKE_STEP_MS)
    tokens = prompts(FAKE_ROWS, CONTEXT, 32_000)
    with Driven(Path("/nonexistent"), "fake", FAKE_ROWS, 1, arguments.fake_steps) as driven:
        driven.run(tokens, arguments.fake_steps)
        notes = [note for steps in _rounds(driven.finish(), FAKE_ROWS) for note in steps]
    share = _idle_share(notes)
    return {
        "rows": FAKE_ROWS, "step_ms": FAKE_STEP_MS, "steps": len(notes), "idle": round(share, 4), "bar": IDLE_BAR, "met": share < IDLE_BAR,
        "step_us": {name: round(percentile([busy for busy, _, _ in notes], at)) for name, at in (("p50", 0.5), ("p99", 0.99))},
        "wait_us": {name: round(percentile([idle for _, idle, _ in notes], at)) for name, at in (("p50", 0.5), ("p99", 0.99))},
    }  # fmt: skip


Note = tuple[int, int, int]  # busy_us, idle_us, tokens


def _rounds(notes: list[Note], rows: int) -> list[list[Note]]:
    """Decode steps of all rows. Rounds are apart by a pause; the first full step of a round may still compute prompts."""
    rounds: list[list[Note]] = [[]]
    for note in notes:
        if note[1] > PAUSE_US and rounds[-1]:
            rounds.append([])
        if note[2] == rows:
            rounds[-1].append(note)
    return [steps[1:] for steps in rounds if len(steps) > 1]


def _idle_share(notes: list[Note]) -> float:
    idle = sum(note[1] for note in notes)
    return idle / max(1, idle + sum(note[0] for note in notes))


# ---------------------------------------------------------------- the executor that is driven


class Driven:
    """A microkernel process, an executor process, and this program as their gateway."""

    def __init__(self, model: Path, backend: str, rows: int, threads: int, steps: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmos-")
        self.path = Path(self._folder.name)
        pages = rows * (-(-(CONTEXT + steps + 8) // PAGE_SIZE) + 1)
        config = CONFIG.format(
            rows=rows, model=model, backend=backend, threads=threads, pages=pages, state=self.path / "state"
        )
        (self.path / "llmosd.toml").write_text(config)
        self.run_dir = RunDir(self.path / "run")
        self.run_dir.create()
        self.notes = self.path / "notes.json"
        self._children: list[subprocess.Popen[str]] = []
        self._req = 0

    def __enter__(self) -> Driven:
        common = ["--run-dir", str(self.run_dir.path), "--config", str(self.path / "llmosd.toml"), "--no-supervisor"]
        self._start([sys.executable, "-P", "-m", "llmos.microkernel.main", *common])
        self._start([sys.executable, __file__, "--serve", *common, "--model", "bench"])
        self._port: Dialer[Any] = Dialer(self.run_dir, "kernel", Schema(m.FromKernel))
        self._port.greet("gateway", "bench", 30.0)
        return self

    def _start(self, command: list[str]) -> None:
        environment = os.environ | {NOTES_VARIABLE: str(self.notes), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._children.append(child)
        assert child.stdout is not None
        while not (line := child.stdout.readline()).startswith("ready"):
            if not line:
                raise RuntimeError(f"{command[1:4]} ended with {child.wait()}")

    def run(self, tokens: list[list[int]], steps: int) -> None:
        """One round: all sequences at once, to their ends."""
        params = SamplingParams(
            temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=1, max_tokens=steps + 1
        )
        for prompt in tokens:
            self._req += 1
            self._port.send(m.SeqSubmit(self._req, "bench", pack_i32(prompt), params, "root"))
        left, deadline = len(tokens), time.monotonic() + DEADLINE_S
        while left and time.monotonic() < deadline:
            message = self._port.wait(1.0)
            if isinstance(message, m.SeqTokens):
                left -= len(message.ends)
            elif isinstance(message, m.Error):
                raise RuntimeError(message.message)
        if left:
            raise RuntimeError(f"{left} sequences have not ended within {DEADLINE_S:g} s")

    def finish(self) -> list[Note]:
        """Stop the executor and read what it noted."""
        self._children[1].terminate()
        self._children[1].wait(30)
        return [tuple(note) for note in json.loads(self.notes.read_text())]

    def __exit__(self, *_: object) -> None:
        self._port.close()
        for child in reversed(self._children):
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()
        self._folder.cleanup()


def serve() -> None:
    """The executor process, but each result's times are noted and written at the end."""
    from llmos.services.base import service_main
    from llmos.services.executor import service

    notes: list[Note] = []

    class NotingDialer(Dialer[Any]):
        def send(self, message: m.Message) -> bool:
            if isinstance(message, m.StepResult):
                notes.append((message.busy_us, message.idle_us, len(message.samples) // 12))
            return super().send(message)

    service.Dialer = NotingDialer  # type: ignore[misc]
    path = Path(os.environ[NOTES_VARIABLE])
    atexit.register(lambda: path.write_text(json.dumps(notes)))
    service_main("executor", service.run)


# ---------------------------------------------------------------- the executor that drives itself


class Alone:
    """The process below. Each `run` is a round."""

    def __init__(self, model: Path, rows: int, threads: int, steps: int) -> None:
        self._shape = json.dumps({"model": str(model), "rows": rows, "threads": threads, "steps": steps})

    def __enter__(self) -> Alone:
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._child = subprocess.Popen(
            [sys.executable, __file__, "--alone", self._shape], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        return self

    def run(self) -> list[float]:
        """Milliseconds of each decode step."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()
        return [float(value) for value in json.loads(self._child.stdout.readline())]

    def __exit__(self, *_: object) -> None:
        self._child.communicate("", timeout=30)


def alone(shape: dict[str, Any]) -> None:
    """Rounds as asked for on stdin: the prompts in one step, then decode steps."""
    from llmos.services.executor.backend import Limits, limit_openmp_spinning

    limit_openmp_spinning()
    from llmos.services.executor.cpu import CpuBackend

    rows, steps, model = shape["rows"], shape["steps"], Path(shape["model"])
    pages = rows * (-(-(CONTEXT + steps + 8) // PAGE_SIZE) + 1)
    config = ModelConfig(
        "bench", path=str(model), backend="cpu", page_size=PAGE_SIZE, num_pages=pages, threads=shape["threads"]
    )
    backend = CpuBackend.open(config, model, Limits(rows, 65_536), lambda: None)
    plans = make_plans(prompts(rows, CONTEXT, backend.capabilities.vocab_size), steps)
    gc.collect()
    gc.freeze()
    for _ in sys.stdin:
        backend.reset()
        ends = []
        for plan in plans:
            backend.execute(plan)
            ends.append(time.perf_counter())
        print(json.dumps([(there - here) * 1e3 for here, there in itertools.pairwise(ends)]), flush=True)


def make_plans(tokens: list[list[int]], steps: int) -> list[m.StepPlan]:
    """What the microkernel would send: prompts, then decode steps, each row's pages when it needs them."""
    rows, held = len(tokens), -(-CONTEXT // PAGE_SIZE)
    params = SamplingParams(temperature=0.0, seed=1)
    adds = tuple(
        m.RowAdd(row, row + 1, pack_i32(prompt), CONTEXT, 0, pack_i32(range(row * held, (row + 1) * held)), params)
        for row, prompt in enumerate(tokens)
    )
    chunks = pack_i32(value for row in range(rows) for value in (row, 0, CONTEXT, 1))
    plans = [m.StepPlan(1, 1, b"", adds, b"", chunks, b"")]
    free = rows * held
    for step in range(steps):
        appends: list[int] = []
        if (CONTEXT + step) % PAGE_SIZE == 0:
            for row in range(rows):
                appends += (row, (CONTEXT + step) // PAGE_SIZE, free + row)
            free += rows
        decode = pack_i32(range(rows)) if step == 0 else None
        plans.append(m.StepPlan(1, 2 + step, b"", (), pack_i32(appends), b"", decode))
    return plans


if __name__ == "__main__":
    main()
