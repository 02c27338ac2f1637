"""What an encoder, real or fake, knows of the texts that it is given, and how much it says it can take. Imports no torch.

Invariant: a chunk is a whole text; nothing is decoded or sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmos.codes import FinishReason
from llmos.config import ModelConfig
from llmos.errors import ModelError
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import StepPlan
from llmos.services.executor.backend import MAX_PAGES, Capabilities, Limits, with_defaults
from llmos.services.executor.rows import Ints, RowTable


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a step. `types`: 0, or 1 from where its second part begins."""

    row: int
    ids: Ints
    types: Ints


class TextRows:
    """The row table of an encoder."""

    def __init__(self, capabilities: Capabilities) -> None:
        found = capabilities
        self._table = RowTable(found.max_rows, found.max_context, found.page_size, found.num_pages)
        self._second_at = [0] * found.max_rows

    def clear(self) -> None:
        self._table.clear()

    def apply(self, plan: StepPlan) -> tuple[list[Text], list[int]]:
        """The texts to encode, and rows that failed before and are still named."""
        work = self._table.apply(plan)
        for add in plan.row_adds:
            assert add.second_at >= 0, f"row {add.row} is to generate"
            self._second_at[add.row] = add.second_at
        assert not work.decode.size, "an encoder is asked to decode"
        texts = []
        for chunk in work.chunks:
            row, length = chunk.row, int(self._table.length[chunk.row])
            assert (chunk.start, chunk.end, chunk.sample) == (0, length, False), f"{chunk} is not a whole text"
            second_at = self._second_at[row] or length
            types = (np.arange(length) >= second_at).astype(np.int64)
            texts.append(Text(row, self._table.tokens[row, :length].astype(np.int64), types))
        self._table.computed_to(work)
        return texts, list(work.skipped)

    def fail(self, rows: list[int]) -> None:
        self._table.failed[rows] = True


def failures(rows: list[int]) -> bytes:
    """As `StepOutput.failed`."""
    return pack_i32(value for row in rows for value in (row, FinishReason.NUMERICAL_ERROR))


def text_capabilities(
    model: ModelConfig, limits: Limits, *, max_text: int, vocab_size: int, dtype: str, device: str, output_size: int
) -> Capabilities:
    """Pages are a measure, so by default there are enough for every row's longest text."""
    model = with_defaults(model)
    if model.max_context > max_text:
        text = f"max_context {model.max_context} is over the model's own limit of {max_text} tokens a text"
        raise ModelError(text, field="max_context")
    context = model.max_context or max_text
    enough = limits.max_rows * -(-context // model.page_size)
    num_pages = model.num_pages or min(MAX_PAGES, enough)
    return Capabilities(
        num_pages=num_pages,
        page_size=model.page_size,
        max_rows=limits.max_rows,
        max_step_tokens=limits.max_step_tokens,
        max_context=min(context, num_pages * model.page_size),
        vocab_size=vocab_size,
        dtype=dtype,
        device=device,
        output_size=output_size,
    )
