"""The row table on the device: what a decode step must know of each sequence, so that a step needs nothing from the host.

All of it is one int32 arena; the tables are views of it. A row has a record of 32 words (columns below; floats are kept as their bits),
its page table, its tokens, its stop tokens and its logit biases. A change of any kind is therefore a list of copies of words
into the arena (`DiffWriter`, `row_update.apply_diff`), and a new column costs no new code.

States of a row: FREE -> LIVE (added) -> STOPPED, FULL or FAILED (set on the device by `row_update.advance`: it met a stop token, reached
its last length, or its logits were not finite) -> FREE. Only LIVE rows are computed.
Invariants, the caller's to keep: pages and tokens are in range; the pages of a LIVE row before NUM_PAGES are its own.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from llmos.kernels.checks import KernelShapeError, check_range

FREE, LIVE, STOPPED, FULL, FAILED = range(5)

RECORD_WORDS = 32
# Columns of a record. LENGTH counts all known tokens; the newest one is not computed yet. MAX_LENGTH: the row is FULL when it has so many.
STATE, LENGTH, PROMPT_LENGTH, MAX_LENGTH, NUM_PAGES = range(5)
# TEMPERATURE, TOP_P, LOG_MIN_P, REPETITION, PRESENCE and FREQUENCY are float32. LOGPROBS: -1 none, else how many best ones. MASK: index
# into the bitmasks of allowed tokens, or -1. ADJUSTED: 1 if the logits are changed before sampling (penalties, biases, MIN_TOKENS, MASK).
TEMPERATURE, TOP_K, TOP_P, LOG_MIN_P, SEED_LOW, SEED_HIGH, LOGPROBS, ADJUSTED = range(5, 13)
REPETITION, PRESENCE, FREQUENCY, MIN_TOKENS, NUM_STOPS, NUM_BIASES, MASK = range(13, 20)
FLOAT_COLUMNS = frozenset((TEMPERATURE, TOP_P, LOG_MIN_P, REPETITION, PRESENCE, FREQUENCY))

NO_TOP_K = 2**31 - 1
_DEFAULTS = {
    MAX_LENGTH: 2**31 - 1,
    TEMPERATURE: 1.0,
    TOP_K: NO_TOP_K,
    TOP_P: 1.0,
    LOG_MIN_P: -math.inf,
    LOGPROBS: -1,
    REPETITION: 1.0,
    MASK: -1,
}

# A diff is int32 words: the number of segments, three unused words, the segments, what they copy. A segment is four words: where to
# in the arena (low and high half), how many words (at most PIECE), where from in the diff.
HEADER_WORDS, SEGMENT_WORDS, PIECE = 4, 4, 1024


class DeviceRows:
    """The arena and its views. max_context: most tokens of a row; one more is kept for a step that runs ahead."""

    def __init__(
        self,
        device: torch.device | str,
        max_rows: int,
        max_context: int,
        page_size: int,
        *,
        max_stops: int = 1024,
        max_biases: int = 1024,
    ) -> None:
        for field, value in {"max_rows": max_rows, "max_context": max_context, "page_size": page_size}.items():
            check_range(field, value, 1, 2**31 - 1)
        self.max_rows, self.max_context, self.page_size = max_rows, max_context, page_size
        widths = (RECORD_WORDS, -(-max_context // page_size) + 1, max_context + 1, max_stops, max_biases, max_biases)
        starts = [0]
        for width in widths:
            starts.append(starts[-1] + max_rows * _aligned(width))
        self.arena = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self._starts = dict(zip(("records", "pages", "tokens", "stops", "bias_ids", "bias_values"), starts))
        views = [
            self.arena[start:end].view(max_rows, -1)[:, :width] for start, end, width in zip(starts, starts[1:], widths)
        ]
        self.records, self.pages, self.tokens, self.stops, self.bias_ids, bias_bits = views
        self.bias_values = bias_bits.view(torch.float32)

    def offset(self, table: str, row: int, column: int) -> int:
        """Where a word lies in the arena."""
        view: Tensor = getattr(self, table)
        if not (0 <= row < self.max_rows and 0 <= column < view.shape[1]):
            raise KernelShapeError(table, f"has shape {list(view.shape)}, nothing at row {row}, column {column}")
        return self._starts[table] + row * view.stride(0) + column


class DiffWriter:
    """Collects a step's changes on the host. No word is written twice in a diff, so the device may apply it in any order."""

    def __init__(self, rows: DeviceRows) -> None:
        self._rows = rows
        self._records: dict[int, dict[int, int | float]] = {}
        self._changes: dict[tuple[int, int], int | float] = {}
        self._segments = array("i")
        self._words = array("i")

    def free(self, row: int) -> None:
        """Call it before an `add` of the same row."""
        self._changes[row, STATE] = FREE

    def add(
        self,
        row: int,
        columns: dict[int, int | float],
        *,
        pages: Sequence[int],
        tokens: Sequence[int] | bytes,
        stops: Sequence[int] = (),
        biases: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Make a row LIVE. columns: what differs from the neutral defaults; LENGTH, NUM_PAGES, NUM_STOPS and NUM_BIASES are set here.
        tokens: int32 values, or their bytes."""
        known = array("i", tokens)
        sizes = {LENGTH: len(known), NUM_PAGES: len(pages), NUM_STOPS: len(stops), NUM_BIASES: len(biases)}
        self._records[row] = {**_DEFAULTS, **columns, STATE: LIVE, **sizes}
        for key in [key for key in self._changes if key[0] == row]:
            del self._changes[key]
        self._copy("pages", row, 0, array("i", pages))
        self._copy("tokens", row, 0, known)
        self._copy("stops", row, 0, array("i", stops))
        self._copy("bias_ids", row, 0, array("i", [token for token, _ in biases]))
        self._copy("bias_values", row, 0, array("i", array("f", [value for _, value in biases]).tobytes()))

    def append_page(self, row: int, index: int, page: int) -> None:
        self._copy("pages", row, index, array("i", [page]))
        self.set(row, NUM_PAGES, index + 1)

    def set(self, row: int, column: int, value: int | float) -> None:
        """Change one column of a row."""
        if row in self._records:
            self._records[row][column] = value
        else:
            self._changes[row, column] = value

    def finish(self) -> Tensor:
        """The diff, int32 on the host; the writer is empty again."""
        for row, columns in self._records.items():
            words = array("i", bytes(4 * RECORD_WORDS))
            for column, value in columns.items():
                words[column] = word(column, value)
            self._copy("records", row, 0, words)
        for (row, column), value in self._changes.items():
            self._copy("records", row, column, array("i", [word(column, value)]))
        count = len(self._segments) // SEGMENT_WORDS
        base = HEADER_WORDS + len(self._segments)
        for segment in range(count):
            self._segments[SEGMENT_WORDS * segment + 3] += base
        diff = torch.frombuffer(array("i", [count, 0, 0, 0]) + self._segments + self._words, dtype=torch.int32)
        self._records, self._changes, self._segments, self._words = {}, {}, array("i"), array("i")
        return diff

    def _copy(self, table: str, row: int, column: int, words: array[int]) -> None:
        if not words:
            return
        self._rows.offset(table, row, column + len(words) - 1)
        start = self._rows.offset(table, row, column)
        for piece in range(0, len(words), PIECE):
            length = min(PIECE, len(words) - piece)
            self._segments.extend((*split64(start + piece), length, len(self._words) + piece))
        self._words.extend(words)


def word(column: int, value: int | float) -> int:
    """A column's value as the int32 that the record holds."""
    if column in FLOAT_COLUMNS:
        return int(struct.unpack("<i", struct.pack("<f", value))[0])
    return int(value)


def split64(value: int) -> tuple[int, int]:
    """A 64-bit number as two int32 words, low half first."""
    low, high = struct.unpack("<ii", struct.pack("<q", value))
    return low, high


def _aligned(words: int) -> int:
    return -(-words // 4) * 4
