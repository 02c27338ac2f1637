"""Everything that must be known about the GPU executor, on a machine with a GPU, in one command and less than nine minutes.

    python bench/gpu.py --out FILE               # all parts; parts that FILE has already are skipped
    python bench/gpu.py --parts copy,kernels     # some; needed by others: copy, matmul
    python bench/gpu.py --dry-run                # tiny shapes on the CPU, kernels in Triton's interpreter: does the script itself work?

Parts: copy and matmul (the ceilings), kernels (each against a float64 reference; small kernels against their floors), attention (decode and
prefill over the shape grid), executor (decode and prompt steps against the roofline), sequences (256 sequences at once), baselines
(transformers' continuous batching, FlashAttention, FlashInfer, vLLM, where importable). Each has a limit of time; what did not fit is left
out and seen from the result. Needs torch, triton and numpy and this checkout, no installation. Exit code 1 if a kernel's check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import gpu_world
from gpu_world import World, say

# Seconds; together with starting, below nine minutes.
LIMITS = {"copy": 10, "matmul": 30, "kernels": 90, "attention": 80, "executor": 130, "sequences": 60, "baselines": 110}
PARTS = tuple(LIMITS)


def main() -> None:
    arguments = parse_arguments()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton
    gpu_world.mount()
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; --dry-run works without one")
    world = World("cpu" if arguments.dry_run else "cuda", arguments.dry_run, arguments.out)
    if arguments.out is not None and arguments.out.exists() and not arguments.again:
        world.parts = json.loads(arguments.out.read_text())["parts"]
    world.facts = {
        "dry_run": arguments.dry_run, "machine": gpu_world.machine(world.device), "versions": gpu_world.versions(),
    }  # fmt: skip
    say(json.dumps(world.facts))
    for number, name in enumerate(arguments.parts, 1):
        if name in world.parts:
            say(f"[{number}/{len(arguments.parts)}] {name}: there already")
            continue
        say(f"[{number}/{len(arguments.parts)}] {name}, at most about {LIMITS[name]} s")
        started = time.monotonic()
        world.deadline = started + LIMITS[name]
        with torch.inference_mode():
            world.parts[name] = part(name)(world)
        world.parts[name]["took_s"] = round(time.monotonic() - started, 1)
        world.save()
        if world.is_cuda:
            torch.cuda.empty_cache()
    wrong = world.parts.get("kernels", {}).get("wrong", [])
    say("written to", arguments.out) if arguments.out else say(json.dumps(world.parts, indent=1))
    sys.exit(1 if wrong else 0)


def part(name: str):  # noqa: ANN201
    """The function of a part; modules are loaded when they are needed."""
    if name == "baselines":
        import gpu_baselines

        return gpu_baselines.baselines
    if name in ("executor", "sequences"):
        import gpu_engine

        return {"executor": gpu_engine.steps, "sequences": gpu_engine.sequences}[name]
    import gpu_kernels

    return getattr(gpu_kernels, name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", action="store_true", help="measure parts that the file has already, too")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    arguments.parts = [name for name in arguments.parts.split(",") if name]
    for name in arguments.parts:
        if name not in PARTS:
            parser.error(f"--parts: {name!r} is none of {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    main()
