"""What a scheduling step and single verbs cost in the microkernel's own code, without sockets, each beside its bar.

    python bench/scheduler.py            # about three minutes; --quick for a look; --out FILE keeps the figures
    sudo python bench/scheduler.py --pinned   # on a machine that others use: with a core and a real-time priority of its own

Drives the real `Kernel` with results as an executor would send them. A step = handle one StepResult, then tick to the next StepPlan, at
page size 16 with the prefix cache on, four tenants, one stop token each and readers that acknowledge. "staggered": an equal share of
the rows fills a page in every step; "lockstep": all fill theirs in the same step. Environment and garbage collection are as llmosd
sets them up. What is measured is processor time, which on an idle machine is the time that passes; what is compared is measured in one
process, in turns, so that a busy machine is busy for all. The spread of steps has a line with all that the machine added, and one in
which each step counts as the least of eight repetitions: the work's own spread. Figures are medians unless said. Those without a bar
show what the others leave out.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from common import machine, percentile, versions
from msgspec import structs

from llmos.codes import FinishReason
from llmos.config import Config
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.limits import KernelLimits, SchedulerLimits
from llmos.microkernel.outbox import Send
from llmos.microkernel.prefix import PrefixCache
from llmos.microkernel.sender import Sender
from llmos.microkernel.steady import Steady
from llmos.ports.endpoint import RunDir
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams
from llmos.supervisor.plan import make_plan

GATEWAY = Sender(1, "gateway", "gateway")
EXECUTOR = Sender(2, "executor", "executor.bench")
ROWS, PAGE_SIZE, PAGES, VOCAB = 256, 16, 100_000, 32_000
STEP_TOKENS = 65_536  # so that all begin in the same step
SPREAD = 128  # lengths of staggered prompts
FORK_TOKENS = 32_768
TOKEN, STOP = 5, 2
ACK_EVERY = 256  # tokens, as our clients do
QUEUES = (10, 100, 1_000, 10_000, 100_000)
LIVES = 8
OUTPUT = 30_000  # tokens, more than there are steps
PARAMS = SamplingParams(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    seed=1,
    max_tokens=OUTPUT,
    stop_token_ids=(STOP,),
)
_begin = Steady.begin


@dataclass(frozen=True)
class Figure:
    """One line of the result. `bar`: at most this, if there is one."""

    name: str
    value: float
    unit: str
    bar: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.bar is None else self.value <= self.bar

    def __str__(self) -> str:
        verdict = "" if self.bar is None else f"   bar {self.bar:g}: {'met' if self.met else 'MISSED'}"
        return f"{self.name:62} {self.value:9.3f} {self.unit:8}{verdict}"


class Bench:
    """A kernel with running and waiting sequences, and an executor that answers at once."""

    def __init__(
        self,
        rows: int,
        waiting: int,
        *,
        staggered: bool = True,
        churn: bool = False,
        general: bool = False,
        cold: int = 0,
    ) -> None:
        """`churn`: in each step one ends and the next begins. `general`: without the fast path. `cold`: bytes of other memory that
        are read between two steps."""
        scheduling = SchedulerLimits(rows, STEP_TOKENS)
        self.kernel = Kernel(KernelLimits(max_waiting=10**7), scheduling, ("bench",), 1, 0.0)
        ready = m.ExecutorReady(
            "bench", PAGES, PAGE_SIZE, rows, STEP_TOKENS, 100_000, VOCAB, "none", "bench", host_pages=0, swap_us=0.0
        )
        self.kernel.handle(EXECUTOR, ready, 0.0)
        self.begin = classmethod(lambda *args: None) if general else _begin
        self.other = np.zeros(cold, np.int8)
        for index in range(rows):
            self.submit(index, index % SPREAD if staggered else 0, index + 2 * PAGE_SIZE if churn else OUTPUT)
        self.positions, self.prompt_lens, self.rids = (np.zeros(rows, np.int64) for _ in range(3))
        self.decode = np.zeros(0, np.int32)
        self.acks: list[m.SeqAck] = []
        self.plans: list[m.StepPlan] = []
        self.take(self.kernel.tick(0.0))
        for index in range(waiting):
            self.submit(rows + index, index % SPREAD if staggered else 0, rows if churn else OUTPUT)
        for _ in range(2 * PAGE_SIZE):  # until every row decodes
            self.step_us()

    def submit(self, index: int, extra: int = 0, output: int = OUTPUT) -> None:
        prompt = pack_i32([*range(3, 7 + extra), index % 30_000])
        params = PARAMS if output == OUTPUT else structs.replace(PARAMS, max_tokens=output)
        self.kernel.handle(GATEWAY, m.SeqSubmit(index, "bench", prompt, params, f"tenant{index % 4}"), 0.0)

    def step_us(self) -> float:
        """Answer the oldest plan; microseconds until the next one is made."""
        for ack in self.acks:
            self.kernel.handle(GATEWAY, ack, 0.0)
        result = self.answer(self.plans.pop(0))
        Steady.begin = self.begin  # type: ignore[method-assign]
        self.other.sum()
        started = time.thread_time()
        effects = self.kernel.handle(EXECUTOR, result, 0.0)
        effects += self.kernel.tick(0.0)
        elapsed = time.thread_time() - started
        self.take(effects)
        return elapsed * 1e6

    def take(self, effects: list[Send]) -> None:
        """What the executor gets."""
        self.plans += [effect.message for effect in effects if isinstance(effect.message, m.StepPlan)]

    def answer(self, plan: m.StepPlan) -> m.StepResult:
        """What an executor says to a plan."""
        for add in plan.row_adds:
            self.positions[add.row] = len(add.tokens) // 4
            self.prompt_lens[add.row], self.rids[add.row] = add.prompt_len, add.rid
        if plan.decode is not None:
            self.decode = np.frombuffer(plan.decode, "<i4")
        prefill = np.frombuffer(plan.prefill, "<i4").reshape(-1, 4)
        rows = np.concatenate([self.decode, prefill[prefill[:, 3] == 1, 0]])
        samples = np.full((len(rows), 3), TOKEN, "<i4")
        samples[:, 0], samples[:, 1] = rows, self.positions[rows]
        self.positions[rows] += 1
        read = self.positions[rows] - self.prompt_lens[rows] - 1
        some = (read > 0) & ((read + rows) % ACK_EVERY == 0)
        self.acks = [m.SeqAck(rid, upto) for rid, upto in zip(self.rids[rows[some]].tolist(), read[some].tolist())]
        return m.StepResult(1, plan.step, samples.tobytes(), (), b"", 1000, 0)


def as_in_the_shell() -> None:
    """The shell freezes what is there at its start, before any sequence; garbage of building up is nobody's here."""
    gc.collect()


