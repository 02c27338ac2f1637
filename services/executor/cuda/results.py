"""What comes back from a step: the device's results, copied to pinned memory, and made into a `StepOutput` when the step is collected.

Kinds of result of an entry (`llmos.kernels.row_update.advance`): a token, or that the row's numbers went bad, or nothing, because the row
was stopped or failed in a step before, which the host could not know when it submitted this one. A row that failed is reported again by
every step that names it until it is freed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from llmos.codes import FinishReason
from llmos.kernels import row_table
from llmos.services.executor.backend import StepOutput
from llmos.services.executor.cuda.device import Device, Mark
from llmos.services.executor.cuda.operations import MAX_TOP, Operations
from llmos.services.executor.cuda.workspace import Workspace
from llmos.services.executor.prompt_scores import Wanted, finish_scores
from llmos.services.executor.rows import Ints

if TYPE_CHECKING:
    from llmos.protocol.messages import RowLogprobs, RowResult

_ROW, _, _, _STATE = range(4)


class ResultSlot:
    """Pinned memory for one step in flight."""

    def __init__(self, device: Device, max_rows: int) -> None:
        self.results = device.pinned(max_rows, 4, dtype=torch.int32)
        self.logprobs = device.pinned(max_rows, dtype=torch.float32)
        self.top_ids = device.pinned(max_rows, MAX_TOP, dtype=torch.int32)
        self.top_logprobs = device.pinned(max_rows, MAX_TOP, dtype=torch.float32)

    def fetch(self, work: Workspace, ops: Operations, count: int, *, report: bool) -> None:
        """Device work: copy a step's results to here."""
        pairs = [(self.results, work.results)]
        if report:
            pairs += [(self.logprobs, ops.logprobs), (self.top_ids, ops.top_ids), (self.top_logprobs, ops.top_logprobs)]
        for target, source in pairs:
            target[:count].copy_(source[:count], non_blocking=True)


class ScoreSlot:
    """Pinned memory for the records of one chunk whose prompt is scored. Such a step allocates; it is never a steady one."""

    def __init__(self, device: Device, wanted: Wanted, life: int) -> None:
        self.wanted = wanted
        self.life = life  # of the row
        self.targets = device.pinned(len(wanted.targets), dtype=torch.int64)
        self.targets.copy_(torch.from_numpy(wanted.targets))
        self.records = device.pinned(len(wanted.targets), wanted.words, dtype=torch.int32)


@dataclass(slots=True)
class PendingStep:
    """A submitted step. `rows` sample, in the order of the batch, in these `lives` of theirs; `logprobs`: how many each wants, or -1.
    `failed`: named, but known to have failed. `scores`: of prompts that asked for them. `refused`: their grammars can not be followed
    here yet; a token that ignores one must not pass for one that fits."""

    slot: ResultSlot
    mark: Mark
    rows: Ints
    lives: Ints
    logprobs: Ints
    failed: list[int] = field(default_factory=list)
    scores: list[ScoreSlot] = field(default_factory=list)
    refused: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def life_of(self, row: int) -> int:
        """Which life of a row it names; -1 if it does not."""
        found = np.flatnonzero(self.rows == row)
        if found.size:
            return int(self.lives[found[0]])
        return next((slot.life for slot in self.scores if slot.wanted.row == row), -1)

    def output(self) -> tuple[StepOutput, list[int]]:
        """The result, and the rows that failed in this step. Only after the mark."""
        count = len(self.rows)
        found: npt.NDArray[np.int32] = self.slot.results[:count].numpy()
        wrong = found[:, _STATE] == row_table.FAILED
        bad = found[wrong, _ROW].tolist() if wrong.any() else []
        sampled = (found[:, _ROW] >= 0) & ~wrong
        if self.failed or self.refused.size:
            sampled &= ~np.isin(found[:, _ROW], [*self.failed, *self.refused.tolist()])
        # Row, position and token are the first three columns, as on the wire.
        samples = (found if sampled.all() else found[sampled])[:, :_STATE].astype("<i4").tobytes()
        scored = [slot for slot in self.scores if slot.wanted.row not in bad]
        results: tuple[RowResult, ...] = ()
        if scored:
            results, worse = finish_scores([slot.wanted for slot in scored], [slot.records.numpy() for slot in scored])
            bad += worse
        failures = [
            value for row in dict.fromkeys((*self.failed, *bad)) for value in (row, int(FinishReason.NUMERICAL_ERROR))
        ]
        stuck = [row for row in self.refused.tolist() if row not in self.failed and row not in bad]
        failures += [value for row in stuck for value in (row, int(FinishReason.GRAMMAR_FAILED))]
        bad += stuck
        logprobs = self._logprobs(found, sampled) if (self.logprobs >= 0).any() else ()
        return StepOutput(samples, logprobs, np.array(failures, "<i4").tobytes(), results), bad

    def _logprobs(self, found: npt.NDArray[np.int32], sampled: npt.NDArray[np.bool_]) -> tuple[RowLogprobs, ...]:
        from llmos.protocol.messages import RowLogprobs, TokenLogprobs

        entries = []
        for entry in np.flatnonzero(sampled & (self.logprobs >= 0)).tolist():
            count = int(self.logprobs[entry])
            ids, best = self.slot.top_ids[entry, :count].tolist(), self.slot.top_logprobs[entry, :count].tolist()
            token = TokenLogprobs(float(self.slot.logprobs[entry]), tuple(ids), tuple(best))
            row, position = found[entry, :2].tolist()
            entries.append(RowLogprobs(row, position, token))
        return tuple(entries)
