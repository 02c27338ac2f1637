"""What all parts of gpu.py share: our packages without an installation, time on a device, shapes of models, random weights, a results file.

Needs torch, triton and numpy, nothing else: neither a codec nor ZeroMQ, and the plans for the executor are plain objects (`gpu_engine`).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_PACKAGES = {"llmos": "llmos", "llmos.kernels": "kernels", "llmos.services": "services"}


def mount() -> None:
    """Make `llmos` importable from this checkout. The root is not put on the path: its folder `kernels` is not to be found by that name."""
    for name, folder in _PACKAGES.items():
        if importlib.util.find_spec(name) is not None:
            continue
        place = ROOT / folder
        spec = importlib.util.spec_from_file_location(
            name, place / "__init__.py", submodule_search_locations=[str(place)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    qk_norm: bool = False

    @property
    def layer_weights(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def read_weights(self) -> int:
        """Weights that a decode step reads."""
        return self.layer_weights + self.hidden * self.vocab

    def kv_bytes(self, item: int = 2) -> int:
        """Of one token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * item


QWEN = ModelShape("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151_936, True, True)
LLAMA_1B = ModelShape("Llama-3.2-1B", 16, 2048, 32, 8, 64, 8192, 128_256, True)
LLAMA_8B = ModelShape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14_336, 128_256, False)
TINY = ModelShape("tiny", 2, 32, 4, 2, 16, 64, 128, True, True)


@dataclass
class World:
    """One run: where, how small, until when. `parts`: results so far, those of earlier runs included."""

    device: str
    dry: bool
    out: Path | None
    parts: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    deadline: float = 0.0

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def late(self, reserve_s: float = 0.0) -> bool:
        """Is this part's time used up?"""
        return time.monotonic() + reserve_s > self.deadline

    def save(self) -> None:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            partial = self.out.with_suffix(".partial")
            partial.write_text(json.dumps({**self.facts, "parts": self.parts}, indent=1) + "\n")
            partial.replace(self.out)

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a copy, as measured by the part of that name; without it, not a number."""
        return float(self.parts.get("copy", {}).get("bytes_per_s", "nan"))

    @property
    def rate(self) -> float:
        """Matrix FLOP a second, likewise."""
        return float(self.parts.get("matmul", {}).get("flop_per_s", "nan"))


def say(*words: Any) -> None:
    print(*words, flush=True)


def seconds(world: World, work: Callable[[], Any], *, repeats: int = 20, inner: int = 1) -> float:
    """Of one call on the device: the median of a few, warmed up. `inner` calls are one CUDA graph, so that launches cost little."""
    import torch

    work()
    if not world.is_cuda:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    run: Callable[[], Any] = work
    if inner > 1:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(inner):
                work()
        run = graph.replay
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / inner)
    return statistics.median(times)


def machine(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "os": platform.platform(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda, "driver": _driver(),
        }  # fmt: skip
    return found


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "transformers", "flash-attn", "flashinfer-python", "vllm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class RandomWeights:
    """Every tensor that a decoder asks for, random, on the device: `checkpoint.Checkpoint` without files."""

    def __init__(self, device: str, dtype: Any) -> None:
        import torch

        self._torch, self._device, self._dtype = torch, device, dtype
        self._generator = torch.Generator(device).manual_seed(1)

    def take(self, name: str, *shape: int) -> Any:
        if "norm" in name:
            return self._torch.ones(shape, device=self._device, dtype=self._dtype)
        tensor = self._torch.empty(shape, device=self._device, dtype=self._dtype)
        return tensor.normal_(0.0, 0.02, generator=self._generator)
