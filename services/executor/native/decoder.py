"""A decoder's forward pass as one list of kernels over fixed buffers: what `models.decoder.Decoder` computes, without torch between.

Built from a loaded `Decoder` whose products are `NativeLinear`. Seven kernels a layer (norm, q/k/v, rotate and write KV, attend, output,
norm, gate and up, SiLU, down) run in one parallel region; between layers `tick` is called. Buffers grow to the largest step seen.
Invariant: a token's numbers depend on its sequence's tokens up to it only: not on the batch, on chunks, or on what was preempted.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from llmos.services.executor.batch import ForwardBatch
from llmos.services.executor.kv_cache import KVCache
from llmos.services.executor.models.decoder import Decoder
from llmos.services.executor.native import small
from llmos.services.executor.native.attend import add_attend
from llmos.services.executor.native.code import LANES
from llmos.services.executor.native.linear import NativeLinear
from llmos.services.executor.native.machine import Compiled, Program, add_runner
from llmos.services.executor.native.matmul import PANEL
from llmos.services.executor.native.numbers import SIZES
from llmos.services.executor.rows import RowTable
from llmos.services.executor.spec import ModelSpec

_MIN_ROWS = 16


def fits(spec: ModelSpec) -> bool:
    """Whether the kernels can compute this shape: halves of heads, and gate and up, are whole vectors."""
    return spec.head_dim % (2 * LANES) == 0 and spec.intermediate_size % LANES == 0


class NativeDecoder:
    """One model over one KV cache and one row table."""

    def __init__(self, decoder: Decoder, cache: KVCache, rows: RowTable) -> None:
        assert fits(decoder.spec)
        self.decoder = decoder
        self.spec = spec = decoder.spec
        self.cache = cache
        self.rows = rows
        name = str(cache.dtype).removeprefix("torch.")
        module = ir.Module("decoder")
        add_runner(module)
        small.add_norm(module, spec)
        small.add_rotate(module, spec, name)
        small.add_silu(module, spec)
        add_attend(module, spec, cache.page_size, name)
        self._library = Compiled(module)
        self._value_offset = cache.slots[0].numel() // 2 * SIZES[name]
        stride = (rows.tokens.shape[1] + 2 * LANES) * 4
        self._threads = torch.get_num_threads()
        self._scratch = torch.empty(self._threads * spec.num_groups * stride // 4)
        self._scratch_stride = stride
        self._step = np.zeros(7, dtype=np.int64)
        self._step[3:5] = rows.pages.ctypes.data, rows.pages.strides[0]
        self._norms = [(_padded(layer.input_norm), _padded(layer.mlp_norm)) for layer in decoder.layers]
        self._last_norm = _padded(decoder.norm)
        self._room = 0
        self._grow(_MIN_ROWS)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Like `Decoder.forward`. The result is valid until the next call."""
        count = batch.token_ids.shape[0]
        if count > self._room:
            self._grow(count)
        hidden = self._hidden[:count, : self.spec.hidden_size]
        hidden.copy_(self.decoder.embedding.index_select(0, batch.token_ids))
        self._hidden[:count, self.spec.hidden_size :] = 0.0  # a failed row may have left NaN behind the last column
        cos, sin = (table.contiguous() for table in self.decoder.rope.at(batch.positions))
        self._step[:3] = cos.data_ptr(), sin.data_ptr(), batch.slots.data_ptr()
        self._step[5:] = batch.token_rows.ctypes.data, batch.positions.data_ptr()
        for layer in range(self.spec.num_layers):
            self._program.run(count, layer * self._per_layer, self._per_layer)
            self.decoder.tick()
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Like `Decoder.logits`: float32[rows, vocab]."""
        count = hidden.shape[0]
        padded = torch.zeros(count, self._hidden.shape[1])
        padded[:, : self.spec.hidden_size] = hidden
        head = self._linear(self.decoder.lm_head)
        out = torch.empty(count, head.out_width)
        x = torch.empty_like(padded)
        program = Program(
            self._library,
            [self._norm(padded, x, self._last_norm), (head.address, head.arguments(x, out))],
            self._threads,
        )
        program.run(count)
        return out[:, : head.out_features]

    def _grow(self, count: int) -> None:
        spec = self.spec
        self._room = room = max(count, 2 * self._room if count < 1024 else count)
        qkv_width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        self._hidden, self._x, self._qkv, self._attended, self._both, self._act = (
            torch.zeros(room, _whole(width))
            for width in (
                spec.hidden_size,
                spec.hidden_size,
                qkv_width,
                spec.num_heads * spec.head_dim,
                2 * spec.intermediate_size,
                spec.intermediate_size,
            )
        )
        kernels = [kernel for index in range(spec.num_layers) for kernel in self._layer(index)]
        self._per_layer = len(kernels) // spec.num_layers
        self._program = Program(self._library, kernels, self._threads)

    def _layer(self, index: int) -> list[tuple[int, list[int]]]:
        layer = self.decoder.layers[index]
        norms = self._norms[index]
        q_norm = layer.q_norm.data_ptr() if layer.q_norm is not None else 0
        k_norm = layer.k_norm.data_ptr() if layer.k_norm is not None else 0
        cache = self.cache.slots[index].data_ptr()
        qkv, attended = self._qkv, self._attended
        rotate = [self._step.ctypes.data, qkv.data_ptr(), qkv.stride(0) * 4, q_norm, k_norm, cache]
        attend = [
            self._step.ctypes.data,
            qkv.data_ptr(),
            qkv.stride(0) * 4,
            attended.data_ptr(),
            attended.stride(0) * 4,
            cache,
            self._value_offset,
            self.spec.windows[index],
            self._scratch.data_ptr(),
            self._scratch_stride,
        ]
        both, act = self._both, self._act
        silu = [both.data_ptr(), both.stride(0) * 4, act.data_ptr(), act.stride(0) * 4]
        return [
            self._norm(self._hidden, self._x, norms[0]),
            self._product(layer.qkv, self._x, qkv),
            (self._library.address("rotate"), rotate),
            (self._library.address("attend"), attend),
            self._product(layer.output, attended, self._hidden, add=True),
            self._norm(self._hidden, self._x, norms[1]),
            self._product(layer.gate_up, self._x, both),
            (self._library.address("silu"), silu),
            self._product(layer.down, act, self._hidden, add=True),
        ]

    def _norm(self, x: Tensor, out: Tensor, weight: Tensor) -> tuple[int, list[int]]:
        return self._library.address("norm"), [x.data_ptr(), out.data_ptr(), x.stride(0) * 4, weight.data_ptr()]

    def _product(self, linear: object, x: Tensor, out: Tensor, *, add: bool = False) -> tuple[int, list[int]]:
        native = self._linear(linear)
        return native.address, native.arguments(x, out, add=add)

    def _linear(self, linear: object) -> NativeLinear:
        assert isinstance(linear, NativeLinear)
        return linear


def _whole(width: int) -> int:
    return -(-width // PANEL) * PANEL


def _padded(weight: Tensor) -> Tensor:
    """With zeros to whole panels: the columns behind the last one stay 0."""
    found = torch.zeros(_whole(weight.shape[0]))
    found[: weight.shape[0]] = weight
    return found
