"""Tokens a second of the whole system - llmosd, its processes, the SDK - beside transformers (and llama.cpp) on one model.

    python bench/throughput.py                       # the 213-million-parameter random model, under six minutes
    python bench/throughput.py --quick               # one minute, to see that it works
    python bench/throughput.py --llama-cpp PYTHON    # PYTHON has llama-cpp-python and gguf (default: this one)
    python bench/throughput.py --weights int8 int4   # also llmos with weights in fewer bits

All systems get the same random prompts and generate exactly the same number of tokens greedily, on the same number of
threads, one system at a time, in turns; a figure is the median of its turns, prefill included. The floor is the rate
at which tokens could come if a step did nothing but read the bfloat16 weights once. The first turn of each pair is
preceded by a warm-up. Prefill is one prompt of --prefill-tokens, from the question to its first token. What does not
fit into --budget-s is left out and said so: on a busy machine the baselines can be very slow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from baselines import Baseline
from common import Shape, machine, memory_bandwidth, model_config, prompts, random_model, versions, weight_bytes
from daemon import Daemon
from load import LoadResult, run_load

from llmos import AsyncClient

GOALS = {("generate bfloat16", 1): 1.3, ("generate bfloat16", 8): 1.5, ("generate bfloat16", 32): 1.5}
OURS = "llmos"
CONTINUOUS_GOAL = 5.0
CONTINUOUS_STREAMS = 16  # its one level: it is slow, and no faster with more
WARM_UP_TOKENS = 2

Rates = dict[tuple[str, int], list[float]]


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop llmosd and the workers then, too
    arguments = parse_arguments()
    started = time.perf_counter()
    model = arguments.model or random_model(arguments.work_dir, Shape())
    facts = describe(arguments, model)
    print(json.dumps(facts["machine"]), json.dumps(facts["versions"]), sep="\n")
    print(
        f"model {model.name}: {facts['weight_bytes'] / 1e6:.0f} MB of weights a step, {arguments.threads} threads everywhere"
    )
    print(
        f"memory reads at {facts['memory_bytes_per_s'] / 1e9:.1f} GB/s -> floor {facts['floor_steps_per_s']:.1f} steps/s"
    )
    bench = Bench(arguments, model, deadline=started + arguments.budget_s)
    with ExitStack() as stack:
        bench.start(stack)
        for number in range(arguments.repeats):
            round_started = time.perf_counter()
            bench.round(warm_up=number == 0)
            now = time.perf_counter()
            if now - started + (now - round_started) > arguments.budget_s:
                break
    facts["rounds"] = number + 1
    facts["idle_cores"] = bench.idle_cores
    facts["results"] = summary(bench, facts["floor_steps_per_s"])
    facts["prefill"] = prefill_summary(bench)
    print_summary(facts)
    path = arguments.out or Path(__file__).parent / "results" / f"throughput-{facts['machine']['date'][:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="a Hugging Face directory (default: a random Llama, built once in --work-dir)")
    add("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "llmos-bench")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    add("--prompt-tokens", type=int, default=32)
    add("--output-tokens", type=int, default=64)
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=machine()["cores"])
    add(
        "--budget-s",
        type=float,
        default=330.0,
        help="start no round that would end later, and no baseline later (default %(default)s)",
    )
    add(
        "--baselines",
        nargs="*",
        default=["generate", "generate-float32", "continuous"],
        help="of these three; may be empty",
    )
    add("--llama-cpp", nargs="?", const=sys.executable, metavar="PYTHON", help="also measure llama.cpp")
    add("--weights", nargs="*", default=[], choices=("int8", "int4"), help="also llmos with these weight formats")
    add("--prefill-tokens", type=int, default=512, help="prompt of the prefill turns; 0 = none (default %(default)s)")
    add("--out", type=Path, help="JSON file (default: bench/results/throughput-DATE.json)")
    add("--quick", action="store_true", help="one short round at 1 and 8 streams")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.concurrency, arguments.repeats = [1, 8], 1
        arguments.prompt_tokens, arguments.output_tokens, arguments.prefill_tokens = 16, 16, 48
    return arguments


def describe(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Everything about the run that is known before it."""
    read = memory_bandwidth(arguments.threads)
    return {
        "machine": machine(),
        "versions": versions(),
        "model": {"directory": model.name, "vocab_size": model_config(model)["vocab_size"]},
        "threads": arguments.threads,
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": arguments.output_tokens,
        "prefill_tokens": arguments.prefill_tokens,
        "weight_bytes": weight_bytes(model),
        "memory_bytes_per_s": read,
        "floor_steps_per_s": read / weight_bytes(model),
    }


