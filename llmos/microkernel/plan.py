"""A step while it is being planned, and what the microkernel remembers of it until its result arrives."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llmos.microkernel.rows import Ints
from llmos.microkernel.sequence import Sequence
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan

if TYPE_CHECKING:
    from llmos.microkernel.steady import Steady

EMPTY: Ints = np.zeros(0, np.int64)


def equal(left: Ints, right: Ints) -> bool:
    """`np.array_equal` without its overhead, which counts at a dozen comparisons a step."""
    return left is right or (len(left) == len(right) and bool((left == right).all()))


def append_each(arrays: list[array[int]], values: list[int]) -> None:
    """One value to each array."""
    # `append` gives None, so `any` runs through all of them: a loop in C instead of 256 steps of the interpreter.
    any(map(array.append, arrays, values))


@dataclass(slots=True)
class InFlightStep:
    """What was asked of the executor: decodes, prefill chunks that sample, then `num_silent` chunks that sample nothing.

    `rows`, `epochs`: every row that computes and its life. `stored`: its tokens in pages once the step is done, which for a row that
    samples is also the position of the new token. `seqs`, `logs`: the rows' sequences and their tokens. `num_decodes` of the rows
    decode, the others compute `num_prefill` tokens together. `steady`: what foresaw it, if something did, as its step `index`.
    """

    step: int
    rows: Ints
    epochs: Ints
    stored: Ints
    num_silent: int
    seqs: list[Sequence]
    logs: list[array[int]]
    num_decodes: int
    num_prefill: int
    steady: Steady | None = None
    index: int = 0


class Copies:
    """Page copies for the next plan, as flat lists of pairs (from, to)."""

    def __init__(self) -> None:
        self.out: list[int] = []
        self.back: list[int] = []
        self.within: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.out or self.back or self.within)

    def swap_out(self, pages: Iterable[int], host_pages: Iterable[int]) -> None:
        for pair in zip(pages, host_pages):
            self.out += pair

    def swap_in(self, host_pages: Iterable[int], pages: Iterable[int]) -> None:
        for pair in zip(host_pages, pages):
            self.back += pair

    def copy(self, source: int, target: int) -> None:
        self.within += (source, target)


@dataclass(slots=True)
class PlanBuilder:
    """Collects one step. A chunk is (row, start, count)."""

    row_frees: list[int] = field(default_factory=list)
    row_adds: list[RowAdd] = field(default_factory=list)
    page_appends: bytes = b""
    chunks: list[tuple[int, int, int]] = field(default_factory=list)  # those that sample nothing
    last_chunks: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # those that reach the newest token and sample
    decode: Ints = field(default_factory=lambda: EMPTY)

    @property
    def has_work(self) -> bool:
        """A row that was added must be told, also if it computes nothing yet."""
        return bool(self.chunks or self.last_chunks or len(self.decode) or self.row_adds)

    def build(self, generation: int, step: int, last_decode: Ints | None, copies: Copies) -> StepPlan:
        """The wire form; an unchanged decode set is left out."""
        same = last_decode is not None and equal(self.decode, last_decode)
        prefill = [(*chunk, sample) for sample, chunks in ((0, self.chunks), (1, self.last_chunks)) for chunk in chunks]
        return StepPlan(
            generation=generation,
            step=step,
            row_frees=pack_i32(self.row_frees),
            row_adds=tuple(self.row_adds),
            page_appends=self.page_appends,
            prefill=np.asarray(prefill, "<i4").tobytes() if prefill else b"",
            decode=None if same else self.decode.astype("<i4").tobytes(),
            swap_out=pack_i32(copies.out),
            swap_in=pack_i32(copies.back),
            copies=pack_i32(copies.within),
        )
