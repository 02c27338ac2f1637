"""Characters and styles; text made harmless and exactly as wide as asked.

Widths are terminal cells. Colours are the sixteen named ones and only repeat what words and characters say; without colours
the selection and the titles are told apart by attributes.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from llmos.codes import SeqState, ServiceState


@dataclass(frozen=True, slots=True)
class Glyphs:
    full: str
    bar: str  # does not touch the lines above and below
    cached: str
    free: str
    marker: str
    up: str
    down: str
    dots: str
    rule: str
    cursor: str
    spark: str


UNICODE = Glyphs("█", "■", "░", "·", "▸", "▲", "▼", "…", "─", "▏", "▁▂▃▄▅▆▇█")
PC = Glyphs("█", "■", "░", "·", "►", "▲", "▼", "~", "─", "_", "·░▒▓█")  # what the Linux console's fonts have
ASCII = Glyphs("#", "=", ":", ".", ">", "^", "v", "~", "-", "_", " .:-=+*#")

OWNER_STYLES = ("green", "yellow", "magenta", "cyan", "bright_blue", "red")
SEQ_STYLES: dict[int, str] = {
    SeqState.WAITING: "yellow",
    SeqState.RUNNING: "green",
    SeqState.PREEMPTED: "magenta",
    SeqState.FINISHED: "dim",
    SeqState.SUSPENDED: "bright_blue",
    SeqState.BLOCKED: "cyan",
    SeqState.SWAPPED: "magenta",
}
SERVICE_STYLES: dict[int, str] = {
    ServiceState.STOPPED: "dim",
    ServiceState.STARTING: "yellow",
    ServiceState.RUNNING: "green",
    ServiceState.BACKOFF: "bold red",
    ServiceState.STOPPING: "yellow",
    ServiceState.FATAL: "bold red",
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a terminal can draw. `colours` False: attributes only. `live` False: no selection and no keys, one frame on paper."""

    glyphs: Glyphs = UNICODE
    colours: bool = True
    live: bool = True

    @property
    def head(self) -> str:
        return "black on green" if self.colours else "bold underline"

    @property
    def selected(self) -> str:
        return "black on cyan" if self.colours else "reverse"

    @property
    def question(self) -> str:
        return "black on yellow" if self.colours else "bold reverse"

    @property
    def alarm(self) -> str:
        return "bold white on red" if self.colours else "bold reverse"


def look_for(console: Console, term: str, *, live: bool) -> Look:
    """What this console can show."""
    if not console.encoding.lower().startswith("utf"):
        glyphs = ASCII
    else:
        glyphs = PC if term == "linux" else UNICODE
    return Look(glyphs, colours=console.color_system is not None and not console.no_color, live=live)


@functools.lru_cache(4096)
def clean(text: str) -> str:
    """One harmless line: no control characters, line ends, direction marks or unassigned characters."""
    return "".join("�" if unicodedata.category(c)[0] in "CZ" and c != " " else c for c in text)


def cut(text: str, width: int, glyphs: Glyphs = UNICODE) -> str:
    """At most `width` cells, visibly cut."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + glyphs.dots if width > 0 else ""


def pad(text: str, width: int, *, right: bool = False, glyphs: Glyphs = UNICODE) -> str:
    """Exactly `width` cells."""
    text = cut(text, width, glyphs)
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def line(*parts: tuple[str, str]) -> Text:
    """One line of (text, style)."""
    made = Text(no_wrap=True, overflow="crop")
    for text, style in parts:
        made.append(text, style or None)
    return made


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a line that may be left out: the highest `rank` first, 0 never."""

    text: str
    style: str = ""
    rank: int = 0


def arrange(left: Sequence[Piece], right: Sequence[Piece], width: int, look: Look, gap: int = 2) -> Text:
    """Pieces from both ends of a line, as many as there is room for."""
    left, right = [piece for piece in left if piece.text], [piece for piece in right if piece.text]
    while (excess := _width(left, gap) + _width(right, gap) + (gap if left and right else 0) - width) > 0:
        droppable = [piece for piece in (*left, *right) if piece.rank]
        if not droppable:
            break
        worst = max(droppable, key=lambda piece: piece.rank)
        (left if worst in left else right).remove(worst)
    made = line()
    for number, piece in enumerate(left):
        made.append(" " * gap * (number > 0)).append(piece.text, piece.style or None)
    if right:
        made.append(" " * max(gap if left else 0, -excess + (gap if left else 0)))
        for number, piece in enumerate(right):
            made.append(" " * gap * (number > 0)).append(piece.text, piece.style or None)
    if made.cell_len > width:
        made.truncate(width, overflow="crop")
    return made


def _width(pieces: Sequence[Piece], gap: int) -> int:
    return sum(cell_len(piece.text) for piece in pieces) + gap * max(0, len(pieces) - 1)


def spread(counts: Sequence[float], width: int) -> list[int]:
    """Split `width` cells in proportion to `counts`; what is there at all gets a cell while there are enough."""
    whole = sum(counts)
    if whole <= 0 or width <= 0:
        return [0] * len(counts)
    exact = [count / whole * width for count in counts]
    cells = [max(int(share), 1 if count > 0 else 0) for share, count in zip(exact, counts)]
    while sum(cells) > width:  # the one that has most above its share gives
        cells[max(range(len(cells)), key=lambda i: (min(cells[i], 2), cells[i] - exact[i]))] -= 1
    for i in sorted(range(len(cells)), key=lambda i: cells[i] - exact[i])[: width - sum(cells)]:
        cells[i] += 1
    return cells


def sparkline(values: Sequence[float], width: int, glyphs: Glyphs) -> str:
    """The newest values, the largest one at full height; zero is the lowest mark."""
    shown = values[-width:] if width > 0 else ()
    most = max(shown, default=0.0)
    steps = len(glyphs.spark) - 1
    return "".join(glyphs.spark[round(value / most * steps) if most > 0 else 0] for value in shown)
