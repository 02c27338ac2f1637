"""Rows of a table: which are shown, in which order, which one is selected.

Invariants: once a user chose a row, the selection stays with it while others come and go; when it leaves, the one that took its place is
selected. Until then, and again after a jump to the top, the first row is selected, whichever it is, so that somebody who only watches
sees the top. The selected row is always inside the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column. `cell` gets the row and the column's width; `key` orders rows.

    `rank`: while a line is too short, the columns of the highest rank are left out. `grow`: how much wider it may get where there is
    room. `falling`: the largest comes first. `fits`: `key` is a number, and the column is as wide as the largest one.
    """

    name: str
    title: str
    width: int
    cell: Callable[[T, int], str]
    key: Callable[[T], Any]
    rank: int = 0
    grow: int = 0
    right: bool = False
    falling: bool = False
    fits: bool = False
    style: Callable[[T], str] | None = None


class Listing(Generic[T]):
    """`name_of` a row is what the selection remembers and equal rows are ordered by; `words_of` is what a filter looks at."""

    def __init__(
        self, columns: Sequence[Column[T]], name_of: Callable[[T], Any], words_of: Callable[[T], str], sort: str
    ) -> None:
        self.columns = {column.name: column for column in columns}
        self.sort = sort
        self.backwards = False
        self.filter = ""
        self.total = 0
        self.rows: list[T] = []  # shown, in order
        self.index = 0  # of the selected row in `rows`
        self.held = False  # did a user choose it?
        self.first = 0  # row at the top of the window
        self.height = 1
        self._all: list[T] = []
        self._name_of = name_of
        self._words_of = words_of

    @property
    def selected(self) -> T | None:
        return self.rows[self.index] if self.rows else None

    @property
    def falling(self) -> bool:
        return self.columns[self.sort].falling != self.backwards

    def replace(self, rows: Iterable[T]) -> None:
        """The rows as they are now."""
        self._all = list(rows)
        self.total = len(self._all)
        for name, column in self.columns.items():
            if column.fits and self._all:
                widest = len(str(max(map(column.key, self._all))))
                self.columns[name] = replace(column, width=max(len(column.title) + 1, widest))
        self._arrange()

    def order(self, sort: str, *, backwards: bool = False) -> None:
        """Sort by a column's name."""
        self.sort, self.backwards = sort, backwards
        self._arrange()

    def next_sort(self, among: Sequence[str]) -> None:
        """The column after the current one, around the end; `among` are those on the screen."""
        after = among.index(self.sort) + 1 if self.sort in among else 0
        self.order(among[after % len(among)])

    def narrow(self, text: str) -> None:
        """Show only rows in which every word of `text` occurs."""
        self.filter = text
        self._arrange()

    def move(self, by: int) -> None:
        self.held = True
        self._go(self.index + by)

    def move_to_end(self) -> None:
        self.held = True
        self._go(len(self.rows) - 1)

    def move_to_top(self) -> None:
        """The first row, whichever it is."""
        self.held = False
        self._go(0)

    def window(self, height: int) -> list[T]:
        """The rows that fit, with the selected one among them."""
        self.height = max(1, height)
        self.first = max(self.index - self.height + 1, min(self.first, self.index, len(self.rows) - self.height), 0)
        return self.rows[self.first : self.first + height] if height > 0 else []

    def _arrange(self) -> None:
        before = self.selected
        words = self.filter.lower().split()
        shown = self._all
        if words:
            shown = [row for row in shown if _all_in(words, self._words_of(row).lower())]
        column = self.columns[self.sort]
        # Two stable sorts: equal rows stay in the order of their names, also when the column is turned around.
        shown = sorted(shown, key=self._name_of)
        shown.sort(key=column.key, reverse=self.falling)
        self.rows = shown
        if not self.held:
            self.index = 0
        elif before is not None:
            name = self._name_of(before)
            self.index = next((i for i, row in enumerate(shown) if self._name_of(row) == name), self.index)
        self._go(self.index)

    def _go(self, index: int) -> None:
        self.index = max(0, min(len(self.rows) - 1, index))


def _all_in(words: Sequence[str], text: str) -> bool:
    return all(word in text for word in words)


def choose(columns: Iterable[Column[T]], width: int, gap: int = 1) -> list[tuple[Column[T], int]]:
    """The columns that fit `width` cells, each with its own width: by rank, then what is left goes to those that can grow."""
    chosen: set[str] = set()
    room = width + gap
    for column in (ordered := sorted(columns, key=lambda column: column.rank)):
        room -= column.width + gap
        if room < 0:
            break
        chosen.add(column.name)
    kept = [column for column in columns if column.name in chosen]
    widths = {column.name: column.width for column in kept}
    left = width - sum(widths.values()) - gap * max(0, len(kept) - 1)
    for column in (column for column in ordered if column.name in chosen and column.grow):
        more = min(column.grow, left)
        widths[column.name] += more
        left -= more
    return [(column, widths[column.name]) for column in kept]
