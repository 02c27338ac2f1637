"""What the host sends before a step: pinned memory, one layout on both sides.

    decode rows | chunk rows | chunk starts | chunk lengths | chunk positions | rows to sample | tokens to sample

All int32. The rows that decode are entries [0, num_decodes) of the batch, -1 behind them; chunk i fills the batch from `starts[i]` on; a
sampling chunk's last token is in `tokens to sample` and its row in `rows to sample`, behind the decode entries, which sample in place.
The device keeps what was sent, so a step that
repeats the one before sends nothing. A diff, what changes the row table (`llmos.kernels.row_table`), has a buffer of its own, which grows
when a step brings more prompts than any before; nothing that is captured reads it.

There is one staging piece per step in flight; the host writes it again only when that step was collected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmos.services.executor.cuda.device import Device
from llmos.services.executor.rows import Work

Ints = npt.NDArray[np.int32]
_FIRST_DIFF = 1 << 15  # words that there is room for at the start


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a step's batch, which launches depend on."""

    num_decodes: int
    num_chunks: int
    num_tokens: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Upload:
    """What of a step must be sent: pairs of host memory and where it goes on the device. `diff`: the part that changes the row table."""

    copies: tuple[tuple[Tensor, Tensor], ...]
    diff: Tensor | None

    def send(self) -> None:
        """Device work."""
        for source, target in self.copies:
            target.copy_(source, non_blocking=True)


class StepInputs:
    """Both sides of the layout. `write` on the host, then `Upload.send` in the device's queue."""

    def __init__(self, device: Device, max_rows: int, num_slots: int) -> None:
        self._device, self._max_rows, self._num_slots = device, max_rows, num_slots
        self._fixed = device.empty(7 * max_rows, dtype=torch.int32)
        self._fixed_staging = [device.pinned(len(self._fixed), dtype=torch.int32) for _ in range(num_slots)]
        self._decode: npt.NDArray[np.int64] = np.zeros(
            0, dtype=np.int64
        )  # as the device has them, in the step of this shape
        self._last = StepShape(0, 1, 0, 0)
        self._retired: list[Tensor] = []  # diff buffers that steps in flight may still use
        self._diff, self._diff_staging = self._make_diff(_FIRST_DIFF)
        parts = [self._fixed[i * max_rows : (i + 1) * max_rows] for i in range(7)]
        (
            self.decode_rows,
            self.chunk_rows,
            self.q_start,
            self.q_len,
            self.q_pos,
            self.sample_rows,
            self.sample_tokens,
        ) = parts

    def chunks(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.chunk_rows[:count], self.q_start[:count], self.q_len[:count], self.q_pos[:count]

    def write(self, slot: int, work: Work, diff: Tensor | None) -> tuple[StepShape, Upload]:
        """Lay a step out in staging memory. Most steps decode the rows of the one before."""
        copies = []
        if work.chunks or self._last.num_chunks or not np.array_equal(work.decode, self._decode):
            fixed, self._last = self._lay_out(work)
            self._decode = work.decode
            self._fixed_staging[slot].copy_(torch.from_numpy(fixed))
            copies.append((self._fixed_staging[slot], self._fixed))
        shape = self._last
        if diff is None:
            return shape, Upload(tuple(copies), None)
        if len(diff) > len(self._diff):
            self._retired += [self._diff, *self._diff_staging]
            self._diff, self._diff_staging = self._make_diff(2 * len(diff))
        staging, target = self._diff_staging[slot][: len(diff)], self._diff[: len(diff)]
        staging.copy_(diff)
        return shape, Upload((*copies, (staging, target)), target)

    def _make_diff(self, words: int) -> tuple[Tensor, list[Tensor]]:
        """The device's buffer, and one to stage from per slot."""
        staging = [self._device.pinned(words, dtype=torch.int32) for _ in range(self._num_slots)]
        return self._device.empty(words, dtype=torch.int32), staging

    def _lay_out(self, work: Work) -> tuple[Ints, StepShape]:
        rows, decodes, chunks = self._max_rows, work.decode.size, work.chunks
        fixed = np.zeros(len(self._fixed), dtype=np.int32)
        fixed[:decodes] = work.decode
        fixed[decodes:rows] = -1
        total, samples = decodes, decodes
        for index, chunk in enumerate(chunks):
            fixed[[rows + index, 2 * rows + index, 3 * rows + index, 4 * rows + index]] = (
                chunk.row, total, chunk.length, chunk.start,
            )  # fmt: skip
            total += chunk.length
            if chunk.sample:
                fixed[5 * rows + samples], fixed[6 * rows + samples] = chunk.row, total - 1
                samples += 1
        fixed[6 * rows : 6 * rows + decodes] = np.arange(decodes)
        return fixed, StepShape(decodes, len(chunks), total, samples)
