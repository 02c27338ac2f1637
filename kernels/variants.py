"""What is compiled ahead of time: a kernel with the types and constants of one launch.

Each module with kernels has a function `variants()` that yields its own. `aot.py` compiles them all without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Variant:
    """name: unique, says the kernel and what is special about the variant.

    types: one word for each argument that is no constant, in order: `*bf16` a pointer (always aligned to 16 bytes), `i32`, `i64` or `fp32`
    a number; `i32:16` a number that 16 divides, which Triton compiles differently. constants: the tl.constexpr arguments.
    """

    name: str
    kernel: Any
    types: str
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    def signature(self) -> dict[str, str]:
        """Argument name -> type, as Triton wants it."""
        words = iter(self.types.split())
        names = self.kernel.arg_names
        found = {
            name: "constexpr" if name in self.constants else next(words, "missing").split(":")[0] for name in names
        }
        left = list(words)
        fits = "missing" not in found.values() and not left
        assert fits, f"{self.name}: {len(self.types.split())} types for {names}"
        return found

    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """Which arguments 16 divides."""
        given = [index for index, name in enumerate(self.kernel.arg_names) if name not in self.constants]
        words = self.types.split()
        return {
            (index,): [["tt.divisibility", 16]]
            for index, word in zip(given, words)
            if word.startswith("*") or word.endswith(":16")
        }
