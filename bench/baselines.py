"""What llmos is compared with, each in a process of its own that reads jobs from stdin and writes results to stdout.

    python bench/baselines.py generate --model DIR --threads 2 --dtype bfloat16
    {"prompts": [[5, 6]], "output_tokens": 8}
    {"seconds": 0.61, "output_tokens": 8}

Kinds: `generate` (transformers, one batch), `continuous` (transformers' continuous batching), `llama.cpp` (llamacpp.py).
A worker that has no job sleeps in read(); the parent asks one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

Job = Callable[[list[list[int]], int], int]  # prompts, tokens to generate for each -> tokens generated


def generate(model_dir: str, threads: int, dtype: str) -> Job:
    """`model.generate` on one batch of equally long prompts, greedy."""
    import torch

    model = _transformers_model(model_dir, threads, dtype)

    def job(prompts: list[list[int]], output_tokens: int) -> int:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return int(output[:, ids.shape[1] :].numel())

    return job


def continuous(model_dir: str, threads: int, dtype: str) -> Job:
    """`model.generate_batch`: transformers' paged continuous batching, greedy."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _transformers_model(model_dir, threads, dtype)

    def job(prompts: list[list[int]], output_tokens: int) -> int:
        generation = GenerationConfig(max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        # Sized generously by hand: left alone it plans for a GPU's memory.
        sizes = ContinuousBatchingConfig(num_blocks=4 * len(prompts) + 16, max_batch_tokens=1024)
        results = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=sizes)
        errors = [str(result.error) for result in results.values() if result.error]
        if errors:
            raise RuntimeError(errors[0])
        return sum(len(result.generated_tokens) for result in results.values())

    return job


def llama_cpp(model_dir: str, threads: int, dtype: str) -> Job:
    from llamacpp import LlamaCpp

    return LlamaCpp(Path(model_dir), threads).generate


KINDS: dict[str, Callable[[str, int, str], Job]] = {
    "generate": generate,
    "continuous": continuous,
    "llama.cpp": llama_cpp,
}


def _transformers_model(model_dir: str, threads: int, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    return model.eval()


def serve(job: Job) -> None:
    """Answer jobs until stdin ends. The results' own file descriptor keeps libraries' chatter out of them."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    results.write('{"ready": true}\n')
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        made = job(asked["prompts"], asked["output_tokens"])
        results.write(json.dumps({"seconds": time.perf_counter() - start, "output_tokens": made}) + "\n")


class Baseline:
    """The parent's handle on one worker."""

    def __init__(
        self, kind: str, model: Path, *, threads: int, dtype: str = "bfloat16", python: str = sys.executable
    ) -> None:
        self.is_continuous = kind == "continuous"
        self.name = kind if kind == "llama.cpp" else f"{kind} {dtype}"
        command = [python, __file__, kind, "--model", str(model), "--threads", str(threads)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._chatter = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [*command, "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._chatter,
            text=True,
            env=environment,
        )
        self._read()

    def __enter__(self) -> Baseline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._chatter.close()

    def tokens_per_s(self, prompts: list[list[int]], output_tokens: int) -> float:
        return len(prompts) * output_tokens / self.seconds(prompts, output_tokens)

    def seconds(self, prompts: list[list[int]], output_tokens: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "output_tokens": output_tokens}) + "\n")
        self._process.stdin.flush()
        result = self._read()
        expected = len(prompts) * output_tokens
        if result["output_tokens"] != expected:
            raise RuntimeError(f"{self.name} made {result['output_tokens']} of {expected} tokens")
        return float(result["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._chatter.seek(0)
            raise RuntimeError(f"the {self.name} worker ended with {code}:\n{self._chatter.read()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    serve(KINDS[arguments.kind](arguments.model, arguments.threads, arguments.dtype))


if __name__ == "__main__":
    main()
