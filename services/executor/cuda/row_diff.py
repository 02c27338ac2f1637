"""A plan's changes of rows, as words for the device's row table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from llmos.kernels import row_table
from llmos.kernels.row_table import DeviceRows, DiffWriter
from llmos.services.executor.sampling_columns import NO_TOP_K, SamplingColumns

if TYPE_CHECKING:
    from llmos.protocol.messages import RowAdd, StepPlan


class RowDiff:
    """Writes diffs. `columns` are the host's, which were set from the plan before."""

    def __init__(self, table: DeviceRows, columns: SamplingColumns) -> None:
        self._writer = DiffWriter(table)
        self._columns = columns
        self._max_length = table.max_context

    def write(self, plan: StepPlan) -> Tensor | None:
        """The diff of a plan; None if it changes no row."""
        if not (plan.row_frees or plan.row_adds or plan.page_appends):
            return None
        for row in np.frombuffer(plan.row_frees, dtype="<i4").tolist():
            self._writer.free(row)
        for add in plan.row_adds:
            self._add(add)
        for row, index, page in np.frombuffer(plan.page_appends, dtype="<i4").reshape(-1, 3).tolist():
            self._writer.append_page(row, index, page)
        return self._writer.finish()

    def _add(self, add: RowAdd) -> None:
        params, row, host = add.params, add.row, self._columns
        most = self._max_length if params.max_tokens is None else add.prompt_len + params.max_tokens
        seed = int(host.seed[row])
        columns: dict[int, int | float] = {
            row_table.PROMPT_LENGTH: add.prompt_len,
            row_table.MAX_LENGTH: min(most, self._max_length + 1),
            row_table.TEMPERATURE: float(host.temperature[row]),
            row_table.TOP_K: min(int(host.top_k[row]), NO_TOP_K),
            row_table.TOP_P: float(host.top_p[row]),
            row_table.LOG_MIN_P: float(host.log_min_p[row]),
            row_table.LOGPROBS: int(host.logprobs[row]),
            row_table.ADJUSTED: int(host.special[row]),
            row_table.REPETITION: 1.0 if params.repetition_penalty is None else params.repetition_penalty,
            row_table.PRESENCE: params.presence_penalty,
            row_table.FREQUENCY: params.frequency_penalty,
            row_table.MIN_TOKENS: params.min_tokens,
        }
        columns[row_table.SEED_LOW], columns[row_table.SEED_HIGH] = row_table.split64(seed)
        self._writer.add(
            row,
            columns,
            pages=np.frombuffer(add.pages, dtype="<i4").tolist(),
            tokens=add.tokens,
            stops=params.stop_token_ids,
            biases=params.logit_bias,
        )
