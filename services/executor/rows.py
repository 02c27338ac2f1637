"""The row table: what the executor knows of the sequences that run, as arrays indexed by row. Imports no torch.

States of a row: free -> live (RowAdd) -> failed (its logits were not finite; it computes nothing more) -> free (row_frees).
`apply` turns a `StepPlan` into `Work`: which tokens to compute and which rows to sample. Invariants, asserted because only the
microkernel writes plans: rows and pages are in range, a row is added when free and used when live, `computed` never passes
`length`, and every token that is computed has a page. `pages[row]` beyond `num_pages[row]` repeats the row's own first page.
A row enters with pages that others may read; the page that holds its first token to compute is its alone if any slot follows there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmos.services.executor.sampling_columns import SamplingColumns

if TYPE_CHECKING:
    from llmos.protocol.messages import RowAdd, StepPlan
    from llmos.protocol.params import SamplingParams

Ints = npt.NDArray[np.int64]
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a row, to be computed in one step."""

    row: int
    start: int
    length: int
    sample: bool

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Work:
    """One step's work. `fresh_pages` changed hands; `stale_slots` (pages, offsets) lie behind the computed tokens in pages that rows
    enter with, where a forked or finished sequence may have been further; `skipped` are failed rows that the plan still names."""

    decode: Ints
    chunks: tuple[Chunk, ...]
    fresh_pages: Ints
    stale_slots: tuple[Ints, Ints]
    skipped: tuple[int, ...]