class Bench:
    """The systems under test and what was measured of them."""

    def __init__(self, arguments: argparse.Namespace, model: Path, deadline: float) -> None:
        self.arguments = arguments
        self.deadline = deadline
        self.rates: Rates = defaultdict(list)
        self.prefill_rates: dict[str, list[float]] = defaultdict(list)
        self.loads: dict[tuple[str, int], list[LoadResult]] = defaultdict(list)
        self.idle_cores = 0.0
        self._model = model
        self._vocab = model_config(model)["vocab_size"]
        self._baselines: list[Baseline] = []
        self._seed = 0

    def start(self, stack: ExitStack) -> None:
        """Start llmosd, then the baselines' workers; all stay and wait for their turns."""
        threads = self.arguments.threads
        max_rows = max(CONTINUOUS_STREAMS, *self.arguments.concurrency)
        self._daemons = {
            OURS if weights == "as_is" else f"{OURS} {weights}": stack.enter_context(
                Daemon(self._model, threads=threads, max_rows=max_rows, weights=weights)
            )
            for weights in ("as_is", *self.arguments.weights)
        }
        for name in self.arguments.baselines:
            kind, _, dtype = name.partition("-")
            worker = Baseline(kind, self._model, threads=threads, dtype=dtype or "bfloat16")
            self._baselines.append(stack.enter_context(worker))
        if self.arguments.llama_cpp:
            worker = Baseline("llama.cpp", self._model, threads=threads, python=self.arguments.llama_cpp)
            self._baselines.append(stack.enter_context(worker))
        self.idle_cores = self._daemons[OURS].idle_cores()
        if self.idle_cores > 0.1:
            print(
                f"warning: llmosd burns {self.idle_cores:.2f} cores while idle; the baselines suffer", file=sys.stderr
            )

    def round(self, *, warm_up: bool) -> None:
        """One turn of every system at every level."""
        for streams in self._levels():
            for name in self._daemons:
                if warm_up:
                    self._llmos(name, self._prompts(streams), WARM_UP_TOKENS)
                load = self._llmos(name, self._prompts(streams), self.arguments.output_tokens)
                self.loads[name, streams].append(load)
                self._record(name, streams, load.tokens_per_s)
            for baseline in self._baselines_at(streams):
                if time.perf_counter() < self.deadline:
                    self._baseline(baseline, streams, warm_up)
                else:
                    print(f"  {baseline.name:22} {streams:3} streams  left out: the time is up", flush=True)

        if self.arguments.prefill_tokens:
            self._prefill()

    def _prefill(self) -> None:
        """One long prompt to its first token, on every system."""
        length = self.arguments.prefill_tokens
        timed: dict[str, Callable[[list[list[int]]], float]] = {
            name: lambda ids, name=name: self._llmos(name, ids, 1).seconds  # type: ignore[misc]
            for name in self._daemons
        }
        for baseline in self._baselines_at(1):
            timed[baseline.name] = lambda ids, baseline=baseline: baseline.seconds(ids, 1)  # type: ignore[misc]
        for name, seconds in timed.items():
            if time.perf_counter() < self.deadline:
                self._seed += 1
                self.prefill_rates[name].append(length / seconds(prompts(1, length, self._vocab, self._seed)))
                print(f"  {name:22} prefill      {self.prefill_rates[name][-1]:8.1f} tokens/s", flush=True)

    def _levels(self) -> list[int]:
        extra = [CONTINUOUS_STREAMS] if any(baseline.is_continuous for baseline in self._baselines) else []
        return sorted({*self.arguments.concurrency, *extra})

    def _baselines_at(self, streams: int) -> list[Baseline]:
        asked = streams in self.arguments.concurrency
        return [b for b in self._baselines if (streams == CONTINUOUS_STREAMS if b.is_continuous else asked)]

    def _llmos(self, name: str, token_ids: list[list[int]], output_tokens: int) -> LoadResult:
        async def load() -> LoadResult:
            async with AsyncClient(self._daemons[name].run_dir, model="bench") as client:
                return await run_load(client, token_ids, output_tokens)

        return asyncio.run(load())

    def _baseline(self, baseline: Baseline, streams: int, warm_up: bool) -> None:
        if warm_up:
            baseline.tokens_per_s(self._prompts(1), WARM_UP_TOKENS)
        rate = baseline.tokens_per_s(self._prompts(streams), self.arguments.output_tokens)
        self._record(baseline.name, streams, rate)

    def _record(self, name: str, streams: int, rate: float) -> None:
        self.rates[name, streams].append(rate)
        print(f"  {name:22} {streams:3} streams  {rate:8.1f} tokens/s", flush=True)

    def _prompts(self, streams: int) -> list[list[int]]:
        """New ones for each turn, the same in each run of the benchmark."""
        self._seed += 1
        return prompts(streams, self.arguments.prompt_tokens, self._vocab, self._seed)


