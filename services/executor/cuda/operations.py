"""Which code computes a step's small operations: Triton kernels, or the plain-torch definitions beside them.

Kernels run on a GPU, and on a CPU where LLMOS_KERNELS=interpret is set (and TRITON_INTERPRET=1, which Triton itself reads when it is
imported); elsewhere the references do the same work, slowly, in float64 inside. This is the only file that chooses. Matrix products are
torch's own in both cases (`products.py`). Nothing here allocates on a GPU, but for the work spaces that are made with it.
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import torch
from torch import Tensor

from llmos.errors import ModelError
from llmos.kernels import row_table
from llmos.kernels.row_table import DeviceRows
from llmos.services.executor.cuda.device import Device
from llmos.services.executor.spec import ModelSpec

KERNELS_VARIABLE = "LLMOS_KERNELS"
MAX_TOP = 20  # best tokens whose log-probabilities can be reported, as in `llmos.protocol.limits`


class Operations(Protocol):
    """One step's operations over a row table. Every `out` is a slice of the work space; shapes are those of the kernels of that name.

    `sample` leaves `logprobs`, `top_ids` and `top_logprobs` of the entries that asked for them.
    """

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def apply_diff(self, diff: Tensor) -> None: ...

    def prepare_decode(
        self, rows: Tensor, active: Tensor, token_ids: Tensor, positions: Tensor, slots: Tensor, context: Tensor
    ) -> None: ...

    def prepare_prefill(
        self, chunks: tuple[Tensor, Tensor, Tensor, Tensor], token_ids: Tensor, positions: Tensor, slots: Tensor
    ) -> None: ...

    def plan_decode(self, rows: Tensor, context: Tensor) -> None:
        """Before the layers' `paged_decode`."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, out: Tensor) -> None: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, out: Tensor) -> None: ...

    def rope_and_write(
        self, qkv: Tensor, positions: Tensor, slots: Tensor, layer: int, norms: tuple[Tensor, Tensor] | None, q: Tensor
    ) -> None: ...

    def paged_decode(self, q: Tensor, layer: int, rows: Tensor, context: Tensor, out: Tensor) -> None: ...

    def paged_prefill(
        self, q: Tensor, layer: int, chunks: tuple[Tensor, Tensor, Tensor, Tensor], out: Tensor
    ) -> None: ...

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None: ...

    def sample(self, logits: Tensor, rows: Tensor, out: Tensor, *, adjust: bool, report: bool) -> None: ...

    def advance(self, active: Tensor, tokens: Tensor, results: Tensor) -> None: ...


class Pages(Protocol):
    """The KV cache's views of each layer; see `kv_pool.KVPool`."""

    k_pages: list[Tensor]
    v_pages: list[Tensor]
    page_size: int


class Context:
    """What both implementations need to know of the model."""

    def __init__(self, device: Device, spec: ModelSpec, table: DeviceRows, pages: Pages, cos_sin: Tensor) -> None:
        self.device, self.spec, self.table, self.pages, self.cos_sin = device, spec, table, pages, cos_sin
        self.scale = 1.0 / math.sqrt(spec.head_dim)


def open_operations(context: Context, max_rows: int) -> Operations:
    """Kernels where they can run, else references."""
    if context.device.is_cuda or os.environ.get(KERNELS_VARIABLE) == "interpret":
        return _open_kernels(context, max_rows)
    return ReferenceOperations(context, max_rows)


def _open_kernels(context: Context, max_rows: int) -> Operations:
    from llmos.kernels.decode_plan import HEAD_DIMS, MAX_GROUPS, PAGE_SIZES
    from llmos.services.executor.cuda.kernel_operations import KernelOperations

    spec, size = context.spec, context.pages.page_size
    if spec.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise ModelError(f"heads of {spec.head_dim}: the attention kernels have {sizes}", field="head_dim")
    if spec.num_groups > MAX_GROUPS:
        raise ModelError(f"{spec.num_groups} query heads per KV head: the attention kernels take up to {MAX_GROUPS}")
    if size not in PAGE_SIZES:
        sizes = ", ".join(map(str, PAGE_SIZES))
        raise ModelError(f"page_size {size}: the attention kernels have {sizes}", field="page_size")
    return KernelOperations(context, max_rows)