# ---------------------------------------------------------------- steps


def step_times(benches: dict[str, Bench], rounds: int, steps: int = 32) -> dict[str, list[float]]:
    """Microseconds of each step; all take turns."""
    times: dict[str, list[float]] = {name: [] for name in benches}
    as_in_the_shell()
    for _ in range(rounds):
        for name, bench in benches.items():
            times[name] += [bench.step_us() for _ in range(steps)]
    return times


def least_times(staggered: bool, rounds: int) -> list[float]:
    """What each step of one and the same life takes, the least of some repetitions.

    The kernel is deterministic, so step n does the same in every life. What a step costs by its own work is there every time, what the
    machine adds to it (other processes, other guests of the host) is not.
    """
    lives = []
    for _ in range(LIVES):
        bench = Bench(ROWS, 0, staggered=staggered)
        as_in_the_shell()
        lives.append([bench.step_us() for _ in range(8 * rounds)])
    return np.min(lives, axis=0).tolist()  # type: ignore[no-any-return]


def step_figures(rounds: int) -> list[Figure]:
    """Cost of a steady step, its spread, and what waits beside it; then of steps that are not steady or not warm."""
    figures = []
    times = step_times({"staggered": Bench(ROWS, 0), "lockstep": Bench(ROWS, 0, staggered=False)}, rounds)
    for name, values in times.items():
        p50, p99 = (percentile(values, share) for share in (0.5, 0.99))
        figures += [
            Figure(f"step, {ROWS} rows, {name}, p50", p50, "us", 100.0),
            Figure(f"step, {ROWS} rows, {name}, p99", p99, "us"),
            Figure(f"step, {ROWS} rows, {name}, p99 / p50, with what the machine adds", p99 / p50, "x"),
        ]
    for name, staggered in (("staggered", True), ("lockstep", False)):
        least = least_times(staggered, rounds)
        p50, p99 = (percentile(least, share) for share in (0.5, 0.99))
        figures += [
            Figure(f"step, {ROWS} rows, {name}, least of {LIVES} lives, p50", p50, "us"),
            Figure(f"step, {ROWS} rows, {name}, least of {LIVES} lives, p99 / p50", p99 / p50, "x", 2.0),
        ]
    few, many = step_times({"few": Bench(ROWS, 10), "many": Bench(ROWS, 100_000)}, rounds).values()
    ratio = statistics.median(many) / statistics.median(few)
    figures += [
        Figure("step, 10 queued, p50", statistics.median(few), "us"),
        Figure("step, 100,000 queued, p50", statistics.median(many), "us"),
        Figure("step, 100,000 queued / 10 queued", ratio, "x", 1.1),
    ]
    others = {
        "64 rows": Bench(64, 0), "1 row": Bench(1, 0),
        f"{ROWS} rows, without the fast path": Bench(ROWS, 0, general=True),
        f"{ROWS} rows, one ends and one begins": Bench(ROWS, 32 * rounds + 100, churn=True),
        f"{ROWS} rows, 32 MiB of other memory between two steps": Bench(ROWS, 0, cold=1 << 25),
    }  # fmt: skip
    times = step_times(others, rounds)
    return figures + [Figure(f"step, {name}, p50", statistics.median(us), "us") for name, us in times.items()]


