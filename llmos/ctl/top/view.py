"""The state as a frame: at most `height` lines, none wider than `width` cells, whatever the state and the size are."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from llmos.ctl.top.header import header, title
from llmos.ctl.top.listing import Column, Listing, choose
from llmos.ctl.top.look import Look, Piece, arrange, clean, cut, line, pad
from llmos.ctl.top.panels import FULL_EXPLANATION, explanation, help_lines
from llmos.ctl.top.state import State, View

_END = (("p", "pause", 9), ("h", "help", 0), ("q", "quit", 1))
_HINTS = {  # (key, what it does, rank: the highest are left out first)
    View.SEQUENCES: (
        ("s", "sort", 3), ("/", "filter", 2), ("K", "kill", 4), ("+-", "nice", 6), ("z", "suspend", 7), ("e", "why", 5),
        ("t", "tenants", 8), *_END,
    ),
    View.TENANTS: (("s", "sort", 4), ("r", "reverse", 5), ("/", "filter", 3), ("t", "sequences", 2), *_END),
    View.HELP: (("j k", "scroll", 3), ("h", "back", 0), ("q", "quit", 1)),
}  # fmt: skip
_LEAST_ROWS = 3  # of the table, above an explanation


def frame(state: State, width: int, height: int, look: Look, now: float) -> list[Text]:
    """The whole screen, the bottom line last."""
    if width < 20 or height < 4:
        return [line((cut("too small", width, look.glyphs), ""))] if width > 0 and height > 0 else []
    top = [title(state, width, look, now)]
    bottom = [_bottom(state, width, look)] if look.live else []
    room = height - len(top) - len(bottom)
    if state.view is View.HELP:
        middle = help_lines(state, width, room, look)
    elif state.polled is None:
        middle = _nothing(state, width, room, look)
    else:
        details = header(state, width, _header_room(state, height), look)
        for text in details if state.trouble else ():
            text.stylize("dim")  # how it was
        top += details
        middle = _body(state, width, height - len(top) - len(bottom), look)
    blank = [line() for _ in range(height - len(top) - len(middle) - len(bottom))] if look.live else []
    return [*top, *middle, *blank, *bottom][:height]


def _header_room(state: State, height: int) -> int:
    """A third of the screen, and more of it while there are few rows."""
    rows = len(state.listing.rows) + (FULL_EXPLANATION if state.to_explain is not None else 0)
    return max(height // 3 - 1, min(height // 2, height - rows - 4))


def _nothing(state: State, width: int, height: int, look: Look) -> list[Text]:
    """Before the first answer."""
    shown = textwrap.wrap(state.detail if state.trouble else "asking llmosd", width - 4) or [""]
    made = [line() for _ in range((height - len(shown)) // 2)]
    for text in shown:
        text = cut(text, width, look.glyphs)
        made.append(line((" " * ((width - cell_len(text)) // 2) + text, "")))
    return made[:height]


def _body(state: State, width: int, height: int, look: Look) -> list[Text]:
    """The table, above it its titles, below it the explanation."""
    panel: list[Text] = []
    if state.view is View.SEQUENCES and state.to_explain is not None:
        panel = explanation(state, width, min(FULL_EXPLANATION, height - 1 - min(_LEAST_ROWS, height // 2)), look)
    return [*_table(state, width, height - len(panel), look), *panel]


def _table(state: State, width: int, height: int, look: Look) -> list[Text]:
    listing: Listing[Any] = state.listing
    margin = 2 if look.live else 0
    gap = 2 if width >= 160 else 1
    columns = choose(_worth_showing(state, listing, width), width - margin, gap)
    state.shown_columns = [column.name for column, _ in columns]
    titles = []
    for column, cells in columns:
        arrow = (look.glyphs.down if listing.falling else look.glyphs.up) if column.name == listing.sort else ""
        titles.append(pad(cut(column.title, cells - len(arrow)) + arrow, cells, right=column.right))
    head = line((pad(" " * margin + (" " * gap).join(titles), width), look.head if look.live else "bold"))
    made = [head]
    for number, row in enumerate(listing.window(height - 1), listing.first):
        selected = look.live and number == listing.index
        text = line((f"{look.glyphs.marker} "[:margin] if selected else " " * margin, ""))
        for position, (column, cells) in enumerate(columns):
            shown = pad(column.cell(row, cells), cells, right=column.right, glyphs=look.glyphs)
            style = column.style(row) if column.style and not selected and not state.trouble else ""
            text.append(" " * gap * (position > 0)).append(shown, style or None)
        if selected:
            text.append(" " * (width - text.cell_len))
            text.stylize(look.selected)
        elif state.trouble:
            text.stylize("dim")
        made.append(text)
    if not listing.rows and height > 1:
        nothing = f"nothing matches {clean(listing.filter)!r}" if listing.total else "no sequences"
        made.append(line((" " * margin + cut(nothing, width - margin, look.glyphs), "dim")))
    return made


def _worth_showing(state: State, listing: Listing[Any], width: int) -> list[Column[Any]]:
    """Without the model's name where all rows have the same one and room is short."""
    assert state.polled is not None
    one_model = len(state.polled.status.lanes) < 2 and width < 100
    return [column for column in listing.columns.values() if not (one_model and column.name == "model")]


def _bottom(state: State, width: int, look: Look) -> Text:
    """What it asks, else what happened, else which keys there are."""
    glyphs = look.glyphs
    if state.asking is not None and state.asking.verb is not None:
        text = f"kill sequence {state.asking.verb.rid} of {state.asking.owner}? y/n"
        return line((cut(f" {text} ", width, glyphs), look.question))
    if state.asking is not None:
        text = clean(state.listing.filter)
        while len(text) > width - 12:
            text = text[1:]
        hint = Piece("Enter: keep  Esc: show all", "dim", 1)
        return arrange([Piece(f"filter: {text}{glyphs.cursor}", "bold")], [hint], width, look)
    if state.message is not None:
        text = f" {cut(state.message.text, width - 2, glyphs)} "
        return line((text, look.alarm if state.message.is_error else "bold"))
    left = []
    if state.listing.filter:
        left.append(Piece(cut(f"filter: {clean(state.listing.filter)}", width // 3, glyphs), "bold"))
    return _hints(state, left, width, look)


def _hints(state: State, left: list[Piece], width: int, look: Look) -> Text:
    """As many keys as there is room for, each before its word."""
    used = arrange(left, [], width, look)
    room = width - used.cell_len - (2 if left else 0)
    kept = sorted(_HINTS[state.view], key=lambda hint: hint[2])
    while kept and sum(len(key) + len(word) + 1 for key, word, _ in kept) + 2 * (len(kept) - 1) > room:
        kept.pop()
    if left:
        used.append("  ")
    for number, (key, word, _) in enumerate(hint for hint in _HINTS[state.view] if hint in kept):
        used.append("  " * (number > 0)).append(key, "bold").append(f" {word}", "dim")
    return used
