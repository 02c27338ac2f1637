"""What it costs to copy pages and to swap them to host memory and back, against a plain copy and against computing them again.

    python bench/swap.py            # under a minute; --out FILE keeps the figures

Microseconds a page (median) in batches of 1, 16 and 256 pages with scattered ids, and GB/s of copied bytes. Limit: torch's `copy_` of
as many bytes of the same memory in one piece. "again" is what the demonstration model takes to compute a page's tokens
in one prefill chunk; swapping pays where that is more than out and in together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from common import machine, prompts, versions

from llmos.config import ModelConfig, model_path
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan
from llmos.protocol.params import SamplingParams
from llmos.services.executor.backend import Limits
from llmos.services.executor.cpu import CpuBackend
from llmos.services.executor.host_cache import HostCache
from llmos.services.executor.kv_cache import KVCache
from llmos.services.executor.page_moves import Pairs
from llmos.services.executor.spec import ModelSpec, RopeSpec, read_spec

BATCHES = (1, 16, 256)
PAGE_SIZES = (16, 64)
CACHE_BYTES = (
    128 << 20
)  # batches are taken from at least this much memory, so that they are not in the processor's caches
MIN_ROUNDS, MIN_S = 7, 0.3
QWEN3_06B = ModelSpec(
    "Qwen3ForCausalLM", 151_936, 1024, 3072, 28, 16, 8, 128, 1e-6, 40_960, True, False, False, False, True,
    RopeSpec("default", 1e6), (0,) * 28, "bfloat16",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Microseconds a page. `plain`: the limit."""

    model: str
    page_size: int
    page_bytes: int
    batch: int
    plain: float
    copy: float
    swap_out: float
    swap_in: float

    def gb_per_s(self, us: float) -> float:
        return self.page_bytes / us / 1e3

    def text(self) -> str:
        times = "  ".join(
            f"{name} {us:8.1f} us {self.gb_per_s(us):5.1f} GB/s"
            for name, us in (("plain", self.plain), ("copy", self.copy), ("out", self.swap_out), ("in", self.swap_in))
        )
        return f"{self.model:15} page {self.page_size:2} ({self.page_bytes / 1024:6.0f} KiB)  batch {self.batch:3}  {times}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--memory-gib", type=float, default=8.0, help="leave out batches that need more (default 8)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    demo = model_path(ModelConfig("demo"))
    lines, left_out, again = [], [], []
    for page_size in PAGE_SIZES:
        for name, spec in (("demo", read_spec(demo)), ("qwen3-0.6b cache", QWEN3_06B)):
            for batch in BATCHES:
                found = moves(name, spec, page_size, batch, arguments.memory_gib)
                if found is None:
                    left_out.append({"model": name, "page_size": page_size, "batch": batch})
                    print(f"{name}, page {page_size}, batch {batch}: needs more than {arguments.memory_gib} GiB")
                else:
                    lines.append(found)
                    print(found.text(), flush=True)
    for page_size in PAGE_SIZES:
        again += recompute(demo, page_size, arguments.threads, [line for line in lines if line.model == "demo"])
    if arguments.out:
        results: dict[str, Any] = {
            "machine": machine(), "versions": versions(), "threads": arguments.threads,
            "moves_us_a_page": [asdict(line) for line in lines], "left_out": left_out, "demo_recompute": again,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def moves(name: str, spec: ModelSpec, page_size: int, batch: int, memory_gib: float) -> Line | None:
    """Time every kind of move; None if that takes too much memory."""
    page_bytes = KVCache(spec, 1, page_size, torch.bfloat16).page_bytes
    pool = 2 * max(batch, CACHE_BYTES // page_bytes // 2)
    if (2 * pool) * page_bytes > memory_gib * 2**30:
        return None
    cache = KVCache(spec, pool, page_size, torch.bfloat16)
    host = HostCache(cache, pool)
    cache.words.fill_(1)
    host.swap_out([[page, page] for page in range(pool)])  # touch all memory
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(0)).tolist()
    halves = order[: pool // 2], order[pool // 2 :]
    batches = [
        [[here, there] for here, there in zip(halves[0][first : first + batch], halves[1][first : first + batch])]
        for first in range(0, pool // 2 - batch + 1, batch)
    ]
    here, there = cache.words.transpose(0, 1).view(2, -1)  # the cache's memory as it lies, halved
    words = batch * page_bytes // here.element_size()
    pieces = list(zip(here.split(words), there.split(words)))[: len(batches)]
    plain = [(lambda source=source, target=target: target.copy_(source)) for source, target in pieces]
    return Line(
        name, page_size, page_bytes, batch,
        median_us(plain) / batch,
        *(median_us(calls(move, batches)) / batch for move in (cache.copy, host.swap_out, host.swap_in)),
    )  # fmt: skip


def calls(move: Callable[[Pairs], None], batches: list[Pairs]) -> list[Callable[[], None]]:
    return [(lambda pairs=pairs: move(pairs)) for pairs in batches]


def median_us(functions: list[Callable[[], Any]]) -> float:
    """Of calls that take turns over different memory."""
    functions[0]()
    times: list[float] = []
    end = time.perf_counter() + MIN_S
    while len(times) < MIN_ROUNDS or time.perf_counter() < end:
        for function in functions:
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def recompute(directory: Path, page_size: int, threads: int, lines: list[Line]) -> list[dict[str, Any]]:
    """Time to compute 1, 4, 16 and so on pages of tokens in one chunk, beside swapping as many out and in."""
    found = []
    config = ModelConfig("demo", backend="cpu", page_size=page_size, num_pages=256, threads=threads)
    backend = CpuBackend.open(config, directory, Limits(1, 1 << 20), lambda: None)
    for pages in (1, 4, 16, 64):
        tokens = pages * page_size
        if tokens >= backend.capabilities.max_context:
            break
        us = statistics.median(prefill_us(backend, tokens) for _ in range(MIN_ROUNDS))
        batch = max(size for size in BATCHES if size <= pages)
        swap = next(
            line.swap_out + line.swap_in for line in lines if (line.page_size, line.batch) == (page_size, batch)
        )
        again = us / pages
        found.append({"page_size": page_size, "pages": pages, "again_us_a_page": again, "swap_us_a_page": swap})
        verdict = f"swapping costs 1/{again / swap:.0f} of it" if swap < again else "computing is cheaper"
        print(
            f"demo            page {page_size:2}  {pages:3} pages  again {again:8.0f} us a page, out and in {swap:6.1f}: {verdict}"
        )
    return found


def prefill_us(backend: CpuBackend, tokens: int) -> float:
    backend.reset()
    pages = pack_i32(range(-(-tokens // backend.cache.page_size)))
    [prompt] = prompts(1, tokens, backend.capabilities.vocab_size)
    add = RowAdd(0, 1, pack_i32(prompt), tokens, 0, pages, SamplingParams(temperature=0.0, seed=1))
    plan = StepPlan(1, 1, b"", (add,), b"", pack_i32([0, 0, tokens, 0]), b"")
    started = time.perf_counter()
    backend.execute(plan)
    return (time.perf_counter() - started) * 1e6


if __name__ == "__main__":
    main()
