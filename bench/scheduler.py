"""What one scheduling step and one verb cost in the microkernel's own code, without sockets, and how the cost grows with the queue.

    python bench/scheduler.py            # about a minute; --json FILE keeps the figures

Drives the real `Kernel` with results as an executor would send them. A step = handle one StepResult and plan the next step. Goals (none
of them is a test): 256 rows <= 100 us; 100,000 waiting <= 1.1x of 10 waiting; p99 <= 2x p50; verbs O(log n) or better.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

from common import machine, versions

from llmos.codes import FinishReason
from llmos.microkernel.kernel import Kernel, Sender
from llmos.microkernel.limits import SchedulerLimits
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.params import SamplingParams

GATEWAY = Sender(1, "gateway", "gateway")
EXECUTOR = Sender(2, "executor", "executor.bench")
PARAMS = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=1, max_tokens=4000, ignore_eos=True
)
TOKEN = 5


class Bench:
    """A kernel with `rows` running and `waiting` waiting sequences, and an executor that answers at once."""

    def __init__(self, rows: int, waiting: int) -> None:
        limits = SchedulerLimits(rows, 8192, 2, 10**9, True, 1e9)
        self.kernel = Kernel(limits, 10**7, ("bench",), lambda: 1, 0.0)
        ready = m.ExecutorReady("bench", 400_000, 64, rows, 8192, 100_000, 32_000, "none", "bench")
        self.kernel.handle(EXECUTOR, ready, 0.0)
        for index in range(rows + waiting):
            self.submit(index)
        self.positions: dict[int, int] = {}
        self.decode: list[int] = []
        self.plans = self._plans(self.kernel.tick(0.0))
        gc.collect()
        gc.freeze()

    def submit(self, index: int) -> None:
        message = m.SeqSubmit(index, "bench", pack_i32([1, 2, 3, index % 30_000]), PARAMS, f"tenant{index % 4}")
        self.kernel.handle(GATEWAY, message, 0.0)

    def step_us(self) -> float:
        """Answer the oldest plan; microseconds until the next one is made."""
        result = self._answer(self.plans.pop(0))
        started = time.perf_counter()
        effects = self.kernel.handle(EXECUTOR, result, 0.0)
        effects += self.kernel.tick(0.0)
        elapsed = time.perf_counter() - started
        self.plans += self._plans(effects)
        return elapsed * 1e6

    def _plans(self, effects: list) -> list[m.StepPlan]:
        return [effect.message for effect in effects if isinstance(effect.message, m.StepPlan)]

    def _answer(self, plan: m.StepPlan) -> m.StepResult:
        for add in plan.row_adds:
            self.positions[add.row] = len(unpack_i32(add.tokens))
        if plan.decode is not None:
            self.decode = list(unpack_i32(plan.decode))
        prefill = unpack_i32(plan.prefill)
        sampling = [*self.decode, *(row for row, last in zip(prefill[0::4], prefill[3::4]) if last)]
        samples = [value for row in sampling for value in (row, self.positions[row], TOKEN)]
        for row in sampling:
            self.positions[row] += 1
        return m.StepResult(1, plan.step, pack_i32(samples), (), b"", 1, 0)


def step_cost(rows: int, waiting: int, steps: int) -> dict[str, float]:
    bench = Bench(rows, waiting)
    bench.step_us()  # the first one admits all rows
    times = sorted(bench.step_us() for _ in range(steps))
    return {"rows": rows, "waiting": waiting, "p50_us": times[len(times) // 2], "p99_us": times[int(len(times) * 0.99)]}


def verb_cost(waiting: int, count: int = 1000) -> dict[str, float]:
    """Median microseconds of submitting, renicing and cancelling a waiting sequence beside `waiting` others."""
    bench = Bench(1, waiting)
    first = max(bench.kernel.state.sequences) + 1
    submits = [_timed(lambda i=i: bench.submit(10**6 + i)) for i in range(count)]
    rids = range(first, first + count)
    nices = [_timed(lambda r=r: bench.kernel.handle(GATEWAY, m.Nice(1, r, 10), 0.0)) for r in rids]
    cancel = FinishReason.CANCELLED
    cancels = [_timed(lambda r=r: bench.kernel.handle(GATEWAY, m.SeqCancel(r, cancel), 0.0)) for r in rids]
    medians = {name: sorted(times)[count // 2] for name, times in
               (("submit_us", submits), ("nice_us", nices), ("cancel_us", cancels))}  # fmt: skip
    return {"waiting": waiting, **medians}


def _timed(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return (time.perf_counter() - started) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    steps = [step_cost(rows, waiting, options.steps) for rows, waiting in
             ((1, 0), (64, 0), (256, 10), (256, 1000), (256, 100_000))]  # fmt: skip
    for row in steps:
        print("{rows:4} rows, {waiting:7} waiting: step p50 {p50_us:7.1f} us, p99 {p99_us:7.1f} us".format(**row))
    verbs = [verb_cost(waiting) for waiting in (10, 1000, 100_000)]
    for row in verbs:
        print(
            "{waiting:7} waiting: submit {submit_us:6.1f} us, nice {nice_us:6.1f} us, cancel {cancel_us:6.1f} us".format(
                **row
            )
        )
    if options.json:
        record = {"machine": machine(), "versions": versions(), "steps": steps, "verbs": verbs}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