# ---------------------------------------------------------------- verbs


def verb_figures(rounds: int, each: int = 20) -> list[Figure]:
    """Verbs on a queued sequence, and admission of the next one, beside n others that wait."""
    benches = {waiting: Bench(1, waiting) for waiting in QUEUES}
    times: dict[str, dict[int, list[float]]] = {
        verb: {waiting: [] for waiting in QUEUES} for verb in ("submit", "nice", "cancel of a queued one", "admission")
    }
    as_in_the_shell()
    for _ in range(rounds):
        for waiting, bench in benches.items():
            for verb, taken in _verbs(bench, each).items():
                times[verb][waiting] += taken
    figures = []
    for verb, by_waiting in times.items():
        medians = {waiting: statistics.median(values) for waiting, values in by_waiting.items()}
        figures += [Figure(f"{verb}, {waiting:,} queued", us, "us") for waiting, us in medians.items()]
        figures.append(Figure(f"{verb}, slope (exponent of n)", slope(medians), "", 0.05))
    return figures


def _verbs(bench: Bench, each: int) -> dict[str, list[float]]:
    kernel = bench.kernel
    first = kernel.state.next_rid() + 1
    submits = [timed_us(lambda i=i: bench.submit(10**6 + i)) for i in range(each)]
    rids = range(first, first + each)
    nices = [timed_us(lambda r=r: kernel.handle(GATEWAY, m.Nice(1, r, 10), 0.0)) for r in rids]
    cancels = [timed_us(lambda r=r: kernel.handle(GATEWAY, m.SeqCancel(r, FinishReason.CANCELLED), 0.0)) for r in rids]
    return {"submit": submits, "nice": nices, "cancel of a queued one": cancels, "admission": [_admission_us(bench)]}


def _admission_us(bench: Bench) -> float:
    """The running sequence is killed: the tick in which the best of the queue gets its row. The queue is filled up again."""
    kernel = bench.kernel
    bench.submit(0)
    rid = int(bench.rids[bench.decode[0]])
    bench.take(kernel.handle(GATEWAY, m.Kill(1, rid), 0.0))
    started = time.thread_time()
    effects = kernel.tick(0.0)
    elapsed = time.thread_time() - started
    bench.take(effects)
    while not bench.plans[-1].row_adds:  # both steps in flight had to come back first
        started = time.thread_time()
        bench.step_us()
        elapsed = time.thread_time() - started
    for _ in range(4):
        bench.step_us()
    return elapsed * 1e6


def slope(by_size: dict[int, float]) -> float:
    """The exponent s of `cost = c * n**s` that fits best; 0 is flat, 1 is linear."""
    xs, ys = [math.log(size) for size in by_size], [math.log(cost) for cost in by_size.values()]
    return statistics.linear_regression(xs, ys).slope


