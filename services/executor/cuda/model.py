"""The decoder of `models/decoder.py` for the device: the same weights, every result in a tensor of the work space.

A step's batch is `num_decodes` entries of one token each, then the tokens of prompt chunks. Projections and norms take all of them at
once, attention is two launches over disjoint parts. Only tokens that are sampled go through the last norm and the output matrix.
Deterministic mode: a decode entry attends as a prompt chunk of one token, because the prefill kernel computes the same bits for a token
however it came: with a prompt, in whichever piece, or sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmos.services.executor.cuda.inputs import StepInputs, StepShape
from llmos.services.executor.cuda.operations import Operations
from llmos.services.executor.cuda.products import DeviceLinear, Product
from llmos.services.executor.cuda.results import ScoreSlot
from llmos.services.executor.cuda.workspace import Workspace
from llmos.services.executor.models.decoder import Decoder, Layer
from llmos.services.executor.prompt_scores import make_records

Chunks = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` of a step, of which the first len(rows) attend one by one: `rows`, with `context` tokens to see. `chunks`: the others."""

    tokens: int
    rows: Tensor
    context: Tensor
    chunks: Chunks | None


class DeviceModel:
    """Forward passes. `weights`: a decoder whose linear layers are `DeviceLinear`; its own arithmetic is not used."""

    def __init__(
        self, weights: Decoder, ops: Operations, product: Product, work: Workspace, inputs: StepInputs,
        *, deterministic: bool,
    ) -> None:  # fmt: skip
        self.spec = weights.spec
        self._deterministic = deterministic
        self.weights, self._ops, self._product = weights, ops, product
        self._work, self._inputs = work, inputs

    def decode(self, batch: int, *, adjust: bool, report: bool) -> None:
        """One token for each of the first `batch` decode rows, from its row to its result. Can be captured."""
        work, ops = self._work, self._ops
        self._prepare_decode(batch)
        self._layers(Batch(batch, work.active[:batch], work.context[:batch], None))
        ops.add_rms_norm(work.projected[:batch], work.hidden[:batch], self.weights.norm, work.last_normed[:batch])
        self._sample(batch, adjust=adjust, report=report)

    def mixed(self, shape: StepShape, *, adjust: bool, report: bool) -> None:
        """Decode rows and prompt chunks together. Launches depend on the shape, so this is not captured."""
        work, ops, inputs = self._work, self._ops, self._inputs
        decodes, tokens, samples = shape.num_decodes, shape.num_tokens, shape.num_samples
        if decodes:
            self._prepare_decode(decodes)
        chunks = inputs.chunks(shape.num_chunks)
        ops.prepare_prefill(chunks, work.token_ids[:tokens], work.positions[:tokens], work.slots[:tokens])
        self._layers(Batch(tokens, work.active[:decodes], work.context[:decodes], chunks))
        if not samples:
            return
        work.active[decodes:samples].copy_(inputs.sample_rows[decodes:samples])
        index = inputs.sample_tokens[:samples]
        torch.index_select(work.hidden[:tokens], 0, index, out=work.last_hidden[:samples])
        torch.index_select(work.projected[:tokens], 0, index, out=work.last_projected[:samples])
        ops.add_rms_norm(
            work.last_projected[:samples], work.last_hidden[:samples], self.weights.norm, work.last_normed[:samples]
        )
        self._sample(samples, adjust=adjust, report=report)

    def score(self, slot: ScoreSlot) -> None:
        """After `mixed`: records for a chunk of its batch, as many positions at a time as there are rows for logits."""
        work, first = self._work, slot.wanted.first
        block = len(work.logits)
        for at in range(0, len(slot.targets), block):
            targets = slot.targets[at : at + block].to(work.logits.device, non_blocking=True)
            here = slice(first + at, first + at + len(targets))
            normed, logits = work.last_normed[: len(targets)], work.logits[: len(targets)]
            self._ops.add_rms_norm(work.projected[here], work.hidden[here], self.weights.norm, normed)
            self._product(normed, _held(self.weights.lm_head), logits)
            records = make_records(logits, targets, slot.wanted.top)
            slot.records[at : at + block].copy_(records, non_blocking=True)

    def _prepare_decode(self, batch: int) -> None:
        work = self._work
        self._ops.prepare_decode(
            self._inputs.decode_rows[:batch], work.active[:batch], work.token_ids[:batch], work.positions[:batch],
            work.slots[:batch], work.context[:batch],
        )  # fmt: skip

    def _layers(self, batch: Batch) -> None:
        """Embedding and all layers; what the last one adds to `hidden` is left in `projected`."""
        work, ops, product, tokens = self._work, self._ops, self._product, batch.tokens
        hidden, normed, projected = work.hidden[:tokens], work.normed[:tokens], work.projected[:tokens]
        torch.index_select(self.weights.embedding, 0, work.token_ids[:tokens], out=hidden)
        if self._deterministic:
            torch.clamp(batch.context, max=1, out=work.lengths[: len(batch.rows)])
        elif len(batch.rows):
            ops.plan_decode(batch.rows, batch.context)
        for index, layer in enumerate(self.weights.layers):
            if index:
                ops.add_rms_norm(projected, hidden, layer.input_norm, normed)
            else:
                ops.rms_norm(hidden, layer.input_norm, normed)
            self._attend(index, layer, batch)
            product(work.attended[:tokens].flatten(1), _held(layer.output), projected)
            ops.add_rms_norm(projected, hidden, layer.mlp_norm, normed)
            product(normed, _held(layer.gate_up), work.gate_up[:tokens])
            ops.silu_mul(work.gate_up[:tokens], work.activated[:tokens])
            product(work.activated[:tokens], _held(layer.down), projected)

    def _attend(self, index: int, layer: Layer, batch: Batch) -> None:
        work, ops, tokens, decodes = self._work, self._ops, batch.tokens, len(batch.rows)
        qkv = work.qkv[:tokens]
        self._product(work.normed[:tokens], _held(layer.qkv), qkv.flatten(1))
        q, out = qkv[:, : self.spec.num_heads], work.attended[:tokens]
        norms = (layer.q_norm, layer.k_norm) if layer.q_norm is not None and layer.k_norm is not None else None
        ops.rope_and_write(qkv, work.positions[:tokens], work.slots[:tokens], index, norms, q)
        if decodes and self._deterministic:
            singles = (batch.rows, work.order[:decodes], work.lengths[:decodes], work.positions[:decodes])
            ops.paged_prefill(q[:decodes], index, singles, out[:decodes])
        elif decodes:
            ops.paged_decode(q[:decodes], index, batch.rows, batch.context, out[:decodes])
        if batch.chunks is not None:
            ops.paged_prefill(q, index, batch.chunks, out)

    def _sample(self, batch: int, *, adjust: bool, report: bool) -> None:
        work, ops = self._work, self._ops
        rows, logits = work.active[:batch], work.logits[:batch]
        self._product(work.last_normed[:batch], _held(self.weights.lm_head), logits)
        ops.sample(logits, rows, work.sampled[:batch], adjust=adjust, report=report)
        ops.advance(rows, work.sampled[:batch], work.results[:batch])


def _held(layer: object) -> DeviceLinear:
    assert isinstance(layer, DeviceLinear)
    return layer