class ReferenceOperations:
    """Plain torch, synchronous, for the CPU."""

    def __init__(self, context: Context, max_rows: int) -> None:
        self._context, self._table, self._spec = context, context.table, context.spec
        self.logprobs = torch.full((max_rows,), math.nan)
        self.top_ids = torch.zeros(max_rows, MAX_TOP, dtype=torch.int32)
        self.top_logprobs = torch.zeros(max_rows, MAX_TOP)

    def apply_diff(self, diff: Tensor) -> None:
        from llmos.kernels.row_update import apply_diff_reference

        apply_diff_reference(diff, self._table)

    def prepare_decode(
        self, rows: Tensor, active: Tensor, token_ids: Tensor, positions: Tensor, slots: Tensor, context: Tensor
    ) -> None:
        from llmos.kernels.row_update import prepare_decode_reference

        found = prepare_decode_reference(self._table, rows)
        for target, source in zip((active, token_ids, positions, slots, context), found):
            target.copy_(source)

    def prepare_prefill(
        self, chunks: tuple[Tensor, Tensor, Tensor, Tensor], token_ids: Tensor, positions: Tensor, slots: Tensor
    ) -> None:
        table, size = self._table, self._table.page_size
        for row, start, length, first in zip(*(part.tolist() for part in chunks)):
            position = torch.arange(first, first + length)
            token_ids[start : start + length] = table.tokens[row, position]
            positions[start : start + length] = position
            slots[start : start + length] = table.pages[row, position // size].long() * size + position % size

    def plan_decode(self, rows: Tensor, context: Tensor) -> None:
        pass

    def rms_norm(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        from llmos.kernels.norms import rms_norm_reference

        out.copy_(rms_norm_reference(x, weight, self._spec.norm_eps))

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, out: Tensor) -> None:
        from llmos.kernels.norms import add_rms_norm_reference

        total, normed = add_rms_norm_reference(x, residual, weight, self._spec.norm_eps)
        residual.copy_(total)
        out.copy_(normed)

    def rope_and_write(
        self, qkv: Tensor, positions: Tensor, slots: Tensor, layer: int, norms: tuple[Tensor, Tensor] | None, q: Tensor
    ) -> None:
        from llmos.kernels.kv_write import rope_and_write_reference

        pages = self._context.pages
        q_norm, k_norm = norms or (None, None)
        q.copy_(
            rope_and_write_reference(
                qkv.flatten(1), positions, slots, self._context.cos_sin, pages.k_pages[layer], pages.v_pages[layer],
                num_heads=self._spec.num_heads, q_norm=q_norm, k_norm=k_norm, eps=self._spec.norm_eps,
            )
        )  # fmt: skip

    def paged_decode(self, q: Tensor, layer: int, rows: Tensor, context: Tensor, out: Tensor) -> None:
        from llmos.kernels.reference import paged_decode_reference

        pages, table = self._context.pages, self._table.pages
        window = self._spec.windows[layer]
        k, v, scale = pages.k_pages[layer], pages.v_pages[layer], self._context.scale
        out.copy_(paged_decode_reference(q, k, v, table, rows, context, scale=scale, window=window))

    def paged_prefill(self, q: Tensor, layer: int, chunks: tuple[Tensor, Tensor, Tensor, Tensor], out: Tensor) -> None:
        from llmos.kernels.reference import paged_prefill_reference

        pages, table = self._context.pages, self._table.pages
        window = self._spec.windows[layer]
        k, v, scale = pages.k_pages[layer], pages.v_pages[layer], self._context.scale
        found = paged_prefill_reference(q, k, v, table, *chunks, scale=scale, window=window)
        for start, length in zip(chunks[1].tolist(), chunks[2].tolist()):
            out[start : start + length] = found[start : start + length]

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        from llmos.kernels.activation import silu_mul_reference

        out.copy_(silu_mul_reference(gate_up))

    def sample(self, logits: Tensor, rows: Tensor, out: Tensor, *, adjust: bool, report: bool) -> None:
        from llmos.kernels.sampling_reference import sample_reference

        if not adjust:
            assert not self._table.records[rows[rows >= 0].long(), row_table.ADJUSTED].any(), (
                "rows ask for changed logits"
            )
        tokens, logprobs, best = sample_reference(logits, rows, self._table)
        out.copy_(tokens)
        if report:
            self.logprobs[: len(rows)] = logprobs
            for entry, found in enumerate(best):
                for place, (token, logprob) in enumerate(found):
                    self.top_ids[entry, place], self.top_logprobs[entry, place] = token, logprob

    def advance(self, active: Tensor, tokens: Tensor, results: Tensor) -> None:
        from llmos.kernels.row_update import advance_reference

        results.copy_(advance_reference(self._table, active, tokens))
