"""The CPU backend: weights packed once; compiled kernels over pages in place (`native/`), or torch where they can not be had.

`execute` is one step: move pages, apply the plan to the rows, flatten its work, one forward pass, sample, write the tokens back into
the row table. Nothing waits for the microkernel inside it, and the next plan may already be in the socket.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from torch import Tensor

from llmos.codes import FinishReason
from llmos.config import ModelConfig
from llmos.errors import ConfigError
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import StepPlan
from llmos.services.executor.attention import PagedAttention
from llmos.services.executor.backend import Capabilities, Immediate, Limits, StepOutput, Tick, with_defaults
from llmos.services.executor.batch import ForwardBatch, build_batch
from llmos.services.executor.grammars import Grammars
from llmos.services.executor.host_cache import HostCache, count_host_pages
from llmos.services.executor.kv_cache import KVCache, count_pages
from llmos.services.executor.linear import has_native, linear_factory
from llmos.services.executor.loader import load_decoder
from llmos.services.executor.models.decoder import Decoder
from llmos.services.executor.page_moves import PageMoves, read_moves
from llmos.services.executor.prompt_scores import score_prompts
from llmos.services.executor.rows import RowTable
from llmos.services.executor.sampler import Sampled, sample
from llmos.services.executor.spec import limit_context, read_spec

if TYPE_CHECKING:
    from llmos.services.executor.native.decoder import NativeDecoder

log = logging.getLogger(__name__)


class CpuBackend(Immediate):
    """Executes plans on the processor."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, host: HostCache, max_context: int, limits: Limits, grammars: Grammars
    ) -> None:
        spec = decoder.spec
        context = min(max_context, cache.num_pages * cache.page_size)
        self.decoder = decoder
        self.cache = cache
        self.host = host
        self.grammars = grammars
        self.rows = RowTable(limits.max_rows, context, cache.page_size, cache.num_pages)
        self.model = _model(decoder, cache, self.rows)
        dtype = str(cache.dtype).removeprefix("torch.")
        self.capabilities = Capabilities(
            cache.num_pages,
            cache.page_size,
            limits.max_rows,
            limits.max_step_tokens,
            context,
            spec.vocab_size,
            dtype,
            "cpu",
            host.num_pages,
            host.measure_us(),
        )
        self.description = (
            f"{spec.architecture}, {spec.num_layers} layers, {dtype} on cpu with {torch.get_num_threads()} threads, "
            f"{cache.num_pages} pages of {cache.page_size} tokens ({cache.num_bytes / 2**30:.2f} GiB)"
        )
        if host.num_pages:
            self.description += f", {host.num_pages} host pages ({host.num_bytes / 2**30:.2f} GiB)"

    @classmethod
    def open(cls, model: ModelConfig, directory: Path, limits: Limits, tick: Tick) -> CpuBackend:
        """Load a model directory; raises `ModelError`, or `ConfigError` for settings the model can not have."""
        model = with_defaults(model)
        torch.set_num_threads(model.threads or _physical_cores())
        spec = read_spec(directory)
        max_context = limit_context(spec, model.max_context)
        decoder, dtype = load_decoder(directory, spec, model.dtype, linear_factory(model.weights), tick)
        num_pages = count_pages(spec, model.page_size, dtype, model.num_pages, model.kv_cache_gib)
        host_pages = count_host_pages(spec, model.page_size, dtype, model.host_cache_gib)
        with _allocating(f"{num_pages} pages of KV cache", "num_pages"):
            cache = KVCache(spec, num_pages, model.page_size, dtype)
        with _allocating(f"{host_pages} host pages", "host_cache_gib"):
            host = HostCache(cache, host_pages)
        return cls(decoder, cache, host, max_context, limits, Grammars.of_model(directory, spec.vocab_size))

    def reset(self) -> None:
        self.forget_submitted()
        self.rows.clear()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        self._move(read_moves(plan, self.cache.num_pages, self.host.num_pages))
        work = self.rows.apply(plan)
        self.cache.clear(work.fresh_pages)
        self.cache.clear_slots(*work.stale_slots)
        failed = list(work.skipped)
        if not work.decode.size and not work.chunks:
            return StepOutput(b"", (), _failures(failed))
        batch = build_batch(self.rows, work, self.cache, grouped=isinstance(self.model, TorchModel))
        masks = self.grammars.begin(batch.sample_rows, self.rows)
        hidden = self.model.forward(batch)
        self.rows.computed_to(work)
        results, bad = score_prompts(
            self.model.logits, self.decoder.spec.vocab_size, hidden, work.decode.size, work.chunks, self.rows
        )
        if not batch.sample_rows.size:
            self.rows.failed[bad] = True
            return StepOutput(b"", (), _failures([*failed, *bad]), results)
        logits = self.model.logits(hidden.index_select(0, batch.sample_index))
        sampled = sample(logits, batch.sample_rows, self.rows, None if masks is None else masks.wait())
        self.rows.append(sampled.rows, sampled.tokens)
        bad = list(dict.fromkeys((*bad, *sampled.failed)))
        self.rows.failed[[*bad, *sampled.stuck]] = True
        failures = _failures([*failed, *bad]) + _failures(sampled.stuck, FinishReason.GRAMMAR_FAILED)
        return StepOutput(_samples(sampled), sampled.logprobs, failures, results)

    def _move(self, moves: PageMoves) -> None:
        self.host.swap_out(moves.swap_out)
        self.host.swap_in(moves.swap_in)
        self.cache.copy(moves.copies)


class TorchModel:
    """The decoder in torch operations: for shapes and boxes that the compiled kernels do not fit."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.logits = decoder.logits
        self._decoder = decoder
        self._attention = PagedAttention(decoder.spec, cache)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states before the last norm, float32[tokens, hidden]; keys and values go to the cache."""
        self._attention.start_step(batch)
        return self._decoder.forward(batch.token_ids, batch.positions, self._attention)


def _model(decoder: Decoder, cache: KVCache, rows: RowTable) -> NativeDecoder | TorchModel:
    if has_native():
        from llmos.services.executor.native.decoder import NativeDecoder, fits

        if fits(decoder.spec):
            return NativeDecoder(decoder, cache, rows)
        log.info("heads of %d and %d gates: attention in torch", decoder.spec.head_dim, decoder.spec.intermediate_size)
    return TorchModel(decoder, cache)


@contextmanager
def _allocating(what: str, key: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no narrower type for an allocation that fails
        raise ConfigError(f"{what} do not fit in memory: {error}", field=key) from None


def _samples(sampled: Sampled) -> bytes:
    return np.stack((sampled.rows, sampled.positions, sampled.tokens), axis=1).astype("<i4").tobytes()


def _failures(rows: Iterable[int], reason: FinishReason = FinishReason.NUMERICAL_ERROR) -> bytes:
    return pack_i32(value for row in rows for value in (row, reason))


def _physical_cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(psutil.Process().cpu_affinity())
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))
