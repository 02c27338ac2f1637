"""The executor drives itself: random weights, plain plans, two steps in flight. Parts "executor" and "sequences" of gpu.py.

`Drive` plays the microkernel for sequences whose lengths are known: all are admitted at once, prompts are computed in chunks beside those
that decode, a row and its pages are free again when its sequence has ended.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gpu_world import LLAMA_1B, LLAMA_8B, QWEN, TINY, ModelShape, RandomWeights, World, say


@dataclass(frozen=True)
class Params:
    """What the executor reads of `llmos.protocol.params.SamplingParams`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: None = None


@dataclass(frozen=True)
class Row:
    """`messages.RowAdd`."""

    row: int
    rid: int
    tokens: bytes
    prompt_len: int
    num_computed: int
    pages: bytes
    params: Any


@dataclass(frozen=True)
class Plan:
    """`messages.StepPlan`."""

    generation: int = 1
    step: int = 1
    row_frees: bytes = b""
    row_adds: tuple[Row, ...] = ()
    page_appends: bytes = b""
    prefill: bytes = b""
    decode: bytes | None = None
    swap_out: bytes = b""
    swap_in: bytes = b""
    copies: bytes = b""


@dataclass(frozen=True)
class Config:
    """What a backend reads of `llmos.config.ModelConfig`."""

    page_size: int
    num_pages: int
    kv_cache_gib: float = 0.0
    host_cache_gib: float = 0.0
    memory_share: float = 0.9
    deterministic: bool = False


def pack(values: Any) -> bytes:
    return np.asarray(list(values), "<i4").tobytes()


@dataclass
class Job:
    """A sequence: `prompt` tokens, then `output` to be generated."""

    prompt: list[int]
    output: int
    params: Any = field(default_factory=Params)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    generated: int = 0  # tokens that steps were submitted for