def timed_us(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return (time.thread_time() - started) * 1e6


# ---------------------------------------------------------------- prefix cache and fork


def prefix_figures(rounds: int, pages: int = FORK_TOKENS // PAGE_SIZE, sequences: int = 40) -> list[Figure]:
    """Microseconds a page of finding an indexed prefix, with fresh keys as a new prompt has, and of making the keys."""
    cache = PrefixCache(PAGE_SIZE)
    prompts = [array("i", range(index, index + pages * PAGE_SIZE)) for index in range(sequences)]
    for index, prompt in enumerate(prompts):
        keys: list[bytes] = []
        cache.extend_keys(keys, prompt, len(prompt), b"tenant")
        cache.insert(keys, array("i", range(index * pages, (index + 1) * pages)))
    hashing, lookup = [], []
    for turn in range(rounds):
        prompt = prompts[turn % sequences]
        fresh: list[bytes] = []
        hashing.append(timed_us(partial(cache.extend_keys, fresh, prompt, len(prompt), b"tenant")) / pages)
        lookup.append(timed_us(partial(cache.match, fresh)) / pages)
        assert len(cache.match(fresh)) == pages
    return [
        Figure(f"prefix lookup a page, {sequences * pages:,} pages indexed", statistics.median(lookup), "us", 0.2),
        Figure("prefix hashing a page, apart", statistics.median(hashing), "us"),
    ]


def fork_figures(rounds: int) -> list[Figure]:
    """Fork of a running sequence with a long prompt, through `Kernel.handle`."""
    bench = Bench(4, 0)
    kernel, state = bench.kernel, bench.kernel.state
    prompt = pack_i32([index % 30_000 for index in range(FORK_TOKENS)])
    kernel.handle(GATEWAY, m.SeqSpawn(1, "bench", prompt, "tenant0"), 0.0)
    rid = max(state.sequences)
    kernel.handle(GATEWAY, m.Kill(1, int(bench.rids[bench.decode[0]])), 0.0)
    while state.sequences[rid].wants_prefill:
        bench.take(kernel.tick(0.0))
        bench.step_us()
    scheduler = state.lanes["bench"].scheduler
    assert scheduler is not None
    before, times = scheduler.counters.pages_copied, []
    as_in_the_shell()
    for _ in range(rounds):
        times.append(timed_us(lambda: kernel.handle(GATEWAY, m.Fork(2, rid), 0.0)))
        child = max(state.sequences)
        assert len(state.sequences[child].page_table) == FORK_TOKENS // PAGE_SIZE
        copied = scheduler.counters.pages_copied - before + bool(scheduler.holdings.copies)
        kernel.handle(GATEWAY, m.Kill(3, child), 0.0)
        bench.step_us()
    return [
        Figure(f"fork of {FORK_TOKENS:,} tokens", statistics.median(times), "us", 100.0),
        Figure("pages of KV copied by a fork", float(copied), "", 0.0),
    ]


def as_llmosd_starts_it() -> None:
    """Begin again with the environment that the microkernel's process gets: it is read before the first line of code."""
    [[microkernel], *_] = make_plan(Config(), None, RunDir(Path(tempfile.gettempdir())))
    environment = dict(microkernel.environment)
    if not environment.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)


def pin() -> None:
    """One core and a real-time priority: what else runs on the machine takes its turn on the others, but still shares caches."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--only", choices=("steps", "verbs", "prefix", "fork"), help="one part")
    parser.add_argument("--pinned", action="store_true", help="see above; needs the right to set priorities")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    as_llmosd_starts_it()
    if arguments.pinned:
        pin()
    share = 10 if arguments.quick else 1
    gc.collect()
    gc.freeze()
    parts: dict[str, Callable[[], list[Figure]]] = {
        "steps": lambda: step_figures(200 // share),
        "verbs": lambda: verb_figures(100 // share),
        "prefix": lambda: prefix_figures(200 // share),
        "fork": lambda: fork_figures(300 // share),
    }
    figures = []
    for name, measure in parts.items():
        if arguments.only in (None, name):
            for figure in measure():
                print(figure, flush=True)
                figures.append(figure)
    if arguments.out:
        lines = [asdict(figure) | {"met": figure.met} for figure in figures]
        record = {"machine": machine(), "versions": versions(), "pinned": arguments.pinned, "figures": lines}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
