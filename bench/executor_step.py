"""Milliseconds a decode step of the CPU executor alone, without any other process: `python bench/executor_step.py`.

Drives `CpuBackend.execute` with plans made by hand. Beside each time: the share of the floor, which is the time that
reading the weights once takes at this machine's memory bandwidth. --profile prints what the time goes into.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import Shape, memory_bandwidth, percentile, prompts, random_model, weight_bytes

from llmos.config import ModelConfig
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan
from llmos.protocol.params import SamplingParams
from llmos.services.executor.backend import Limits
from llmos.services.executor.cpu import CpuBackend

PAGE_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face directory (default: the random one of throughput.py)"
    )
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "llmos-bench")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--weights", default="as_is", choices=("as_is", "int8", "int4"))
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    model = arguments.model or random_model(arguments.work_dir, Shape())
    pages = max(arguments.rows) * pages_for(max(arguments.context) + 2 * arguments.steps + 8)
    config = ModelConfig(
        "bench",
        path=str(model),
        backend="cpu",
        page_size=PAGE_SIZE,
        num_pages=pages,
        threads=arguments.threads,
        weights=arguments.weights,
    )
    backend = CpuBackend.open(config, model, Limits(max(arguments.rows), 1 << 20), lambda: None)
    floor_s = weight_bytes(model) / memory_bandwidth(arguments.threads)
    print(f"{backend.description}; floor {floor_s * 1e3:.2f} ms a step")
    for context in arguments.context:
        for rows in arguments.rows:
            report(backend, rows, context, arguments, floor_s)


def report(backend: CpuBackend, rows: int, context: int, arguments: argparse.Namespace, floor_s: float) -> None:
    """Prefill `rows` sequences of `context` tokens, then time decode steps."""
    backend.reset()
    room = pages_for(context + 2 * arguments.steps + 8)
    prefill = fill_plan(backend, rows, context, room, arguments.temperature)
    start = time.perf_counter()
    backend.execute(prefill)
    prefill_s = time.perf_counter() - start
    step = decode_plan(rows)
    times = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        backend.execute(step)
        times.append(time.perf_counter() - start)
    median, best = percentile(times, 0.5), min(times)
    print(
        f"rows {rows:3}  context {context:5}  prefill {rows * context / prefill_s:7.0f} tokens/s  "
        f"decode p50 {median * 1e3:7.2f} ms  best {best * 1e3:7.2f} ms  {rows / median:7.1f} tokens/s  "
        f"floor/best {floor_s / best:4.0%}",
        flush=True,
    )
    if arguments.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(arguments.steps // 2):
                backend.execute(step)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40))


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def fill_plan(backend: CpuBackend, rows: int, context: int, pages: int, temperature: float) -> StepPlan:
    """Adds `rows` rows and computes their prompts in one step."""
    params = SamplingParams(temperature=temperature, seed=1)
    adds = [
        RowAdd(row, row + 1, pack_i32(prompt), context, 0, pack_i32(range(row * pages, (row + 1) * pages)), params)
        for row, prompt in enumerate(prompts(rows, context, backend.capabilities.vocab_size))
    ]
    chunks = pack_i32(value for row in range(rows) for value in (row, 0, context, 1))
    return StepPlan(1, 1, b"", tuple(adds), b"", chunks, b"")


def decode_plan(rows: int) -> StepPlan:
    return StepPlan(1, 2, b"", (), b"", b"", pack_i32(range(rows)))


if __name__ == "__main__":
    main()
