"""The page moves of a plan (swap out, swap in, copy), read and checked. Imports no torch.

The kinds are done one after the other, in the order of the fields of `PageMoves`: a page may be swapped out and then written, a host
page written and then swapped in. Invariants, asserted because only the microkernel writes plans: ids are in range, no page is written
twice, and no copy reads what another copy writes. So inside a kind the order does not matter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmos.protocol.messages import StepPlan

Pairs = list[list[int]]  # [from, to]


@dataclass(frozen=True, slots=True)
class PageMoves:
    """swap_out: page to host page; swap_in: host page to page; copies: page to page."""

    swap_out: Pairs
    swap_in: Pairs
    copies: Pairs


NO_MOVES = PageMoves([], [], [])


def read_moves(plan: StepPlan, num_pages: int, host_pages: int) -> PageMoves:
    """What the plan moves before its rows change."""
    if not (plan.swap_out or plan.swap_in or plan.copies):
        return NO_MOVES
    moves = PageMoves(_pairs(plan.swap_out), _pairs(plan.swap_in), _pairs(plan.copies))
    swapped, host_written = _columns(moves.swap_out)
    host_read, written = _columns(moves.swap_in)
    copied, copies = _columns(moves.copies)
    _check_range("pages", [*swapped, *written, *copied, *copies], num_pages)
    _check_range("host pages", [*host_written, *host_read], host_pages)
    _check_once("pages", [*written, *copies])
    _check_once("host pages", host_written)
    both = sorted(set(copied).intersection(copies))
    assert not both, f"pages {both} are copied from and to"
    return moves


def _pairs(blob: bytes) -> Pairs:
    return np.frombuffer(blob, dtype="<i4").reshape(-1, 2).tolist()  # type: ignore[no-any-return]


def _columns(pairs: Pairs) -> tuple[list[int], list[int]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _check_range(kind: str, pages: list[int], total: int) -> None:
    outside = sorted({page for page in pages if not 0 <= page < total})
    assert not outside, f"{kind} {outside} of {total}"


def _check_once(kind: str, written: list[int]) -> None:
    twice = sorted(page for page, times in Counter(written).items() if times > 1)
    assert not twice, f"{kind} {twice} are written twice"