class Drive:
    """Runs jobs over a backend. `chunk`: most tokens of a step."""

    def __init__(self, backend: Any, jobs: list[Job], chunk: int) -> None:
        self.backend, self.jobs, self.chunk = backend, jobs, chunk
        self.size = backend.capabilities.page_size
        self.free = list(range(backend.capabilities.num_pages))[::-1]
        self.tokens = 0
        self._waiting = list(enumerate(jobs))[::-1]
        self._rows: dict[int, Job] = {}
        self._free_rows = list(range(backend.capabilities.max_rows))[::-1]
        self._frees: list[int] = []
        self._decode: list[int] = []

    def run(self, most_s: float = 1e9) -> float:
        """Seconds until all are done; `TimeoutError` beyond `most_s`."""
        started, in_flight = time.perf_counter(), 0
        while True:
            plan = self._plan()
            if plan is not None:
                self.backend.submit(plan)
                in_flight += 1
            if in_flight == self.backend.window or (plan is None and in_flight):
                self.tokens += len(self.backend.collect().samples) // 12
                in_flight -= 1
            elif plan is None:
                return time.perf_counter() - started
            if time.perf_counter() - started > most_s:
                raise TimeoutError(f"{self.tokens} tokens in {most_s:.0f} s")

    def _plan(self) -> Plan | None:
        frees, self._frees = self._frees, []
        adds = []
        while self._waiting and self._free_rows:
            number, job = self._waiting[-1]
            need = -(-(len(job.prompt) + job.output) // self.size)
            if need > len(self.free):
                break
            self._waiting.pop()
            row = self._free_rows.pop()
            job.pages = [self.free.pop() for _ in range(need)]
            self._rows[row] = job
            adds.append(Row(row, number, pack(job.prompt), len(job.prompt), 0, pack(job.pages), job.params))
        if not self._rows and not frees:
            return None
        decode = [row for row, job in self._rows.items() if job.computed >= len(job.prompt)]
        prefill, budget = [], self.chunk - len(decode)
        for row, job in self._rows.items():
            left = len(job.prompt) - job.computed
            if left > 0 and budget > 0:
                count = min(left, budget)
                budget -= count
                prefill += [row, job.computed, count, int(count == left)]
                job.computed += count
                job.generated += count == left
        same = decode == self._decode
        self._decode = decode
        for row in decode:
            self._rows[row].generated += 1
        for row in [row for row, job in self._rows.items() if job.generated >= job.output]:
            job = self._rows.pop(row)
            self.free += job.pages
            self._free_rows.append(row)
            self._frees.append(row)
        return Plan(
            row_frees=pack(frees), row_adds=tuple(adds), prefill=pack(prefill), decode=None if same else pack(decode)
        )


def open_engine(
    world: World,
    shape: ModelShape,
    *,
    max_rows: int,
    step_tokens: int,
    max_context: int,
    num_pages: int,
    page_size: int = 64,
) -> Any:
    """A `CudaBackend` with random weights and random numbers in its pages: nothing is as fast as on zeros."""
    import torch

    from llmos.services.executor.backend import Limits
    from llmos.services.executor.cuda.device import Device
    from llmos.services.executor.cuda.open import build
    from llmos.services.executor.cuda.products import DeviceLinear
    from llmos.services.executor.models.decoder import Decoder
    from llmos.services.executor.spec import ModelSpec, RopeSpec

    dtype = torch.bfloat16 if world.is_cuda else torch.float32
    spec = ModelSpec(
        architecture=shape.name, vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_layers=shape.layers, num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, norm_eps=1e-6,
        max_context=max_context, tie_embeddings=shape.tied, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=shape.qk_norm,
        rope=RopeSpec("default", 1e6), windows=(0,) * shape.layers, dtype="bfloat16",
    )  # fmt: skip
    device = Device(world.device)
    with torch.inference_mode(), device.stream():
        weights = Decoder(spec, RandomWeights(world.device, dtype), dtype, DeviceLinear, lambda: None)
        config: Any = Config(page_size=page_size, num_pages=num_pages)
        backend = build(config, device, weights, Limits(max_rows, step_tokens), max_context)
        for page in range(0, num_pages, 256):
            backend.pool.storage[page : page + 256].normal_()
    started = time.perf_counter()
    backend.warm_up(lambda: None)
    say(f"  {shape.name}: kernels compiled and first graphs captured in {time.perf_counter() - started:.1f} s")
    return backend


# ---------------------------------------------------------------- steps against their floors

GRID = ((1, 512), (8, 512), (64, 512), (256, 512), (1, 4096), (8, 4096), (64, 4096), (1, 32_768), (8, 32_768))
PROMPTS = (512, 4096, 8192)


def steps(world: World) -> dict[str, Any]:
    """Part "executor": decode steps and prompts of three models. `share`: the floor's time over the measured one."""
    import torch

    found: dict[str, Any] = {}
    for shape in (TINY,) if world.dry else (QWEN, LLAMA_8B, LLAMA_1B):
        if world.late(20.0):
            found[shape.name] = "left out: no time"
            continue
        grid, lengths = (((1, 20), (3, 9)), (11,)) if world.dry else (GRID, PROMPTS)
        page_size = 16 if world.dry else 64
        most = max(rows * (context + 128) for rows, context in grid)
        fits = 40 if world.dry else int(60e9 / (shape.kv_bytes() * page_size))
        num_pages = min(fits, -(-most // page_size) + 256)
        backend = open_engine(
            world, shape, max_rows=8 if world.dry else 256, step_tokens=32 if world.dry else 8192, page_size=page_size,
            max_context=64 if world.dry else 33_000, num_pages=num_pages,
        )  # fmt: skip
        entry = found[shape.name] = {"decode": [], "prefill": []}
        for rows, context in grid:
            if rows * -(-(context + 64) // page_size) <= num_pages and not world.late():
                entry["decode"].append(_decode_step(world, backend, shape, rows, context))
        for length in lengths:
            if not world.late():
                entry["prefill"].append(_prompt(world, backend, shape, length))
        del backend
        if world.is_cuda:
            torch.cuda.empty_cache()
    return found


def _decode_step(world: World, backend: Any, shape: ModelShape, rows: int, context: int) -> dict[str, Any]:
    """Rows enter with their context computed (its numbers are random), then decode with two steps in flight."""
    count = 3 if world.dry else 40
    backend.reset()
    room = -(-(context + count + 8) // backend.capabilities.page_size)
    tokens = np.random.default_rng(0).integers(0, shape.vocab, context, dtype=np.int32).tobytes()
    adds = tuple(
        Row(row, row, tokens, context, context - 1, pack(range(row * room, (row + 1) * room)), Params(temperature=0.6))
        for row in range(rows)
    )
    chunks = pack(value for row in range(rows) for value in (row, context - 1, 1, 1))
    backend.execute(Plan(row_adds=adds, prefill=chunks, decode=b""))
    backend.execute(Plan(decode=pack(range(rows))))
    backend.execute(Plan())
    backend.submit(Plan())
    started = time.perf_counter()
    for _ in range(count):
        backend.submit(Plan())
        backend.collect()
    took = (time.perf_counter() - started) / count
    backend.collect()
    weights = max(2 * shape.read_weights / world.bandwidth, 2 * shape.read_weights * rows / world.rate)
    floor = weights + rows * context * shape.kv_bytes() / world.bandwidth
    say(f"  {shape.name} decode rows {rows:3} context {context:5}: {took * 1e3:8.3f} ms, floor {floor * 1e3:.3f} ms")
    return {"rows": rows, "context": context, "ms": took * 1e3, "floor_ms": floor * 1e3, "share": floor / took}


def _prompt(world: World, backend: Any, shape: ModelShape, length: int) -> dict[str, Any]:
    """One prompt of this length into empty pages, in chunks of a step."""
    times = []
    for number in range(3):
        backend.reset()
        prompt = np.random.default_rng(number).integers(0, shape.vocab, length).tolist()
        times.append(Drive(backend, [Job(prompt, 1)], backend.capabilities.max_step_tokens).run())
    took = sorted(times[1:])[0]
    flop = 2 * shape.layer_weights * length + 2 * shape.hidden * shape.vocab
    flop += 2 * length * length * shape.heads * shape.head_dim * shape.layers
    floor = flop / world.rate
    say(f"  {shape.name} prompt of {length}: {took * 1e3:.2f} ms, floor {floor * 1e3:.2f} ms")
    return {"tokens": length, "ms": took * 1e3, "floor_ms": floor * 1e3, "share": floor / took}


# ---------------------------------------------------------------- 256 sequences


def nano_jobs(count: int, vocab: int, *, small: bool) -> list[tuple[list[int], int]]:
    """The lengths and ids of nano-vllm's benchmark: seed 0, 100 to 1024 tokens in, 100 to 1024 out."""
    low, high = (3, 9) if small else (100, 1024)
    draw = random.Random(0)
    prompts = [[draw.randint(0, min(10_000, vocab - 1)) for _ in range(draw.randint(low, high))] for _ in range(count)]
    return [(prompt, draw.randint(low, high)) for prompt in prompts]


def sequences(world: World, count: int = 256) -> dict[str, Any]:
    """Part "sequences": all at once, random weights of Qwen3-0.6B, temperature 0.6, no stop token."""
    shape = TINY if world.dry else QWEN
    count = 4 if world.dry else count
    jobs = nano_jobs(count, shape.vocab, small=world.dry)
    size = 16 if world.dry else 64
    num_pages = sum(-(-(len(prompt) + output) // size) for prompt, output in jobs) + 64
    rows, tokens = (4, 16) if world.dry else (256, 16_384)
    backend = open_engine(
        world,
        shape,
        max_rows=rows,
        step_tokens=tokens,
        max_context=64 if world.dry else 4096,
        num_pages=num_pages,
        page_size=size,
    )
    runs = []
    for number in range(1 if world.dry else 2):  # the first captures graphs
        backend.reset()
        params = [Params(temperature=0.6, seed=seed) for seed in range(count)]
        drive = Drive(backend, [Job(list(p), out, params[i]) for i, (p, out) in enumerate(jobs)], tokens)
        took = drive.run(120.0)
        assert drive.tokens == sum(output for _, output in jobs), "every token that was asked for came"
        runs.append(took)
        say(f"  run {number}: {drive.tokens} tokens in {took:.2f} s = {drive.tokens / took:.0f} tokens/s")
    floor = _floor(world, shape, jobs)
    output = sum(out for _, out in jobs)
    return {
        "sequences": count, "prompt_tokens": sum(len(prompt) for prompt, _ in jobs), "output_tokens": output,
        "first_run_s": runs[0], "s": runs[-1], "tokens_per_s": output / runs[-1], "floor_s": floor, "share": floor / runs[-1],
    }  # fmt: skip


def _floor(world: World, shape: ModelShape, jobs: list[tuple[list[int], int]]) -> float:
    """All prompts at the matrix rate, then step after step the weights once and each row's context once."""
    total = 0.0
    for prompt, _ in jobs:
        total += 2 * shape.layer_weights * len(prompt) / world.rate
        total += 2 * len(prompt) ** 2 * shape.heads * shape.head_dim * shape.layers / world.rate
    for step in range(1, max(output for _, output in jobs)):
        running = [len(prompt) + step for prompt, output in jobs if output > step]
        weights = max(2 * shape.read_weights / world.bandwidth, 2 * shape.read_weights * len(running) / world.rate)
        total += weights + sum(running) * shape.kv_bytes() / world.bandwidth
    return total
