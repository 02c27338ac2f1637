"""What the pages of a fake executor would hold, so that a wrong copy, swap or page table is noticed. Imports no torch.

A slot remembers one number for the whole text up to its token: the sum of hashes of (position, token). 0 = the slot holds nothing. It
stands for the token's keys and values, which depend on all tokens before it too. Whenever a row computes, all slots before must hold
the row's own text, and the slots it fills must be empty or hold the same already.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmos.services.executor.page_moves import PageMoves
from llmos.services.executor.rows import RowTable, Work

Hashes = npt.NDArray[np.uint64]


class PageContents:
    """The slots of all pages and host pages."""

    def __init__(self, num_pages: int, page_size: int, host_pages: int) -> None:
        self.page_size = page_size
        self.slots: Hashes = np.zeros((num_pages, page_size), dtype=np.uint64)
        self.host_slots: Hashes = np.zeros((host_pages, page_size), dtype=np.uint64)

    def clear(self) -> None:
        """A new generation: nothing is known to be anywhere."""
        self.slots[:] = 0
        self.host_slots[:] = 0

    def move(self, moves: PageMoves) -> None:
        for page, host_page in moves.swap_out:
            self.host_slots[host_page] = self.slots[page]
        for host_page, page in moves.swap_in:
            self.slots[page] = self.host_slots[host_page]
        for source, target in moves.copies:
            self.slots[target] = self.slots[source]

    def enter(self, added: list[int], work: Work, rows: RowTable) -> None:
        """Forget what is stale in the pages that rows got in this step."""
        self.slots[work.fresh_pages] = 0
        self.slots[work.stale_slots] = 0
        for row in added:
            position = int(rows.computed[row])
            slot = rows.pages[row, position // self.page_size], position % self.page_size
            if slot[1] and self.slots[slot] != text_hashes(rows.tokens[row, : position + 1])[-1]:
                self.slots[slot] = 0  # another text went on there; the row overwrites it first of all

    def compute(self, work: Work, rows: RowTable) -> None:
        """Check what the step's rows look at, and fill the slots of the tokens they compute."""
        spans = [(int(row), int(rows.computed[row]), int(rows.computed[row]) + 1) for row in work.decode]
        for row, start, end in [*spans, *((chunk.row, chunk.start, chunk.end) for chunk in work.chunks)]:
            hashes = text_hashes(rows.tokens[row, :end])
            pages, offsets = rows.slots_of(np.full(end, row), np.arange(end))
            found = self.slots[pages, offsets]
            wrong = found != hashes
            wrong[start:] &= found[start:] != 0
            if wrong.any():
                position = int(wrong.argmax())
                action = "would overwrite" if position >= start else "needs its own text, not"
                there = "another text" if found[position] else "nothing"
                raise AssertionError(f"row {row}, position {position}, page {pages[position]}: {action} {there}")
            self.slots[pages[start:], offsets[start:]] = hashes[start:]


def text_hashes(tokens: npt.NDArray[np.int32]) -> Hashes:
    """For each token the hash of the text that ends with it."""
    values = (np.arange(tokens.size, dtype=np.uint64) << np.uint64(32)) | tokens.astype(np.uint64)
    return np.cumsum(_mix64(values), dtype=np.uint64)


def _mix64(values: Hashes) -> Hashes:
    """`noise.mix64` over an array; arithmetic wraps."""
    values = values + np.uint64(0x9E37_79B9_7F4A_7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31))
