"""Log-probabilities of prompts' own tokens, for the rows that ask for them.

The step keeps the hidden states of the chunks concerned; the output layer runs over them when the step is collected, which waits for the
device. That is fine for those who score prompts, and costs others nothing. What is needed of the rows is remembered when the step is
submitted: by the time that it is collected a row may be somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmos.services.executor.cuda.device import Device
from llmos.services.executor.cuda.model import DeviceModel
from llmos.services.executor.rows import Chunk, RowTable, Work

if TYPE_CHECKING:
    from llmos.protocol.messages import RowResult


@dataclass(slots=True)
class PromptScoring:
    """`spans`: the chunks that are scored, and where they are in the step's batch. In the form of a row table for `score_prompts`."""

    spans: list[tuple[Chunk, int]]
    params: dict[int, Any]
    prompt_len: dict[int, int]
    rows: dict[int, Any]
    lives: dict[int, int]
    hidden: Tensor | None = None

    @classmethod
    def of(cls, table: RowTable, work: Work) -> PromptScoring | None:
        """What a step must score; None if nothing."""
        spans, first = [], int(work.decode.size)
        for chunk in work.chunks:
            if getattr(table.param(chunk.row), "prompt_logprobs", None) is not None:
                spans.append((chunk, first))
            first += chunk.length
        if not spans:
            return None
        rows = [chunk.row for chunk, _ in spans]
        return cls(
            spans,
            {row: table.param(row) for row in rows},
            {row: int(table.prompt_len[row]) for row in rows},
            {row: table.tokens[row, : table.length[row]].copy() for row in rows},
            {row: int(table.life[row]) for row in rows},
        )

    def keep(self, model: DeviceModel) -> None:
        """Device work, behind the forward pass."""
        self.hidden = torch.cat([model.hidden_states(first, first + chunk.length) for chunk, first in self.spans])

    def score(self, device: Device, model: DeviceModel) -> tuple[tuple[RowResult, ...], list[int]]:
        """Records, and rows whose numbers are not finite. After the step is done."""
        from llmos.services.executor.prompt_scores import score_prompts

        assert self.hidden is not None
        chunks = [chunk for chunk, _ in self.spans]
        table: Any = self
        with device.stream(), torch.inference_mode():
            return score_prompts(model.logits, model.spec.vocab_size, self.hidden, 0, chunks, table)

    @property
    def tokens(self) -> PromptScoring:
        return self

    def __getitem__(self, place: tuple[int, Any]) -> Any:
        row, index = place
        return self.rows[row][index]

    def param(self, row: int) -> Any:
        return self.params[row]
