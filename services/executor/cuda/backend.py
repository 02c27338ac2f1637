"""The CUDA backend: what a step needs lives on the device, and the host is a step ahead.

`submit` applies a plan to the host's mirror of the rows, packs the difference into pinned memory and queues the whole step on the device:
page moves, the difference, the forward pass (a CUDA graph if nothing but decode is asked for), sampling, and the copy of the results back.
The token that a row sampled is written into the row table on the device, where the next step reads it. `collect` waits for the copy and
tells the host what came. Up to `window` steps are queued, so the device never waits for the host; in steady state a step is one graph
launch and one small copy, allocates nothing and synchronises with nothing.

The host's mirror (`rows.RowTable`) knows lengths ahead of results, because each row that samples gets one token; it does not know tokens.
A row that met a stop token or its last length is stopped on the device and computes nothing in steps that were submitted already. A row
whose logits are not finite fails alone.

Deterministic mode: a sequence gets the same tokens and log-probabilities, to the bit, whatever else is in its batch, however its prompt is
cut into chunks, and whether it was preempted and computed again. Products sum in a fixed order (`kernels/fixed_matmul.py`), and decode
attends with the prefill kernel, which computes the same bits for a token in a prompt and alone. It costs time: those products are not the
library's, and the context of a sequence that decodes is walked by one program per KV head instead of many.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmos.errors import ConfigError
from llmos.services.executor.backend import Capabilities, Limits, StepOutput, Tick
from llmos.services.executor.cuda.decode_graphs import DecodeGraphs
from llmos.services.executor.cuda.device import Device, fatal_errors
from llmos.services.executor.cuda.inputs import StepInputs, StepShape, Upload
from llmos.services.executor.cuda.kv_pool import KVPool
from llmos.services.executor.cuda.model import DeviceModel
from llmos.services.executor.cuda.operations import Context, open_operations
from llmos.services.executor.cuda.products import choose_product
from llmos.services.executor.cuda.results import PendingStep, ResultSlot, ScoreSlot
from llmos.services.executor.cuda.row_diff import RowDiff
from llmos.services.executor.cuda.tables import position_table, row_table_for
from llmos.services.executor.cuda.workspace import Workspace
from llmos.services.executor.models.decoder import Decoder
from llmos.services.executor.page_moves import PageMoves, read_moves
from llmos.services.executor.prompt_scores import wanted_scores
from llmos.services.executor.rows import RowTable, Work

if TYPE_CHECKING:
    from llmos.protocol.messages import StepPlan

WINDOW = 2
_LOOK_S = 20e-6


class CudaBackend:
    """See the module. Made by `open.open_cuda`; `pool` has all pages that there will be."""

    window = WINDOW

    def __init__(
        self, device: Device, weights: Decoder, pool: KVPool, work: Workspace, max_context: int, limits: Limits,
        *, deterministic: bool = False,
    ) -> None:  # fmt: skip
        spec, context = weights.spec, min(max_context, pool.num_pages * pool.page_size)
        max_tokens = limits.max_step_tokens
        self.device, self.pool, self.work = device, pool, work
        self.rows = RowTable(limits.max_rows, context, pool.page_size, pool.num_pages)
        self.table = row_table_for(device, limits.max_rows, context, pool.page_size)
        cos_sin = position_table(device, weights.rope, context + 1)
        shared = Context(device, spec, self.table, pool, cos_sin)
        self.ops = open_operations(shared, limits.max_rows)
        self.inputs = StepInputs(device, limits.max_rows, self.window)
        product = choose_product(device, deterministic=deterministic)
        self.model = DeviceModel(weights, self.ops, product, work, self.inputs, deterministic=deterministic)
        self.graphs = DecodeGraphs(device, self.model, self.inputs.decode_rows)
        self._diff = RowDiff(self.table, self.rows.sampling)
        self._slots = [ResultSlot(device, limits.max_rows) for _ in range(self.window)]
        self._in_flight: deque[PendingStep] = deque()
        self._submitted = 0
        dtype = str(pool.dtype).removeprefix("torch.")
        self.capabilities = Capabilities(
            pool.num_pages, pool.page_size, limits.max_rows, max_tokens, context, spec.vocab_size, dtype,
            "cuda" if device.is_cuda else "cpu", pool.num_host_pages, pool.measure_us(),
        )  # fmt: skip
        self.description = (
            f"{spec.architecture}, {spec.num_layers} layers, {dtype} on {device.description}, "
            f"{pool.num_pages} pages of {pool.page_size} tokens ({pool.num_bytes / 2**30:.2f} GiB)"
            + (", deterministic" if deterministic else "")
        )

    @torch.inference_mode()
    def warm_up(self, tick: Tick) -> None:
        """Have every kernel compiled, and the smallest and the largest graph of each kind captured, before anybody waits for it: no row is
        live yet, so nothing is computed."""
        most = len(self.inputs.decode_rows)
        chunk = StepShape(num_decodes=0, num_chunks=1, num_tokens=1, num_samples=0)
        works = [functools.partial(self.model.mixed, chunk, adjust=False, report=False)]
        for batch, adjust, report in itertools.product((1, most), (False, True), (False, True)):
            works.append(functools.partial(self.graphs.run, batch, adjust=adjust, report=report))
        with fatal_errors():
            self.device.settle()
            for work in works:
                self.device.run(work)
                self.device.finish()
                tick()

    def reset(self) -> None:
        self._in_flight.clear()
        self.rows.clear()
        with fatal_errors():
            self.device.run(self.table.arena.zero_)
            self.device.finish()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        assert len(self._in_flight) < self.window, "collect first"
        moves = read_moves(plan, self.pool.num_pages, self.pool.num_host_pages)
        work = self.rows.apply(plan)
        slot = self._submitted % self.window
        self._submitted += 1
        shape, upload = self.inputs.write(slot, work, self._diff.write(plan))
        sampling = np.concatenate((work.decode, [chunk.row for chunk in work.chunks if chunk.sample])).astype(np.int64)
        columns = self.rows.sampling
        logprobs = columns.logprobs[sampling]
        adjust, report = bool(columns.special[sampling].any()), bool((logprobs >= 0).any())
        result = self._slots[slot]
        wanted = wanted_scores(work.decode.size, work.chunks, self.rows)
        scores = [ScoreSlot(self.device, each, int(self.rows.life[each.row])) for each in wanted]
        with fatal_errors():
            self.device.run(
                torch.inference_mode()(
                    lambda: self._compute(moves, work, shape, upload, result, adjust, report, scores)
                )
            )
            mark = self.device.mark()
        step = PendingStep(result, mark, sampling, self.rows.life[sampling], logprobs, list(work.skipped), scores)
        step.refused = sampling[columns.has_grammar[sampling]]
        self.rows.computed_to(work)
        self.rows.length[sampling] += 1
        self._in_flight.append(step)

    def done(self, timeout_s: float) -> bool:
        mark, end = self._in_flight[0].mark, time.perf_counter() + timeout_s
        with fatal_errors():
            while not mark.done():
                if time.perf_counter() >= end:
                    return False
                time.sleep(_LOOK_S)
        return True

    def collect(self) -> StepOutput:
        with fatal_errors():
            self._in_flight[0].mark.wait()
        step = self._in_flight.popleft()
        output, bad = step.output()
        for row in bad:
            self._note_failed(row, step.life_of(row))
        return output

    def execute(self, plan: StepPlan) -> StepOutput:
        """One step, from its plan to its result, with nothing queued before it."""
        assert not self._in_flight
        self.submit(plan)
        return self.collect()

    def _note_failed(self, row: int, life: int) -> None:
        """Steps that were submitted since may name the row, and get nothing of it; if another sequence has it by now, that is not it."""
        if self.rows.life[row] == life:
            self.rows.failed[row] = True
        for step in self._in_flight:
            if step.life_of(row) == life and row not in step.failed:
                step.failed.append(row)

    def _compute(
        self,
        moves: PageMoves,
        work: Work,
        shape: StepShape,
        upload: Upload,
        result: ResultSlot,
        adjust: bool,
        report: bool,
        scores: list[ScoreSlot],
    ) -> None:
        """Device work: a whole step."""
        self.pool.move(moves)
        upload.send()
        if upload.diff is not None:
            self.ops.apply_diff(upload.diff)
        self.pool.poison(work.fresh_pages, work.stale_slots)
        if shape.num_chunks:
            self.model.mixed(shape, adjust=adjust, report=report)
        elif shape.num_decodes:
            self.graphs.run(shape.num_decodes, adjust=adjust, report=report)
        if shape.num_samples:
            result.fetch(self.work, self.ops, shape.num_samples, report=report)
        for score in scores:
            self.model.score(score)


def check_limits(limits: Limits) -> None:
    """A step must be able to hold a token of every row."""
    if limits.max_step_tokens < limits.max_rows:
        text = f"max_step_tokens ({limits.max_step_tokens}) is below max_rows ({limits.max_rows})"
        raise ConfigError(text, field="max_step_tokens")
