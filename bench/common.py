"""What every benchmark needs: the machine in words, statistics, the random model, the memory-bandwidth floor.

Imports neither torch nor transformers: the load client must stay as light as a user's program.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20260101


@dataclass(frozen=True)
class Shape:
    """A Llama-family model with tied embeddings. The default has 213 million parameters."""

    hidden: int = 1024
    layers: int = 16
    heads: int = 16
    kv_heads: int = 4
    ffn: int = 2816
    vocab: int = 32000
    context: int = 4096

    @property
    def name(self) -> str:
        return f"llama-h{self.hidden}-l{self.layers}-f{self.ffn}-v{self.vocab}-tied"


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    import psutil  # not here when llama.cpp runs in an interpreter of its own

    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    flags = next((set(line.split()) for line in _cpuinfo() if line.startswith("flags")), set())
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "vector_units": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve"}),
        "load_1min": round(os.getloadavg()[0], 2),
        "os": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of everything that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("llmos", "torch", "transformers", "pyzmq", "msgspec", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def percentile(values: list[float], share: float) -> float:
    """Linear between the two nearest values; 0 of nothing."""
    return float(np.percentile(values, share * 100)) if values else 0.0


def prompts(count: int, length: int, vocab: int, seed: int = SEED) -> list[list[int]]:
    """Random token ids, no two prompts alike, so that no prefix cache helps anybody."""
    return np.random.default_rng(seed).integers(3, vocab, size=(count, length)).tolist()  # type: ignore[no-any-return]


# ---------------------------------------------------------------- the model

BUILD_MODEL = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
directory, shape, seed = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(seed)
config = LlamaConfig(
    hidden_size=shape["hidden"], num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
    num_key_value_heads=shape["kv_heads"], intermediate_size=shape["ffn"], vocab_size=shape["vocab"],
    max_position_embeddings=shape["context"], tie_word_embeddings=True, dtype="bfloat16",
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
words = {f"t{index} ": index for index in range(shape["vocab"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0 "))
tokenizer.decoder = decoders.Fuse()
tokenizer.save(directory + "/tokenizer.json")
with open(directory + "/tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape["context"]}, file)
"""


def random_model(work_dir: Path, shape: Shape) -> Path:
    """The directory of a seeded random bfloat16 model; built once, complete or not there."""
    directory = work_dir / f"{shape.name}-seed{SEED}"
    if not directory.exists():
        partial = directory.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        shape_json = json.dumps(shape.__dict__)
        subprocess.run([sys.executable, "-P", "-c", BUILD_MODEL, str(partial), shape_json, str(SEED)], check=True)
        partial.rename(directory)
    return directory


def model_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def weight_bytes(directory: Path) -> int:
    """Bytes of weights that one decode step must read: all but an embedding table that is only looked up."""
    headers = [safetensors_header(path) for path in sorted(directory.glob("*.safetensors"))]
    tensors = {name: entry for header in headers for name, entry in header.items() if name != "__metadata__"}
    if "lm_head.weight" in tensors:
        del tensors["model.embed_tokens.weight"]
    return sum(end - begin for begin, end in (entry["data_offsets"] for entry in tensors.values()))


def safetensors_header(path: Path) -> dict[str, Any]:
    """Names, dtypes and offsets (which count from the end of the header)."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    return header


# ---------------------------------------------------------------- the physical limit

READ_MEMORY = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
block = torch.ones(1 << 26)
times = []
for _ in range(12):
    start = time.perf_counter()
    block.sum()
    times.append(time.perf_counter() - start)
print(block.nbytes / min(times))
"""


def memory_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory, best of 12 passes over 256 MiB."""
    command = [sys.executable, "-P", "-c", READ_MEMORY, str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
