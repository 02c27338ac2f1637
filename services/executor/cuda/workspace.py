"""Every tensor that a step writes, allocated once: a step in steady state allocates nothing.

`tokens` bounds the batch of one step (decode rows and prefill chunks together), `rows` what is sampled. Slices of a buffer from its start
serve smaller batches, so a CUDA graph of any batch size reads and writes the same addresses.
"""

from __future__ import annotations

import torch

from llmos.services.executor.cuda.device import Device
from llmos.services.executor.spec import ModelSpec


class Workspace:
    """Inputs (int32, but slots), activations of one layer, and what sampling reads and writes."""

    def __init__(self, device: Device, spec: ModelSpec, tokens: int, rows: int, dtype: torch.dtype) -> None:
        def ints(size: int) -> torch.Tensor:
            return device.empty(size, dtype=torch.int32)

        def floats(*shape: int) -> torch.Tensor:
            return device.empty(*shape, dtype=dtype)

        heads = spec.num_heads + 2 * spec.num_kv_heads
        self.tokens, self.rows = tokens, rows
        self.token_ids, self.positions, self.context, self.active = ints(tokens), ints(tokens), ints(tokens), ints(rows)
        self.lengths, self.order = ints(rows), torch.arange(rows, dtype=torch.int32, device=device.device)
        self.slots = device.empty(tokens, dtype=torch.int64)
        self.hidden, self.normed, self.projected = (floats(tokens, spec.hidden_size) for _ in range(3))
        self.qkv = floats(tokens, heads, spec.head_dim)
        self.attended = floats(tokens, spec.num_heads, spec.head_dim)
        self.gate_up = floats(tokens, 2 * spec.intermediate_size)
        self.activated = floats(tokens, spec.intermediate_size)
        self.last_hidden, self.last_projected, self.last_normed = (floats(rows, spec.hidden_size) for _ in range(3))
        self.logits = floats(rows, spec.vocab_size)
        self.sampled = ints(rows)
        self.results = device.empty(rows, 4, dtype=torch.int32)

    @property
    def num_bytes(self) -> int:
        return sum(
            value.numel() * value.element_size() for value in vars(self).values() if isinstance(value, torch.Tensor)
        )