class RowTable:
    """Rows of at most `max_context` tokens over `num_pages` pages."""

    def __init__(self, max_rows: int, max_context: int, page_size: int, num_pages: int) -> None:
        self.max_rows = max_rows
        self.page_size = page_size
        self.total_pages = num_pages
        # One token more than the context: a step that runs ahead may sample past the end before the row is freed.
        self.tokens = np.zeros((max_rows, max_context + 1), dtype=np.int32)
        self.pages = np.zeros((max_rows, -(-max_context // page_size) + 1), dtype=np.int32)
        self.length = np.zeros(max_rows, dtype=np.int64)
        self.computed = np.zeros(max_rows, dtype=np.int64)
        self.prompt_len = np.zeros(max_rows, dtype=np.int64)
        self.num_pages = np.zeros(max_rows, dtype=np.int64)
        self.failed = np.zeros(max_rows, dtype=bool)
        self.live = np.zeros(max_rows, dtype=bool)
        self.life = np.zeros(max_rows, dtype=np.int64)  # how often the row was added
        self.params: list[SamplingParams | None] = [None] * max_rows
        self.sampling = SamplingColumns(max_rows)
        self._decode = np.zeros(0, dtype=np.int64)

    def clear(self) -> None:
        """Free every row: a new generation begins."""
        self.params = [None] * self.max_rows
        self.live[:] = False
        self._decode = np.zeros(0, dtype=np.int64)

    def apply(self, plan: StepPlan) -> Work:
        """Apply a plan's differences in their order and say what is to be computed."""
        for row in _ints(plan.row_frees):
            self._free(int(row))
        fresh = [self._add(add) for add in plan.row_adds]
        fresh.append(self._append_pages(_ints(plan.page_appends).reshape(-1, 3)))
        prefill = _ints(plan.prefill).reshape(-1, 4).tolist()
        chunks = [Chunk(row, start, length, bool(last)) for row, start, length, last in prefill]
        if plan.decode is not None:
            self._decode = _ints(plan.decode)
        self._check_decode()
        for chunk in chunks:
            self._check_chunk(chunk)
        failed = self.failed[self._decode]
        skipped = [int(row) for row in self._decode[failed]] + [c.row for c in chunks if self.failed[c.row]]
        live = tuple(chunk for chunk in chunks if not self.failed[chunk.row])
        stale = self._stale_slots([add.row for add in plan.row_adds])
        return Work(self._decode[~failed], live, np.concatenate(fresh), stale, tuple(skipped))

    def computed_to(self, work: Work) -> None:
        """The KV of all tokens of `work` is in the cache now."""
        self.computed[work.decode] += 1
        for chunk in work.chunks:
            self.computed[chunk.row] = chunk.end

    def append(self, rows: Ints, tokens: Ints) -> None:
        """Each row got its next token."""
        self.tokens[rows, self.length[rows]] = tokens
        self.length[rows] += 1

    def param(self, row: int) -> SamplingParams:
        params = self.params[row]
        assert params is not None, f"row {row} is free"
        return params

    def slots_of(self, rows: Ints, positions: Ints) -> tuple[Ints, Ints]:
        """(page, offset in page) of tokens at `positions` of `rows`."""
        return self.pages[rows, positions // self.page_size].astype(np.int64), positions % self.page_size

    def _free(self, row: int) -> None:
        self._check_live(row)
        self.params[row] = None
        self.live[row] = False

    def _add(self, add: RowAdd) -> Ints:
        row, tokens, pages = add.row, _ints(add.tokens), _ints(add.pages)
        assert 0 <= row < self.max_rows, f"row {row} of {self.max_rows}"
        assert self.params[row] is None, f"row {row} is not free"
        assert 0 < add.prompt_len <= tokens.size <= self.tokens.shape[1], f"row {row}: {tokens.size} tokens"
        assert 0 <= add.num_computed < tokens.size, (
            f"row {row}: {add.num_computed} of {tokens.size} tokens are computed"
        )
        self._check_pages(pages)
        assert pages.size <= self.pages.shape[1], f"row {row}: {pages.size} pages"
        cached = -(-add.num_computed // self.page_size)
        assert cached <= pages.size, f"row {row}: {pages.size} pages for {add.num_computed} computed tokens"
        self.params[row] = add.params
        self.live[row] = True
        self.life[row] += 1
        self.sampling.set(row, add.params)
        self.failed[row] = False
        self.tokens[row, : tokens.size] = tokens
        self.length[row] = tokens.size
        self.prompt_len[row] = add.prompt_len
        self.computed[row] = add.num_computed
        self.num_pages[row] = 0
        self._set_pages(row, pages)
        return pages[cached:]

    def _stale_slots(self, rows: list[int]) -> tuple[Ints, Ints]:
        """(page, offset) of the slots of partial pages of rows that just entered, but for the one that is written first anyway: that
        one may be the last of a full page, which others read."""
        pages, offsets = [_NONE], [_NONE]
        for row in rows:
            computed = int(self.computed[row])
            if computed % self.page_size:
                offsets.append(np.arange(computed % self.page_size + 1, self.page_size))
                pages.append(np.full(offsets[-1].size, self.pages[row, computed // self.page_size], dtype=np.int64))
        return np.concatenate(pages), np.concatenate(offsets)

    def _append_pages(self, appends: Ints) -> Ints:
        for row, index, page in appends.tolist():
            self._check_live(row)
            assert index == self.num_pages[row] < self.pages.shape[1], f"row {row}: page index {index}"
            self._set_pages(row, np.array([page]))
        self._check_pages(appends[:, 2])
        return appends[:, 2]

    def _set_pages(self, row: int, pages: Ints) -> None:
        first = int(self.num_pages[row])
        if first == 0 and pages.size:
            self.pages[row] = pages[0]
        self.pages[row, first : first + pages.size] = pages
        self.num_pages[row] += pages.size

    def _check_live(self, row: int) -> None:
        assert 0 <= row < self.max_rows, f"row {row} of {self.max_rows}"
        assert self.params[row] is not None, f"row {row} is free"

    def _check_pages(self, pages: Ints) -> None:
        assert ((pages >= 0) & (pages < self.total_pages)).all(), f"pages {pages} of {self.total_pages}"

    def _check_decode(self) -> None:
        rows = self._decode
        if not rows.size:
            return
        assert (rows >= 0).all(), f"decode rows {rows}"
        assert self.live[rows].all(), f"decode rows {rows}: one is free"
        ready = (self.computed[rows] == self.length[rows] - 1) | self.failed[rows]
        assert ready.all(), f"decode rows {rows[~ready]} have more than their newest token to compute"
        paged = (self.length[rows] <= self.num_pages[rows] * self.page_size) | self.failed[rows]
        assert paged.all(), f"decode rows {rows[~paged]} have no page for their newest token"
        assert (self.length[rows] < self.tokens.shape[1]).all(), f"decode rows {rows}: one is past the context"

    def _check_chunk(self, chunk: Chunk) -> None:
        row = chunk.row
        self._check_live(row)
        if self.failed[row]:
            return
        assert chunk.length > 0, f"row {row}: {chunk} is empty"
        assert chunk.start == self.computed[row], f"row {row}: {chunk} but {self.computed[row]} are computed"
        assert chunk.end <= self.length[row], f"row {row}: {chunk} past its {self.length[row]} tokens"
        assert chunk.end <= self.num_pages[row] * self.page_size, f"row {row}: no page for {chunk}"
        assert not chunk.sample or chunk.end == self.length[row], f"row {row}: {chunk} samples before the newest token"


def _ints(blob: bytes) -> Ints:
    return np.frombuffer(blob, dtype="<i4").astype(np.int64)
