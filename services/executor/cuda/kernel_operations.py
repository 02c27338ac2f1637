"""`operations.Operations` by our Triton kernels. Imports them all: on a CPU they need Triton's interpreter."""

from __future__ import annotations

from torch import Tensor

from llmos.kernels.activation import silu_mul
from llmos.kernels.configs import decode_programs
from llmos.kernels.decode_plan import DecodePlan
from llmos.kernels.kv_write import rope_and_write
from llmos.kernels.norms import add_rms_norm, rms_norm
from llmos.kernels.paged_decode import paged_decode
from llmos.kernels.paged_prefill import paged_prefill
from llmos.kernels.row_update import advance, apply_diff, prepare_decode, prepare_prefill
from llmos.kernels.sampling import Sampler
from llmos.services.executor.cuda.operations import Context

Chunks = tuple[Tensor, Tensor, Tensor, Tensor]


class KernelOperations:
    """One decode plan per window that the model has."""

    def __init__(self, context: Context, max_rows: int) -> None:
        spec, device = context.spec, context.device.device
        self._context, self._table, self._spec = context, context.table, spec
        dtype = context.pages.k_pages[0].dtype
        self.plans = {
            window: DecodePlan(
                device,
                max_rows,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                page_size=context.pages.page_size,
                num_programs=decode_programs(device, spec.head_dim, dtype),
                window=window,
            )
            for window in sorted(set(spec.windows))
        }
        self._sampler = Sampler(device, max_rows, spec.vocab_size)
        self.logprobs = self._sampler.logprobs
        self.top_ids, self.top_logprobs = self._sampler.top_ids, self._sampler.top_logprobs

    def apply_diff(self, diff: Tensor) -> None:
        apply_diff(diff, self._table)

    def prepare_decode(
        self, rows: Tensor, active: Tensor, token_ids: Tensor, positions: Tensor, slots: Tensor, context: Tensor
    ) -> None:
        prepare_decode(
            self._table, rows, active=active, token_ids=token_ids, positions=positions, slots=slots, context=context
        )

    def prepare_prefill(self, chunks: Chunks, token_ids: Tensor, positions: Tensor, slots: Tensor) -> None:
        prepare_prefill(self._table, *chunks, token_ids=token_ids, positions=positions, slots=slots)

    def plan_decode(self, rows: Tensor, context: Tensor) -> None:
        for plan in self.plans.values():
            plan.prepare(rows, context)

    def rms_norm(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        rms_norm(x, weight, self._spec.norm_eps, out=out)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, out: Tensor) -> None:
        add_rms_norm(x, residual, weight, self._spec.norm_eps, out=out)

    def rope_and_write(
        self, qkv: Tensor, positions: Tensor, slots: Tensor, layer: int, norms: tuple[Tensor, Tensor] | None, q: Tensor
    ) -> None:
        q_norm, k_norm = norms or (None, None)
        pages = self._context.pages
        rope_and_write(
            qkv.flatten(1), positions, slots, self._context.cos_sin, pages.k_pages[layer], pages.v_pages[layer],
            q_norm=q_norm, k_norm=k_norm, eps=self._spec.norm_eps, q_out=q,
        )  # fmt: skip

    def paged_decode(self, q: Tensor, layer: int, rows: Tensor, context: Tensor, out: Tensor) -> None:
        pages, window = self._context.pages, self._spec.windows[layer]
        paged_decode(
            q, pages.k_pages[layer], pages.v_pages[layer], self._table.pages, rows, context,
            scale=self._context.scale, window=window, plan=self.plans[window], out=out,
        )  # fmt: skip

    def paged_prefill(self, q: Tensor, layer: int, chunks: Chunks, out: Tensor) -> None:
        pages, window = self._context.pages, self._spec.windows[layer]
        paged_prefill(
            q, pages.k_pages[layer], pages.v_pages[layer], self._table.pages, *chunks,
            scale=self._context.scale, window=window, out=out,
        )  # fmt: skip

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        silu_mul(gate_up, out=out)

    def sample(self, logits: Tensor, rows: Tensor, out: Tensor, *, adjust: bool, report: bool) -> None:
        out.copy_(self._sampler.sample(logits, rows, self._table, adjust=adjust, report=report))

    def advance(self, active: Tensor, tokens: Tensor, results: Tensor) -> None:
        advance(self._table, active, tokens, results=results)