def summary(bench: Bench, floor_steps_per_s: float) -> list[dict[str, Any]]:
    """One entry per system and level: median rate, share of the floor, ratios, latencies."""
    medians = {key: statistics.median(rates) for key, rates in bench.rates.items()}
    entries = []
    for (name, streams), rate in medians.items():
        entry = {"system": name, "streams": streams, "tokens_per_s": rate, "turns": bench.rates[name, streams]}
        entry["share_of_floor"] = rate / (floor_steps_per_s * streams)
        if name.startswith(OURS):
            loads = bench.loads[name, streams]
            for field in ("ttft_s", "gap_s"):
                for index, label in enumerate(("p50", "p99")):
                    entry[f"{field[:-2]}_{label}_ms"] = 1e3 * statistics.median(
                        getattr(load, field)[index] for load in loads
                    )
        if name != OURS:
            entry["llmos_is_faster_by"] = medians[OURS, streams] / rate
            entry["goal"] = CONTINUOUS_GOAL if name.startswith("continuous") else GOALS.get((name, streams))
        entries.append(entry)
    return entries


def prefill_summary(bench: Bench) -> list[dict[str, Any]]:
    """One entry per system: prompt tokens a second."""
    medians = {name: statistics.median(rates) for name, rates in bench.prefill_rates.items()}
    return [
        {
            "system": name,
            "tokens_per_s": rate,
            "turns": bench.prefill_rates[name],
            "llmos_is_faster_by": medians[OURS] / rate,
        }
        for name, rate in medians.items()
    ]


def print_summary(facts: dict[str, Any]) -> None:
    print(f"\nmedians of {facts['rounds']} rounds; llmosd idle: {facts['idle_cores']:.3f} cores")
    print(f"{'system':22} {'streams':>7} {'tokens/s':>9} {'of floor':>9} {'llmos is':>9}   goal")
    for entry in facts["results"]:
        line = f"{entry['system']:22} {entry['streams']:7} {entry['tokens_per_s']:9.1f} {entry['share_of_floor']:9.0%}"
        if "gap_p50_ms" in entry:
            line += "            TTFT p50 {ttft_p50_ms:.0f} p99 {ttft_p99_ms:.0f} ms".format(**entry)
            line += ", between tokens p50 {gap_p50_ms:.1f} p99 {gap_p99_ms:.1f} ms".format(**entry)
        if "llmos_is_faster_by" in entry:
            line += f" {entry['llmos_is_faster_by']:8.2f}x" + (f"   {entry['goal']}x" if entry["goal"] else "")
            if entry["goal"] and entry["llmos_is_faster_by"] < entry["goal"]:
                line += "  MISSED"
        print(line)
    for entry in facts["prefill"]:
        print("{system:22} prefill {tokens_per_s:9.1f} tokens/s {llmos_is_faster_by:9.2f}x".format(**entry))


if __name__ == "__main__":
    main()
